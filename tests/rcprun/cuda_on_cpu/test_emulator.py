"""The CPU's stand-in for a GPU notices what kernels may not do, and leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.rcprun.cuda_on_cpu import emulator
from tests.rcprun.cuda_on_cpu.emulator import GXX, Emulator, Kernel, empty, full

pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is not on PATH")

THREADS = 64
KERNEL = """#include "ptx.cuh"
extern "C" __global__ void sum_of_block(const int* x, int* out, int error) {
    extern __shared__ __align__(16) int memory[];
    __shared__ int total[2];
    const int i = threadIdx.x;
    if (i < 2) total[i] = 0;
    if (error != 1) __syncthreads();
    atomicAdd(total + i / 32, x[error == 2 ? i + 4 : i]);
    if (error == 3) memory[blockDim.x] = 0;
    if (error == 4) *out = (int)load4(shared_address(memory) + 4).x;
    if (error == 5) i == 40 ? __syncwarp() : (void)__any_sync(0xffffffffu, 1);
    if (error == 6 && i == 7) return __syncwarp();
    if (error == 7) total[i] = i;
    if (error == 8) copy_async(shared_address(memory + 4 * (i % 16)), x + 4 * (i % 16)), commit_copies();
    __syncthreads();
    if (error == 8 && i == 0) total[0] = memory[0], total[1] = 0;
    if (i == 0) *out = total[0] + total[1];
}
"""
ERRORS = {
    2: "memory that is not an argument's",
    3: "dynamic shared memory is written at byte 256 of 256",
    4: "misaligned",
    5: "in __syncwarp, while other lanes are in __ballot_sync|in __ballot_sync, while other lanes are in __syncwarp",
    6: "all threads wait",
    7: "an index beyond an array",
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "types.cuh").write_text((emulator.KERNELS / "types.cuh").read_text())
    (folder / "sum.cu").write_text(KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "KERNELS", folder)
        yield Kernel(Emulator(folder), "sum", "sum_of_block")


def run(kernel: Kernel, error: int) -> list[int]:
    """The sum of 0 to 63, forwards and backwards."""
    x, out = empty(THREADS, np.int32), full(1, -1, np.int32)
    x[:] = np.arange(THREADS)
    found = []
    for _ in range(2):
        kernel.launch(1, THREADS, (x, out, np.int32(error)), shared=4 * THREADS)
        found += out.get().tolist()
    return found


def test_a_right_kernel(kernel: Kernel) -> None:
    assert run(kernel, 0) == [2016, 2016]


def test_a_missing_barrier_shows(kernel: Kernel) -> None:
    assert run(kernel, 1) != [2016, 2016]


def test_a_copy_that_is_not_waited_for_shows(kernel: Kernel) -> None:
    assert sorted(value == 0 for value in run(kernel, 8)) == [False, True]


@pytest.mark.parametrize("error", ERRORS)
def test_what_no_kernel_may_do_fails(kernel: Kernel, error: int) -> None:
    with pytest.raises(AssertionError, match=ERRORS[error]):
        run(kernel, error)
    assert run(kernel, 0) == [2016, 2016]


def test_arguments_are_of_the_parameters_types(kernel: Kernel) -> None:
    out = empty(1, np.int32)
    with pytest.raises(AssertionError, match="takes PPi, got PPf"):
        kernel.launch(1, THREADS, (None, out, np.float32(0)))
    with pytest.raises(AssertionError, match="takes PPi, got PP"):
        kernel.launch(1, THREADS, (None, out))


def test_all_is_as_it_was_before(tmp_path: Path) -> None:
    import rcprun.backends.cuda as package
    from rcprun.backends.cuda import compile as door

    before, names = dict(sys.modules), dict(vars(package))
    with emulator.installed(tmp_path):
        from rcprun.backends.cuda import linear, variants  # noqa: F401

        assert vars(package)["linear"] is linear
    assert {name: module for name, module in sys.modules.items() if name in before} == before
    assert not {name for name in sys.modules.keys() - before.keys() if "cupy" in name or name.startswith("rcprun")}
    assert vars(package) == names
    assert sys.modules["rcprun.backends.cuda.compile"] is door
