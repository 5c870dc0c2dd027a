"""Measures `rcpconv export`: peak memory, and time against that of copying the same bytes.

    python examples/benchmarks/measure_export.py llama-2-7b /tmp/place --json export-7b.json

Makes a run folder of that shape in PLACE, random tensors and no training, and deletes it at the end. Then, in turns,
it copies the run's tensors to a new file (read, write, fsync, rename: what any export has to do) and exports the run by
the command line in a process of its own, from the start of Python to its end. "warm": the run's files are in the page
cache already; "cold": they were dropped from it first. The old file is deleted before each turn. Figures are medians;
peak memory is VmHWM, mapped files included. Needs Linux.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / folder) for folder in (".", "tests", "formats", "examples")]
sys.path[:0] = FOLDERS

from make_synthetic_rcp import SHAPES, tensor_sources  # noqa: E402

from rcpconv.config import QuantizeConfig  # noqa: E402
from rcpconv.proof import hash_decoded, hash_tensor  # noqa: E402
from rcpconv.runs import BAKED, FINISHED, Run, created, keep_hashes, now, replacing, require_room  # noqa: E402
from rcpconv.tensor_file import TensorWriter  # noqa: E402
from rcpformat import Architecture, Quantization, spec  # noqa: E402
from rcpformat.accounting import account  # noqa: E402
from rcpformat.codec import PackedLinear  # noqa: E402
from tiny_rcp import random_metadata  # noqa: E402

PIECE = 1 << 23
"""Bytes that are copied at a time."""

COMMAND = """
import pathlib, sys
from rcpconv.cli import main
try:
    main(sys.argv[1:])
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print("PEAK", status.partition("VmHWM:")[2].split()[0])
"""  # getrusage's figure would begin with the parent's


def make_run(folder: Path, architecture: Architecture, theta: float) -> Run:
    """A finished run of random tensors, one layer in memory at a time."""
    quantization = Quantization(method="ldp")
    sources = tensor_sources(architecture, quantization, theta)
    metadata = random_metadata(architecture, quantization)
    record = {
        "status": FINISHED,
        "model": "synthetic",
        "revision": None,
        "created": now(),
        "finished": now(),
        "architecture": architecture.to_json(),
        "quantization": quantization.to_json(),
        "tokenizer": metadata.tokenizer.to_json(),
        "generation": {},
        "provenance": {"base_model": "synthetic", "revision": None},
    }
    tokenizer = sources.pop(spec.TOKENIZER)()
    form = spec.expected_tensors(architecture, quantization)
    del form[spec.TOKENIZER]
    require_room(folder, 3 * account(architecture, quantization).total_bytes)
    recipe = QuantizeConfig(model="synthetic", method="ldp").to_toml()
    with created(folder, record, recipe, tokenizer.tobytes()) as run:
        weights = {}
        with replacing(folder / BAKED) as temporary, temporary.open("wb") as file:
            writer = TensorWriter(file, form)
            for name, source in sources.items():
                writer.write(name, source())
            tensors = writer.finish()
        for name in spec.linear_names(architecture):
            parts = {part: sources[f"{name}.{part}"]() for part in ("codes", "levels", "scale")}
            shape = spec.linear_shape(architecture, spec.linear_kind(name))
            linear = PackedLinear(name=name, shape=shape, group_size=quantization.group_of(name), **parts)
            weights[name] = hash_decoded(linear)
        tensors[spec.TOKENIZER] = hash_tensor(tokenizer)
        keep_hashes(run, weights, tensors)
    return run


def drop_from_cache(folder: Path) -> None:
    """Make the next read of these files one from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(run: Run, out: Path) -> float:
    """Seconds to read the run's tensors and write as many bytes to a file that is on the disk at the end."""
    began = time.perf_counter()
    with (run.folder / BAKED).open("rb") as source, out.open("wb") as target:
        while piece := source.read(PIECE):
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    os.replace(out, out.with_suffix(".rcp"))
    return time.perf_counter() - began


def run_export(run: Run, out: Path) -> tuple[float, int]:
    """Seconds of the whole command, and the bytes of memory it took at most."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS)}
    command = [sys.executable, "-c", COMMAND, "export", "--run", str(run.folder), "--out", str(out)]
    began = time.perf_counter()
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - began, 1024 * int(result.stdout.rpartition("PEAK ")[2])


def measure(run: Run, place: Path, turns: int, *, cold: bool) -> dict[str, Any]:
    """Medians over some turns of copying and exporting."""
    copied, exported, peaks = [], [], []
    for _ in range(turns):
        for action in ("copy", "export"):
            out = place / "out.rcp"
            out.unlink(missing_ok=True)
            os.sync()
            if cold:
                drop_from_cache(run.folder)
            if action == "copy":
                copied.append(copy(run, place / "copying"))
                continue
            seconds, peak = run_export(run, out)
            exported.append(seconds)
            peaks.append(peak)
    return {
        "export_s": statistics.median(exported),
        "copy_s": statistics.median(copied),
        "ratio": statistics.median(exported) / statistics.median(copied),
        "peak_bytes": max(peaks),
        "turns": {"export_s": exported, "copy_s": copied},
    }


def machine() -> dict[str, Any]:
    """What the figures depend on. SHA-256 is five times slower on processors without instructions for it."""
    data, began = bytes(1 << 28), time.perf_counter()
    hashlib.sha256(data)
    speed = len(data) / (time.perf_counter() - began)
    return {
        "processor": Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[1],
        "sha256_mb_s": round(speed / 1e6),
        "numpy": np.__version__,
    }


@click.command(help=__doc__.split("\n")[0])
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("place", type=click.Path(file_okay=False, path_type=Path))
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(shape: str, place: Path, turns: int, json_path: Path | None) -> None:
    """Make the run, measure, print, and write it where asked."""
    place.mkdir(parents=True)
    try:
        run = make_run(place / "run", *SHAPES[shape])
        rows = {name: measure(run, place, turns, cold=name == "cold") for name in ("warm", "cold")}
        nbytes = (place / "out.rcp").stat().st_size
    finally:
        shutil.rmtree(place)
    click.echo(f"{shape}: {nbytes:,} bytes")
    for name, row in rows.items():
        click.echo(
            f"{name}: export {row['export_s']:.2f} s, copy {row['copy_s']:.2f} s, ratio {row['ratio']:.2f}, "
            f"peak {row['peak_bytes'] / 1e9:.2f} GB"
        )
    if json_path:
        report = {"shape": shape, "nbytes": nbytes, "machine": machine()} | rows
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
