"""Measures the NumPy runtime: tokens per second of scoring, prefill and decode, and the memory they take.

    python examples/benchmarks/bench_cpu_runtime.py --json cpu_runtime.json
    python examples/benchmarks/bench_cpu_runtime.py --model model.rcp

Without --model it writes random models of two shapes, the bundled demo's and one of 22 million parameters: speed
depends on shapes, not on values. Each figure is the best of a few runs. Set OPENBLAS_NUM_THREADS to bound the threads.
"""

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats", "runtime")]

from rcpformat import Quantization  # noqa: E402
from rcpformat.reader import RcpFile  # noqa: E402
from rcprun.backends.numpy import NumpyBackend  # noqa: E402
from rcprun.sampling import Sampler, SamplingOptions  # noqa: E402
from rcprun.score import score_sequence  # noqa: E402
from shapes import DEMO, WIKI_22M  # noqa: E402
from tiny_rcp import write_random  # noqa: E402

SHAPES = {"demo": DEMO, "22m": WIKI_22M}


def seconds(action: Callable[[], object], runs: int) -> float:
    """The shortest of a few runs, after one that does not count."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def measure(name: str, path: Path, runs: int) -> dict[str, object]:
    """One row of the table. Decoding is measured after 16 and after 1,008 tokens, sampling included."""
    began = time.perf_counter()
    file = RcpFile.open(path)
    context, vocabulary = min(2048, file.architecture.max_position_embeddings), file.architecture.vocab_size
    backend = NumpyBackend(file, context)
    row: dict[str, object] = {
        "model": name,
        "load_s": time.perf_counter() - began,
    }
    tokens = np.random.default_rng(0).integers(0, vocabulary, 1024).tolist()
    row["score_1024_tok_s"] = 1024 / seconds(lambda: score_sequence(backend, tokens), runs)

    def prefill(count: int) -> None:
        backend.truncate(0)
        backend.forward(tokens[:count])

    for count in (16, 1008):
        row[f"prefill_{count}_tok_s"] = count / seconds(lambda count=count: prefill(count), runs)
    sampler = Sampler(SamplingOptions(seed=0))

    def decode(after: int) -> None:
        backend.truncate(after)
        for _ in range(16):
            token = sampler.sample(backend.forward(tokens[:1]), tokens)
            assert 0 <= token < vocabulary

    for after in (16, 1008):
        prefill(after)
        row[f"decode_at_{after}_tok_s"] = 16 / seconds(lambda after=after: decode(after), runs)
    memory = backend.memory()
    return row | {"weights_mib": memory.weights / 2**20, "kv_cache_mib": memory.kv_cache / 2**20}


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Measure this .rcp file.")
@click.option("--shape", type=click.Choice(list(SHAPES)), multiple=True, default=list(SHAPES), help="Random models.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
def main(model: Path | None, shape: tuple[str, ...], runs: int, json_path: Path | None) -> None:
    """Measure, print a table, and write it where asked."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {"file": model} if model else {name: Path(folder) / f"{name}.rcp" for name in shape}
        for name, path in paths.items():
            if model is None:
                write_random(path, dataclasses.replace(SHAPES[name], tied_table=True), Quantization(method="ldp"))
            rows.append(measure(name, path, runs))
    for key in rows[0]:
        values = [row[key] for row in rows]
        click.echo(f"{key:24}" + "".join(f"{v:>12}" if isinstance(v, str) else f"{v:12.1f}" for v in values))
    if json_path:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
        report = {"machine": machine | {"blas_threads": threads, "numpy": np.__version__}, "rows": rows}
        json_path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
