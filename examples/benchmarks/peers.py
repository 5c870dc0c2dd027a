"""Other people's linear layers, for bench_linear.py: cuBLAS in float16, torch's int4, GemLite's 4 and 2 bits.

    python examples/benchmarks/peers.py --peer "GemLite 2-bit" --batch 1 --layers 32 --linear 4096x4096

Prints a line of JSON for each batch size: the median time of one CUDA graph of all layers, over random weights that no
cache holds. Needs torch, and GemLite (PyPI: gemlite) where it is to be measured. Importing it needs neither. Knows
nothing of models.

Each peer gets what is best for it: activations in the type that it takes, CUDA graphs, GemLite also its own tuning for
this GPU (of its "fast" list) and outputs that it zeroes 256 at a time (set_kernel_caching). Tuning compiles about 150
Triton kernels for LLaMA-2-7B's shapes and two batch sizes; all cores do that first.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    Linear = Callable[[Tensor], Tensor]

GROUP = 128
DISTINCT = 8
"""Layers with weights of their own; a LLaMA-3.2-1B's in 2 bits are 17 MB."""
RUNS = 20
PARTS = 4
"""Of a tuning's configurations, compiled one beside the other."""

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Someone's linear layer: `make` gives one of random weights."""

    make: Callable[[int, int], Any]
    bits: float
    """Of a weight, with its part of the group's scale and offset."""
    dtype: str
    """torch's name for the type of the activations."""
    gemlite: bool = False


def float16(n: int, k: int) -> Linear:
    """A matrix product by cuBLAS."""
    import torch

    weight_NK = torch.randn(n, k, dtype=torch.float16, device="cuda") / k**0.5
    return lambda x: torch.nn.functional.linear(x, weight_NK)


def torch_int4(n: int, k: int) -> Linear:
    """torch's weight-only int4 kernel. n must be a multiple of 8, k one of 128."""
    import torch

    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales_and_zeros)


def gemlite(bits: int, n: int, k: int) -> Linear:
    """GemLite's Triton kernels. k must be a multiple of 128."""
    import torch
    from gemlite.helper import A16Wn

    codes_NK = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scales, zeros = (torch.rand(n, k // GROUP, dtype=torch.float16, device="cuda") for _ in range(2))
    layer: Linear = A16Wn(device="cuda:0", dtype=torch.float16).from_weights(codes_NK, scales, zeros, bits, GROUP)
    return layer


PEERS = {
    "torch float16": Peer(make=float16, bits=16, dtype="float16"),
    "torch int4": Peer(make=torch_int4, bits=4.25, dtype="bfloat16"),
    "GemLite 4-bit": Peer(make=partial(gemlite, 4), bits=4.25, dtype="float16", gemlite=True),
    "GemLite 2-bit": Peer(make=partial(gemlite, 2), bits=2.25, dtype="float16", gemlite=True),
}


def gemlite_tuners() -> list[Any]:
    """Triton's Autotuner of each of GemLite's kernels, after its outputs were set to be zeroed many at a time."""
    import gemlite
    from gemlite.core import GEMLITE_TRITON_KERNELS

    gemlite.set_kernel_caching(True)
    return [tuner for kernel in GEMLITE_TRITON_KERNELS for tuner in kernel.kernel]


def compile_gemlite(name: str, shape: Shape, batch: int, part: int) -> None:
    """Fill Triton's cache on disk with a part of the kernels that tuning a layer tries."""
    import torch

    def launch_once(kernel_call: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
        kernel_call()
        return [0.0] * len(quantiles)

    tuners = gemlite_tuners()
    every = [tuner.configs for tuner in tuners]
    for tuner, configs in zip(tuners, every, strict=True):
        tuner.do_bench, tuner.configs = launch_once, configs[part::PARTS]
        tuner.cache.clear()  # of what another part found
    try:
        PEERS[name].make(*shape)(torch.zeros(batch, shape[1], dtype=torch.float16, device="cuda"))
        torch.cuda.synchronize()
    finally:
        for tuner, configs in zip(tuners, every, strict=True):
            tuner.configs = configs


def prepare_gemlite(name: str, shapes: list[Shape], batches: tuple[int, ...]) -> None:
    """Compile what tuning will try, on all cores, and bound the time that it takes to try it."""
    from triton.testing import do_bench

    tasks = [(shape, batch, part) for shape in dict.fromkeys(shapes) for batch in batches for part in range(PARTS)]
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), get_context("spawn")) as pool:
        wait([pool.submit(compile_gemlite, name, *task) for task in tasks])  # errors come again when it is timed
    for tuner in gemlite_tuners():
        tuner.do_bench = partial(do_bench, warmup=5, rep=20)  # ms; with Triton's 25 and 100 it would take minutes


def graph_seconds(name: str, shapes: list[Shape], layers: int, batch: int) -> float:
    """Median time of one CUDA graph of `layers` times all shapes."""
    import torch

    peer = PEERS[name]
    weights = [[peer.make(*shape) for shape in shapes] for _ in range(DISTINCT)]
    inputs = [torch.randn(batch, k, device="cuda", dtype=getattr(torch, peer.dtype)) for _, k in shapes]

    def run() -> None:
        for layer in range(layers):
            for linear, x in zip(weights[layer % DISTINCT], inputs, strict=True):
                linear(x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and tunes
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def measure(name: str, shapes: list[Shape], layers: int, batches: Sequence[int], limit: float) -> dict[int, float]:
    """graph_seconds of each batch size, found by a process of its own, which may fail or take longer than the limit.

    Then what it found until then, and a line that says why. It ends where this function ends by an exception, too.
    """
    command = [sys.executable, __file__, "--peer", name, "--layers", str(layers)]
    command += [part for n, k in shapes for part in ("--linear", f"{n}x{k}")]
    command += [part for batch in batches for part in ("--batch", str(batch))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as child:
        try:
            found, errors = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            found, _ = child.communicate()
            errors = f"not done after {limit:g} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that compile for it
    if child.returncode:
        click.echo(f"{name}: not measured, or not all: {(errors.strip() or str(child.returncode)).splitlines()[-1]}")
    rows = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    return {row["batch"]: row["seconds"] for row in rows}


def parse_shape(_context: object, _option: object, values: tuple[str, ...]) -> list[Shape]:
    """Of 4096x11008: outputs and inputs."""
    shapes = [tuple(map(int, value.split("x"))) for value in values]
    return [(n, k) for n, k in shapes]


@click.command(help=__doc__.split("\n")[0])
@click.option("--peer", "name", type=click.Choice(list(PEERS)), required=True)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1])
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True)
@click.option("--linear", "shapes", multiple=True, required=True, metavar="NxK", callback=parse_shape)
def main(name: str, batches: tuple[int, ...], layers: int, shapes: list[Shape]) -> None:
    """Measure one peer."""
    if PEERS[name].gemlite:
        prepare_gemlite(name, shapes, batches)
    for batch in batches:
        print(json.dumps({"batch": batch, "seconds": graph_seconds(name, shapes, layers, batch)}), flush=True)


if __name__ == "__main__":
    main()
