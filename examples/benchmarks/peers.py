"""Other people's linear layers, for bench_linear.py: cuBLAS in float16, torch's int4, GemLite's 2 and 4 bits.

Each peer makes a layer of random weights and gives a function of x (batch, in_features) on the GPU. Needs torch, and
GemLite where it is to be measured. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 128
Linear = Callable[[Tensor], Tensor]


def float16(n: int, k: int) -> Linear:
    """A matrix product by cuBLAS."""
    weight_NK = torch.randn(n, k, dtype=torch.float16, device="cuda") / k**0.5
    return lambda x: torch.nn.functional.linear(x.half(), weight_NK)


def torch_int4(n: int, k: int) -> Linear:
    """torch's weight-only int4 kernel for bfloat16 activations; k is rounded up to a multiple of 1,024 as it asks."""
    k = -(-k // 1024) * 1024
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales_and_zeros = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")

    def run(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, k - x.shape[1]))
        return torch.ops.aten._weight_int4pack_mm(x.bfloat16(), weight, GROUP, scales_and_zeros)

    return run


def gemlite(bits: int) -> Callable[[int, int], Linear]:
    """GemLite's Triton kernels for float16 activations."""

    def make(n: int, k: int) -> Linear:
        from gemlite.helper import A16Wn

        codes_NK = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        scales, zeros = (torch.rand(n, k // GROUP, dtype=torch.float16, device="cuda") for _ in range(2))
        layer = A16Wn(device="cuda:0", dtype=torch.float16).from_weights(codes_NK, scales, zeros, bits, GROUP)
        return lambda x: layer(x.half())

    return make


PEERS: dict[str, Callable[[int, int], Linear]] = {
    "torch float16": float16,
    "torch int4": torch_int4,
    "GemLite 4-bit": gemlite(4),
    "GemLite 2-bit": gemlite(2),
}


def graph_seconds(make: Callable[[int, int], Linear], shapes: list[tuple[int, int]], layers: int, batch: int) -> float:
    """Median time of one CUDA graph of `layers` times all shapes (n, k), over weights that exceed any L2."""
    distinct = 8
    weights = [[make(n, k) for n, k in shapes] for _ in range(distinct)]
    inputs = [torch.randn(batch, k, device="cuda", dtype=torch.float16) for _, k in shapes]

    def run() -> None:
        for layer in range(layers):
            for linear, x in zip(weights[layer % distinct], inputs, strict=True):
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
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[3:])[10]
