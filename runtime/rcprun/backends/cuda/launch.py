"""Kernels as Python sees them: loaded through CuPy, launched with checked arguments. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import cupy
import numpy as np
from cuda.bindings import driver

from rcprun.backends.cuda.compile import cubin_file

NO_HOPPER = "RCP_NO_HOPPER"
"""Defined as 1, a kernel takes its path for older GPUs on a newer one too."""

PORTABLE_CLUSTER = 8
"""Blocks of a cluster that any GPU with clusters can run; of more, see Kernel.fits."""

_SCALARS: dict[type, Any] = {
    np.int32: ctypes.c_int32,
    np.uint32: ctypes.c_uint32,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.float32: ctypes.c_float,
}
_DEFAULT_SHARED = 48 * 1024
_may_overlap: ContextVar[bool] = ContextVar("_may_overlap", default=True)


@contextmanager
def serialized() -> Iterator[None]:
    """Kernels launched within start when the one before has ended, whatever their launch says: to time them one by one,
    and for tools that slow them down."""
    token = _may_overlap.set(False)
    try:
        yield
    finally:
        _may_overlap.reset(token)


def check(array: cupy.ndarray, name: str, dtype: Any, shape: tuple[int | None, ...]) -> cupy.ndarray:
    """The array; an AssertionError where it is not what a kernel takes. None in `shape` stands for any length."""
    assert array.dtype == dtype, f"{name}: expected {np.dtype(dtype)}, found {array.dtype}"
    same = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    assert same, f"{name}: expected shape {shape}, found {array.shape}"
    assert array.flags.c_contiguous, f"{name}: not contiguous"
    assert array.device.id == cupy.cuda.runtime.getDevice(), f"{name}: on GPU {array.device.id}"
    return array


class Kernel:
    """One kernel of one `.cu` file, compiled with some definitions for the current GPU."""

    def __init__(self, file: str, name: str, **defines: int) -> None:
        arch = int(cupy.cuda.Device().compute_capability)
        self._module = cupy.RawModule(path=str(cubin_file(file, arch, defines)))
        self._function = self._module.get_function(name)
        self._function.preferred_shared_memory_carveout = 100  # one for all: another costs a launch about 4 µs
        self._handle = driver.CUfunction(self._function.kernel.ptr)
        self._large_clusters = False
        self._hopper = arch >= 90 and not defines.get(NO_HOPPER)

    def launch(
        self,
        grid: tuple[int, int, int] | int,
        block: int,
        arguments: Sequence[Any],
        *,
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Launch on CuPy's current stream. arguments: CuPy arrays, None for a null pointer, NumPy scalars.

        shared: bytes of dynamic shared memory. cluster: blocks along x that share it (sm_90 and newer).
        overlap: programmatic dependent launch, where there is one; the kernel must then wait (pdl_wait) before it
        touches what earlier kernels write or read.
        """
        config = self._config(grid, block, shared, cluster, overlap)
        values, types = [], []
        for argument in arguments:
            if argument is None or isinstance(argument, cupy.ndarray):
                values.append(0 if argument is None else argument.data.ptr)
                types.append(ctypes.c_void_p)
            else:
                values.append(argument.item())
                types.append(_SCALARS[type(argument)])
        (status,) = driver.cuLaunchKernelEx(config, self._handle, (tuple(values), tuple(types)), 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self._function.name}: launch of {grid} × {block} failed: {status!r}")

    def fits(self, block: int, shared: int, cluster: int) -> bool:
        """Whether the GPU can run such a cluster: arguments as of launch."""
        config = self._config(cluster, block, shared, cluster, overlap=False)
        status, clusters = driver.cuOccupancyMaxActiveClusters(self._handle, config)
        return bool(status == driver.CUresult.CUDA_SUCCESS and clusters > 0)

    def _config(
        self, grid: tuple[int, int, int] | int, block: int, shared: int, cluster: int, overlap: bool
    ) -> driver.CUlaunchConfig:
        """For a launch on CuPy's current stream, which the function's attributes then allow."""
        if shared > _DEFAULT_SHARED and self._function.max_dynamic_shared_size_bytes < shared:
            self._function.max_dynamic_shared_size_bytes = shared
        if cluster > PORTABLE_CLUSTER and not self._large_clusters:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            (status,) = driver.cuFuncSetAttribute(self._handle, attribute, 1)
            self._large_clusters = status == driver.CUresult.CUDA_SUCCESS
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (grid, 1, 1) if isinstance(grid, int) else grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(cupy.cuda.get_current_stream().ptr)
        attributes = []
        if overlap and self._hopper and _may_overlap.get():
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


@cache
def kernel(file: str, name: str, defines: tuple[tuple[str, int], ...] = ()) -> Kernel:
    """The kernel, compiled and loaded once a process."""
    return Kernel(file, name, **dict(defines))


@cache
def has_hopper() -> bool:
    """Whether the current GPU has what sm_90 brought: kernels take that way unless NO_HOPPER is defined."""
    return int(cupy.cuda.Device().compute_capability) >= 90


@cache
def multiprocessors() -> int:
    """Of the current GPU."""
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])
