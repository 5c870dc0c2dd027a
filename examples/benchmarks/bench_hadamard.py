"""Measures R4, the Hadamard transform before down_proj with the quantization of what it gives, on the GPU.

    python examples/benchmarks/bench_hadamard.py --width 11008 --tokens 1 --tokens 2048 --json hadamard.json

A CUDA graph of 64 equal launches, as they overlap. "limit": the bytes of activations and codes at the read bandwidth
measured, which matters for many tokens only.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import cupy
import numpy as np
from bench_linear import graph_seconds  # which also finds the packages

from rcprun.backends.cuda.bandwidth import read_bandwidth
from rcprun.backends.cuda.hadamard import Transform

LAUNCHES = 64


def seconds(transform: Transform, tokens: int, runs: int) -> float:
    """Of one launch."""
    x_MN = cupy.random.standard_normal((tokens, transform.n), dtype=np.float32)
    codes_MK = cupy.zeros((tokens, -(-transform.n // 128) * 128), np.int8)
    scale_M = cupy.zeros(tokens, np.float32)
    workspace_MN = cupy.empty_like(x_MN) if transform.needs_workspace(tokens) else None

    def launch() -> None:
        for _ in range(LAUNCHES):
            transform.quantize(x_MN, codes_MK, scale_M, clip=np.float32(0.9), bits=4, workspace_MN=workspace_MN)

    return graph_seconds(launch, runs) / LAUNCHES


@click.command(help=__doc__.split("\n")[0])
@click.option("--width", "widths", type=click.IntRange(1), multiple=True, default=[11008], show_default=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, default=[1, 8, 2048], show_default=True)
@click.option("--runs", type=click.IntRange(1), default=30, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
def main(widths: tuple[int, ...], tokens: tuple[int, ...], runs: int, json_path: Path | None) -> None:
    """Measure, print a line for each, and write all where asked."""
    bandwidth, rows = read_bandwidth(), []
    for width in widths:
        transform = Transform(width)
        for count in tokens:
            us = seconds(transform, count, runs) * 1e6
            rows.append({"width": width, "tokens": count, "us": us, "limit_us": 5e6 * width * count / bandwidth})
            click.echo(f"{width:6} channels, {count:5} tokens: {us:8.2f} µs, limit {rows[-1]['limit_us']:.2f} µs")
    if json_path:
        json_path.write_text(json.dumps({"read_bandwidth": bandwidth, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
