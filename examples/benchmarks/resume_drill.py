"""Kills a training with SIGKILL, resumes it, and compares what is left with an uninterrupted one, byte for byte.

    python examples/benchmarks/resume_drill.py CHECKPOINT FOLDER --steps 4 --every 2 -- --seq-len 2048 --compile off

After "--": options of rcpconv quantize for all three. With --gpus N torchrun starts that many processes, which are all
killed. With --then M, M processes resume: figures agree then, but not bytes. torch's deterministic algorithms are
demanded, without which the gradients of attention on a GPU differ from run to run; asked for with warnings alone, cuDNN
keeps its others.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
_CHILD = "--as-rcpconv"
_COMPARED = ("baked.safetensors", "weights.sha256.json")
_GRACE = 0.3
"""Seconds from a checkpoint to the kill, so that it comes in the midst of a step."""


def _command(gpus: int, *options: str | Path) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    return [sys.executable, *several, __file__, _CHILD, "quantize", *map(str, options)]


def _environment() -> dict[str, str]:
    folders = [str(ROOT), str(ROOT / "formats"), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return os.environ | deterministic | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _train(gpus: int, *options: str | Path) -> None:
    began = time.perf_counter()
    if code := subprocess.run(_command(gpus, *options), env=_environment()).returncode:
        raise click.ClickException(f"quantize {' '.join(map(str, options))}: exit status {code}")
    click.echo(f"{time.perf_counter() - began:.1f} s")


def _family(process: int) -> list[int]:
    """A process, and those that it and they have started. For Linux."""
    lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    return [process, *(each for listed in lists for child in listed.split() for each in _family(int(child)))]


def _train_and_kill(run: Path, step: int, gpus: int, *options: str | Path) -> None:
    """Raises ClickException where it ended by itself."""
    folder, name = run / "checkpoints", f"step-{step:07d}" + (".pt" if gpus == 1 else "")
    child = subprocess.Popen(_command(gpus, *options), env=_environment())
    try:
        while not (folder / name).exists():
            if child.poll() is not None:
                raise click.ClickException(f"ended with status {child.returncode} before step {step} was saved")
            time.sleep(0.01)
        time.sleep(_GRACE)
        if child.poll() is not None:
            raise click.ClickException("ended before it could be killed; use more --steps")
    finally:
        if child.poll() is None:
            for each in _family(child.pid):
                os.kill(each, signal.SIGKILL)
            child.wait()
    click.echo(f"killed after step {step}; left: {sorted(path.name for path in folder.iterdir())}")


@click.command(help=(__doc__ or "").split("\n")[0])
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--steps", default=4, show_default=True)
@click.option("--every", default=2, show_default=True, help="Steps between checkpoints; killed after the first one.")
@click.option("--gpus", default=1, show_default=True, help="Processes that train together.")
@click.option("--then", type=int, help="Processes that resume; as many by default.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    checkpoint: Path, folder: Path, steps: int, every: int, gpus: int, then: int | None, options: tuple[str, ...]
) -> None:
    """Train three times; ends with status 1 where bytes differ that should not."""
    common = (checkpoint, "--steps", str(steps), "--log-every", "1", *options)
    whole, broken = folder / "whole", folder / "broken"
    _train(gpus, *common, "--out", whole, "--checkpoint-every", "0")
    _train_and_kill(broken, every, gpus, *common, "--out", broken, "--checkpoint-every", str(every))
    _train(then or gpus, "--resume", broken)
    differing = [name for name in _COMPARED if (whole / name).read_bytes() != (broken / name).read_bytes()]
    for run in (whole, broken):
        click.echo(f"{run.name}: {(run / 'metrics.jsonl').read_text().strip().splitlines()[-1]}")
    if then not in (None, gpus):
        return
    if differing:
        raise click.ClickException(f"differ: {', '.join(differing)}")
    click.echo(f"the same bytes in {' and '.join(_COMPARED)}")


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        import torch

        torch.use_deterministic_algorithms(True)
        sys.argv[1:2] = []
        runpy.run_module("rcpconv", run_name="__main__", alter_sys=True)
    else:
        main()
