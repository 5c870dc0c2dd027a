"""Measures the 2-bit linear layers of one token on the GPU, all layers of a model in one CUDA graph.

    python examples/benchmarks/bench_linear.py --shape llama-2-7b --batch 1 --batch 8 --json linear.json

Weights are random and larger than any cache. "linear": codes in, floats out. "fused": with the normalization,
quantization, residual sum and SwiGLU that decoding fuses into them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cupy
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats", "runtime")]

import shapes  # noqa: E402
from rcpformat.architecture import Architecture  # noqa: E402
from rcprun.backends.cuda import linear as ops  # noqa: E402
from rcprun.backends.cuda.bandwidth import read_bandwidth  # noqa: E402

SHAPES = {"llama-2-7b": shapes.LLAMA_2_7B, "llama-3-8b": shapes.LLAMA_3_8B, "wiki-llama-22m": shapes.WIKI_22M}


def random_linear(rows: tuple[int, ...], columns: int, interleave: bool = False) -> ops.UnitLinear:
    """Random bits in the units' form; no file has to be read for a speed."""
    weights = ops.UnitLinear.__new__(ops.UnitLinear)
    weights.interleaved, weights.k, weights.group = interleave, columns, 128
    weights.units = ops.padded(columns) // ops.UNIT_COLUMNS
    weights.n = sum(rows) // 2 if interleave else sum(rows)
    weights.tiles = -(-weights.n // (8 if interleave else 16))
    weights.unit_TU = cupy.random.randint(0, 256, (weights.tiles, weights.units, 576), dtype=np.uint8)
    weights.scale_R = cupy.full(weights.tiles * 16, 1e-4, dtype=np.float32)
    weights.bias_R = None
    return weights


def graph_seconds(action: Callable[[], None], repetitions: int) -> float:
    """Median time of one replay of everything that `action` launches."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        action()  # loads the kernels
        stream.synchronize()
        stream.begin_capture()
        action()
        graph = stream.end_capture()
        times = []
        for _ in range(repetitions + 3):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return statistics.median(times[3:])


class Model:
    """The linear layers of a model."""

    def __init__(self, a: Architecture) -> None:
        self.a = a
        kv, heads = a.num_kv_heads * a.head_dim, a.num_heads * a.head_dim
        self.layers = [
            (
                random_linear((heads, kv, kv), a.hidden_size),
                random_linear((a.hidden_size,), heads),
                random_linear((a.intermediate_size, a.intermediate_size), a.hidden_size, interleave=True),
                random_linear((a.hidden_size,), a.intermediate_size),
            )
            for _ in range(a.num_layers)
        ]
        self.nbytes = sum(weights.nbytes for layer in self.layers for weights in layer)

    def run(self, batch: int, fused: bool) -> Callable[[], None]:
        """What launches all of them once, on buffers of its own."""
        a, options = self.a, {"a_bits": 4, "clip": np.float32(0.9), "eps": 1e-5}

        def codes(columns: int) -> dict[str, Any]:
            shape = (batch, ops.padded(columns))
            return {
                "x": cupy.random.randint(-8, 8, shape).astype(np.int8),
                "x_scale": cupy.full(batch, 0.1, np.float32),
                "prologue": ops.CODES,
            }

        def floats(columns: int, prologue: int) -> dict[str, Any]:
            return {"x": cupy.random.standard_normal((batch, columns), dtype=np.float32), "prologue": prologue}

        hidden, heads, middle = a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size
        inputs = (
            (floats(hidden, ops.NORMALIZE), floats(heads, ops.QUANTIZE), floats(hidden, ops.NORMALIZE), codes(middle))
            if fused
            else (codes(hidden), codes(heads), codes(hidden), codes(middle))
        )
        epilogues = (
            (ops.STORE, ops.ADD, ops.SWIGLU, ops.ADD) if fused else (ops.STORE, ops.STORE, ops.SWIGLU, ops.STORE)
        )
        outs = [cupy.zeros((batch, weights.n), np.float32) for weights in self.layers[0]]

        def launch() -> None:
            for layer in self.layers:
                for weights, given, epilogue, out in zip(layer, inputs, epilogues, outs, strict=True):
                    ops.linear(weights, out=out, epilogue=epilogue, overlap=True, **given, **options)

        return launch


@click.command(help=__doc__.split("\n")[0])
@click.option("--shape", "names", type=click.Choice(list(SHAPES)), multiple=True, default=["llama-2-7b"])
@click.option("--batch", "batches", type=click.IntRange(1, 8), multiple=True, default=[1, 8])
@click.option("--runs", type=click.IntRange(1), default=30, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
def main(names: tuple[str, ...], batches: tuple[int, ...], runs: int, json_path: Path | None) -> None:
    """Measure, print a table, and write it where asked."""
    bandwidth = read_bandwidth()
    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    click.echo(f"{gpu}: reads {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for name in names:
        model = Model(SHAPES[name])
        limit = model.nbytes / bandwidth
        for batch in batches:
            for form in ("linear", "fused"):
                seconds = graph_seconds(model.run(batch, form == "fused"), runs)
                rows.append({"shape": name, "batch": batch, "what": form, "us": seconds * 1e6, "limit_us": limit * 1e6})
                click.echo(f"{name:16} batch {batch}  {form:7} {seconds * 1e6:8.1f} µs  limit {limit * 1e6:.1f} µs")
    if json_path:
        json_path.write_text(json.dumps({"gpu": gpu, "read_bandwidth": bandwidth, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
