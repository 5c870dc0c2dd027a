"""Runs NVIDIA's compute-sanitizer over the decoding of a small model: memcheck, racecheck and initcheck.

    python examples/make_synthetic_rcp.py demo /tmp/demo.rcp --layers 1
    python examples/benchmarks/sanitize.py /tmp/demo.rcp --logs /tmp/sanitizer

What runs, once without the sanitizer and then under its tools side by side: prompts of 20 and of 5 tokens, then 8
tokens drawn and 8 greedy ones, of one sequence and of two together. Each tool writes a log. The exit status is 1 if any
found something, 2 where there is no compute-sanitizer. Every array is an allocation of its own, so that memcheck sees
where it ends; the KV cache is zeroed, as attention reads whole tiles of it and passes over what is not there yet.

Kernels that overlap look for each other's numbers, but not for ever: a tool that slows them by more than a
thousandfold could make them give up. --serialized --no-graphs launches them one by one, so that all is there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("formats", "runtime")]

TOOLS = {
    # cuda-bindings asks the driver for functions that it may lack, and takes a no for an answer.
    "memcheck": ("--leak-check", "no", "--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all"),
    "initcheck": (),
}
FOUND = 99
"""What the sanitizer returns where it found something."""
NEW_TOKENS = 8


def decode(model: Path, *, graphs: bool, overlap: bool = True) -> None:
    """What the sanitizer watches."""
    if not overlap:
        from rcprun.backends.cuda.launch import serialized

        with serialized():
            decode(model, graphs=graphs)
        return
    import cupy

    from rcpformat.reader import RcpFile
    from rcprun.backends.cuda.backend import CudaBackend
    from rcprun.sampling import SamplingOptions

    cupy.cuda.set_allocator(None)
    file = RcpFile.open(model)
    vocabulary = file.architecture.vocab_size
    prompts = [[token * 7 % vocabulary for token in range(length)] for length in (20, 5)]
    ways = (SamplingOptions(), SamplingOptions(temperature=0.0))
    for streams in (1, 2):
        backend = CudaBackend(file, 64, streams)
        backend.graphs = graphs
        backend.clear_cache()
        for options in ways:
            tokens: list[list[int]] = [[] for _ in range(streams)]
            for stream in range(streams):
                backend.begin(stream, prompts[stream], options, stream, NEW_TOKENS)
            while min(map(len, tokens)) < NEW_TOKENS:
                for stream, token in backend.advance():
                    tokens[stream].append(token)
            for stream in range(streams):
                backend.end(stream)
            click.echo(f"{streams} sequence(s), temperature {options.temperature}: {tokens}")


def find() -> str | None:
    """The sanitizer, on PATH or where CUDA is installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run(command: list[str], log: Path, limit: float) -> int | None:
    """The exit status of a command whose output goes to a log; None where it took longer than the limit."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the sanitizer, and what it watches
                child.wait()


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), default=Path("sanitizer"), show_default=True)
@click.option("--tool", "tools", type=click.Choice(list(TOOLS)), multiple=True, default=list(TOOLS))
@click.option("--no-graphs", is_flag=True, help="Launch kernels one by one, not as CUDA graphs.")
@click.option("--serialized", is_flag=True, help="Start each kernel when the one before has ended.")
@click.option("--limit", type=float, default=600, show_default=True, help="Seconds that a tool may take.")
@click.option("--plain", is_flag=True, help="Only run what the sanitizer would watch, without it.")
def main(
    model: Path, logs: Path, tools: tuple[str, ...], no_graphs: bool, serialized: bool, limit: float, plain: bool
) -> None:
    """Run the tools side by side, and say what each found."""
    if plain:
        decode(model, graphs=not no_graphs, overlap=not serialized)
        sys.stdout.flush()
        os._exit(0)  # under racecheck, the end of the interpreter was seen to crash
    sanitizer = find()
    if sanitizer is None:
        click.echo("compute-sanitizer: not on PATH, nor in $CUDA_HOME/bin; it comes with the CUDA toolkit", err=True)
        sys.exit(2)
    logs.mkdir(parents=True, exist_ok=True)
    watched = [sys.executable, __file__, str(model), "--plain"]
    watched += ["--no-graphs"] * no_graphs + ["--serialized"] * serialized
    status = run(watched, logs / "plain.log", limit)  # compiles the kernels, too
    if status != 0:
        click.echo(f"without the sanitizer: failed ({status}); see {logs / 'plain.log'}")
        sys.exit(1)

    def under(tool: str) -> int | None:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *TOOLS[tool]]
        return run([*command, *watched], logs / f"{tool}.log", limit)

    failed = False
    with ThreadPoolExecutor(len(tools)) as pool:
        for tool, status in zip(tools, pool.map(under, tools), strict=True):
            log = logs / f"{tool}.log"
            found = {0: "nothing found", FOUND: "found something", None: f"not done after {limit:g} s"}
            summaries = [line for line in log.read_text(errors="replace").splitlines() if "SUMMARY" in line]
            click.echo(f"{tool}: {found.get(status, f'failed ({status})')}; {' '.join(summaries)} see {log}")
            failed |= status != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
