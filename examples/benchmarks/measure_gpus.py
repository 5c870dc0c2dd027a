"""Trains one model in the same way on different numbers of GPUs, and compares losses and speed.

    python examples/benchmarks/measure_gpus.py MODEL TEXT --out gpus.json [--gpus 1,2] [--resume] [--set seq_len=1024]

Each training is a `rcpconv quantize --gpus N` of its own, with --sequences a step, shared evenly among the GPUs, as
many of them at a time as quantize finds room for. With --resume, the largest number's training is stopped by SIGTERM
halfway and goes on with the first number. Losses have to agree as far as rounding lets them, and rounding flips 2-bit
codes: --yardstick shows how much losses differ on the same GPU when gradients are added up in twice as many parts.
Speed is the median over the second half of the steps. Trainings that are in --out already are not done again.
--free-gib 80 fills all other memory of every GPU meanwhile, which so is as large as one of 80 GiB.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[2]
_PATIENCE = 0.2
_FILL = """
import sys, torch
kept = []
for index in range(torch.cuda.device_count()):
    torch.zeros(1, device=f"cuda:{index}")
    free = torch.cuda.mem_get_info(index)[0] - round(float(sys.argv[1]) * 2**30)
    if free > 0:
        kept.append(torch.empty(free, dtype=torch.uint8, device=f"cuda:{index}"))
    print(f"{torch.cuda.mem_get_info(index)[0] / 2**30:.1f} GiB of GPU {index} are free")
print("ready", flush=True)
sys.stdin.read()
"""
"""Holds memory of all GPUs but for argv[1] GiB, until its input ends."""


@contextmanager
def free_memory(gib: float) -> Iterator[None]:
    """Within, so much memory of each GPU is free, or all of it where there is less."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _FILL, str(gib)], **pipes) as filler:
        assert filler.stdout is not None
        for line in filler.stdout:
            if line == "ready\n":
                break
            click.echo(line, nl=False)
        else:
            raise click.ClickException("the GPUs' memory could not be filled: see above; leave --free-gib out")
        yield  # leaving closes its input


def _python_path() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "formats"), str(ROOT / "runtime"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Trainings:
    """All with the same settings, in folders of one folder, whose output is beside them."""

    def __init__(
        self, model: str, text: str, folder: Path, options: Sequence[str], sequences: int, limit: float
    ) -> None:
        self.model, self.text, self.folder, self.options = model, text, folder, options
        self.sequences, self.limit = sequences, limit

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with Path(self.folder, f"{name}.log").open("ab") as log:
            command = (sys.executable, "-m", "rcpconv", "quantize", *arguments)
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_python_path())

    def _begin(self, name: str, gpus: int, parts: int = 0) -> subprocess.Popen[bytes]:
        if self.sequences % gpus:
            raise click.ClickException(f"{self.sequences} sequences are no multiple of {gpus} GPUs: see --sequences")
        fixed = ("--data", self.text, "--gpus", str(gpus), "--out", str(self.folder / name), "--log-every", "1")
        step = ("--step-sequences", str(self.sequences))
        if parts:
            step = ("--batch-size", str(self.sequences // parts), "--grad-accum", str(parts))
        return self._start(name, self.model, *fixed, *step, "--checkpoint-every", "0", *self.options)

    def _end(self, process: subprocess.Popen[bytes], name: str) -> None:
        try:
            code = process.wait(self.limit)
        except (subprocess.TimeoutExpired, SystemExit) as stop:
            process.terminate()
            why = "stopped" if isinstance(stop, SystemExit) else f"not done after {self.limit:.0f} s; see --limit"
            raise click.ClickException(f"{name}: {why}\n{self.tail(name)}") from None
        if code:
            raise click.ClickException(f"{name}: exit status {code}\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """The end of what a training printed."""
        return Path(self.folder, f"{name}.log").read_text(errors="replace")[-3000:]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Of its metrics.jsonl, one a step."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if "loss" in line]

    def record(self, name: str) -> dict[str, Any]:
        """Its run.json."""
        return json.loads((self.folder / name / "run.json").read_text())  # type: ignore[no-any-return]

    def settings(self, name: str) -> dict[str, Any]:
        """Its recipe.toml."""
        return tomllib.loads((self.folder / name / "recipe.toml").read_text())

    def whole(self, name: str, gpus: int, parts: int = 0) -> str:
        """Train on so many GPUs, each step's gradient added up in so many parts where that is said; the name given."""
        self._end(self._begin(name, gpus, parts), name)
        return name

    def stopped(self, gpus: int, after: int, then: int) -> str:
        """Train on so many GPUs, stop when `after` steps are there, and go on with `then`."""
        name = f"gpus-{gpus}-then-{then}"
        process, end = self._begin(name, gpus), time.monotonic() + self.limit
        while len(self.lines(name)) < after and process.poll() is None and time.monotonic() < end:
            time.sleep(_PATIENCE)
        process.send_signal(signal.SIGTERM)
        process.wait(self.limit)
        self._end(self._start(name, "--resume", str(self.folder / name), "--gpus", str(then)), name)
        return name


def summary(lines: Sequence[dict[str, Any]], record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a training. record, settings: its run.json and recipe.toml."""
    speeds = [line["tokens_per_second"] for line in lines[len(lines) // 2 :]]
    return {
        "batch_size": settings["batch_size"],
        "grad_accum": settings["grad_accum"],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line.get("grad_norm") for line in lines],
        "tokens_per_second": statistics.median(speeds),
        "peak_gpu_memory": record.get("peak_gpu_memory"),
    }


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Of losses of the same step, relative."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def draw(found: dict[str, Any], path: Path) -> None:
    """Losses by step, and how far they are from the first training's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = next(iter(found["runs"].values()))["losses"]
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    for name, row in found["runs"].items():
        steps = range(1, len(row["losses"]) + 1)
        above.plot(steps, row["losses"], label=name, alpha=0.8)
        below.plot(steps, [100 * (x / y - 1) for x, y in zip(row["losses"], first, strict=True)], label=name, alpha=0.8)
    above.set_ylabel("loss, nats")
    above.set_yscale("log")
    above.set_title(f"{found['model']}, {found['sequences']} sequences a step")
    above.legend()
    below.set_ylabel("difference from the first, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@click.command(help=(__doc__ or "").split("\n")[0])
@click.argument("model")
@click.argument("text")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON file.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the losses into this PNG file.")
@click.option("--gpus", default="1,2", show_default=True, help="Numbers to compare, all with the first.")
@click.option("--sequences", type=click.IntRange(1), default=8, show_default=True, help="Of a step.")
@click.option("--resume", is_flag=True, help="Stop a training halfway, and go on with the first number of GPUs.")
@click.option("--yardstick", is_flag=True, help="Also train on the first number with each step in twice as many parts.")
@click.option("--free-gib", type=click.FloatRange(1), help="Fill each GPU's memory but for so much.")
@click.option("--set", "settings", multiple=True, metavar="NAME[=VALUE]", help="An option of quantize.")
@click.option("--limit", type=float, default=240.0, show_default=True, help="Seconds for a training.")
def main(
    model: str,
    text: str,
    out: Path,
    plot: Path | None,
    gpus: str,
    sequences: int,
    resume: bool,
    yardstick: bool,
    free_gib: float | None,
    settings: tuple[str, ...],
    limit: float,
) -> None:
    """Train and compare."""
    counts = [int(count) for count in gpus.split(",")]
    parts = (each.partition("=") for each in settings)
    options = [f"--{name.replace('_', '-')}{equals}{value}" for name, equals, value in parts]
    found: dict[str, Any] = {"model": Path(model).name, "sequences": sequences, "settings": list(settings), "runs": {}}
    if free_gib is not None:
        found["free_gib"] = free_gib
    if out.exists():
        before = json.loads(out.read_text())
        if before | {"runs": {}} != found:
            raise click.ClickException(f"{out} is of other settings: choose another --out")
        found = before
    folder = Path(tempfile.mkdtemp(prefix="rcp-gpus-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what a training said so far is shown
    try:
        trainings = Trainings(model, text, folder, options, sequences, limit)

        def keep(name: str) -> None:
            row = summary(trainings.lines(name), trainings.record(name), trainings.settings(name))
            if (made := row["batch_size"] * row["grad_accum"]) != sequences:
                raise click.ClickException(f"{name}: {made} sequences a step; the recipe says so; choose another model")
            found["runs"].setdefault(name, row)
            first = next(iter(found["runs"].values()))
            row["largest_loss_difference"] = largest_difference(row["losses"], first["losses"])
            row["speedup"] = row["tokens_per_second"] / first["tokens_per_second"]
            found["runs"][name] = row
            out.write_text(json.dumps(found, indent=1) + "\n")
            peak = f", at most {row['peak_gpu_memory'] / 2**30:.1f} GiB of a GPU" if row["peak_gpu_memory"] else ""
            click.echo(
                f"{name:16} losses {row['losses'][0]:.5f} to {row['losses'][-1]:.5f}, at most "
                f"{row['largest_loss_difference']:.2e} from the first's; {row['tokens_per_second']:,.0f} tokens/s, "
                f"{row['speedup']:.2f} times the first's{peak}"
            )

        with nullcontext() if free_gib is None else free_memory(free_gib):
            for count in counts:
                if (name := f"gpus-{count}") not in found["runs"]:
                    keep(trainings.whole(name, count))
            if yardstick and (name := f"gpus-{counts[0]}-in-parts") not in found["runs"]:
                first = next(iter(found["runs"].values()))
                keep(trainings.whole(name, counts[0], 2 * first["grad_accum"]))
            if resume:
                steps = len(found["runs"][f"gpus-{counts[0]}"]["losses"])
                keep(trainings.stopped(max(counts), steps // 2, counts[0]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if plot is not None:
        draw(found, plot)


if __name__ == "__main__":
    main()
