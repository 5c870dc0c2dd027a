"""Measures how often a scheduler of the GPU can issue an instruction, for those that the kernels are made of.

    python examples/benchmarks/issue_rates.py

Cycles for one warp instruction on one scheduler (a quarter of a multiprocessor), with one and with four warps each:
what a loop of such instructions costs at least. Dependent instructions come in eight independent chains.
"""

from __future__ import annotations

import cupy
import numpy as np

SOURCE = r"""
extern "C" __global__ void measure(unsigned* out, unsigned seed, int turns) {
    unsigned a[8];
    int c[8][4];
    for (int i = 0; i < 8; i++) {
        a[i] = seed * (threadIdx.x + i);
        for (int j = 0; j < 4; j++) c[i][j] = 0;
    }
    const long long start = clock64();
    for (int k = 0; k < turns; k++) {
#pragma unroll
        for (int i = 0; i < 8; i++) { INSTRUCTION }
    }
    const long long cycles = clock64() - start;
    unsigned sum = 0;
    for (int i = 0; i < 8; i++) {
        sum += a[i];
        for (int j = 0; j < 4; j++) sum += c[i][j];
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x == 0) out[gridDim.x * blockDim.x + blockIdx.x] = (unsigned)cycles;
}
"""
TURNS = 2000


def product(shape: str, types: str) -> str:
    """A matrix product whose operands are four, two and four registers."""
    sums = ", ".join(f'"+r"(c[i][{j}])' for j in range(4))
    return (
        f'asm volatile("mma.sync.aligned.{shape}.row.col.{types} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, '
        f'{{%0,%1,%2,%3}};" : {sums} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));'
    )


def chained(form: str) -> str:
    """An instruction on one register, which it reads and writes, and two others."""
    return f'asm volatile("{form}" : "+r"(a[i]) : "r"(seed), "r"(turns));'


INSTRUCTIONS = {
    "mma s8 m16n8k32": product("m16n8k32", "s32.s8.s8.s32"),
    "mma b1 m16n8k256": product("m16n8k256", "s32.b1.b1.s32.and.popc"),
    "prmt": chained("prmt.b32 %0, %0, 0, %1;"),
    "lop3": chained("lop3.b32 %0, %0, %1, %2, 0xca;"),
    "shf": chained("shf.r.wrap.b32 %0, %0, %1, 5;"),
    "mad": chained("mad.lo.u32 %0, %0, %1, %2;"),
    "dp2a": chained("dp2a.lo.s32.s32 %0, %1, %2, %0;"),
    "dp4a": chained("dp4a.s32.s32 %0, %1, %2, %0;"),
    "popc": chained("popc.b32 %0, %0;"),
    "ballot": "a[i] = __ballot_sync(~0u, a[i] & 1);",
    "fma f16x2": chained("fma.rn.f16x2 %0, %0, %1, %2;"),
}


def cycles(kernel: cupy.RawKernel, threads: int) -> float:
    """For one warp instruction on a scheduler, of `threads` to a block and a block to a multiprocessor."""
    blocks = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    out = cupy.zeros(blocks * (threads + 1), np.uint32)
    for _ in range(2):
        kernel((blocks,), (threads,), (out, np.uint32(12345), np.int32(TURNS)))
    return float(np.median(out[blocks * threads :].get())) / (TURNS * 8 * threads / 128)


def main() -> None:
    """Measure all, print a table."""
    print(f"{'instruction':18} {'1 warp':>8} {'4 warps':>8}")
    for name, text in INSTRUCTIONS.items():
        kernel = cupy.RawKernel(SOURCE.replace("INSTRUCTION", text), "measure")
        print(f"{name:18} {cycles(kernel, 128):8.2f} {cycles(kernel, 512):8.2f}")


if __name__ == "__main__":
    main()
