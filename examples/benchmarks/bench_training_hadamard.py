"""Compares ways to compute training's Hadamard transforms on a GPU: time, and error against float64.

    python examples/benchmarks/bench_training_hadamard.py --json training-hadamard.json

Training's float32 transforms are products in true float32, which tensor cores do not do. "thirds" cuts each value into
three bfloat16 numbers whose sum it is, so that tensor cores multiply them with the ±1 of the matrix without error and
add in float32; "halves" takes two, "tf32" one product in TF32. Seconds are medians of single transforms.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("formats", ".")]

from rcpconv.hadamard import _stage, _stages, hadamard_transform  # noqa: E402
from rcpformat.hadamard import hadamard_factor  # noqa: E402

SHAPES = ((16384, 11008), (8192, 1408), (16384, 4096), (16384 * 32, 128))
"""(rows, channels): R4 of LLaMA-2-7B and of wiki-llama-22m, a head's input, R3 of eight sequences of 2,048."""


_UPPER_HALF = -(1 << 16)


def _parts(y: Tensor, count: int) -> Tensor:
    """`count` bfloat16 tensors whose sum is y or nearly so, one after another along the last axis.

    Cut by bits: torch.compile leaves out a cast to bfloat16 and back.
    """
    parts = []
    for _ in range(count):
        part = (y.view(torch.int32) & _UPPER_HALF).view(torch.float32)
        parts.append(part.bfloat16())
        y = y - part
    return torch.cat(parts, dim=-1)


def _product(parts: Tensor, matrix: Tensor) -> Tensor:
    """parts (R, k f) · matrix (f, f) k times below itself -> (R, f) float32."""
    stacked = matrix.bfloat16().repeat(parts.shape[-1] // len(matrix), 1)
    if parts.device.type == "cuda":
        return torch.mm(parts, stacked, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return parts.float() @ stacked.float()


class InParts:
    """The transform on bfloat16 tensor cores."""

    def __init__(self, count: int, batched: bool) -> None:
        """batched: stages of larger strides as batched products, without turning the array."""
        self.count, self.batched = count, batched
        self.cut = torch.compile(lambda y: _parts(y, count), dynamic=False)
        self.cut_turned = torch.compile(lambda y: _parts(y.transpose(1, 2).contiguous(), count), dynamic=False)

    def _stage(self, y: Tensor, matrix: Tensor, stride: int) -> Tensor:
        f = len(matrix)
        if stride == 1:
            return _product(self.cut(y.reshape(-1, f)), matrix)
        y = y.reshape(-1, f, stride)
        if self.batched and y.device.type == "cuda":
            stacked = matrix.bfloat16().repeat(1, self.count).expand(len(y), -1, -1)
            parts = self.cut(y.reshape(len(y), -1)).reshape(len(y), self.count * f, stride)
            return torch.bmm(stacked, parts, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
        parts = self.cut_turned(y)
        return _product(parts.flatten(0, 1), matrix.T).reshape(-1, stride, f).transpose(1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        """H x."""
        y = x
        for matrix, stride in _stages(x.shape[-1], torch.float32, x.device, False):
            y = self._stage(y, matrix, stride)
        return y.reshape(x.shape)


def tf32(x: Tensor) -> Tensor:
    """H x with products in TF32."""
    y, before = x, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for matrix, stride in _stages(x.shape[-1], x.dtype, x.device, False):
            y = _stage(y, matrix, stride)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return y.reshape(x.shape)


torch._dynamo.config.recompile_limit = 100
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": hadamard_transform,
    "thirds": InParts(3, False),
    "thirds, batched": InParts(3, True),
    "halves": InParts(2, False),
    "tf32": tf32,
}


def measure(way: Callable[[Tensor], Tensor], rows: int, channels: int, device: str, runs: int) -> dict[str, Any]:
    """Seconds, and the largest and the root mean square error as shares of the result's root mean square."""
    x = torch.randn(rows, channels, device=device, generator=torch.Generator(device).manual_seed(0))
    exact = hadamard_transform(x[:256].double())
    difference, size = (way(x)[:256].double() - exact).abs(), exact.square().mean().sqrt()
    times = []
    for _ in range(runs):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        way(x)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    errors = {"largest": float(difference.max() / size), "rms": float(difference.square().mean().sqrt() / size)}
    return {"seconds": statistics.median(times), **errors}


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--runs", default=10, show_default=True)
@click.option("--rows", type=int, help="Instead of each shape's own, for a try.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(runs: int, rows: int | None, json_path: Path | None) -> None:
    """Measure, print a line for each, and write all where asked."""
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for own_rows, channels in SHAPES:
        count = rows or own_rows
        limit = 8 * count * channels / 4.2e12
        click.echo(f"{count} x {channels} ({hadamard_factor(channels)}); to read and write once {limit * 1e3:.3f} ms")
        for name, way in WAYS.items():
            try:
                row = measure(way, count, channels, device, runs)
            except (RuntimeError, TypeError) as error:
                click.echo(f"  {name:16} failed: {str(error)[:200]}")
                continue
            found.append({"rows": count, "channels": channels, "way": name} | row)
            click.echo(
                f"  {name:16} {row['seconds'] * 1e3:8.3f} ms   error at most {row['largest']:.1e}, rms {row['rms']:.1e}"
            )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
