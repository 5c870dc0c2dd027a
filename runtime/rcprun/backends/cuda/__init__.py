"""The CUDA backend: CuPy kernels on one NVIDIA GPU of compute capability 8.0 or newer."""

from __future__ import annotations

from rcpformat.reader import RcpFile
from rcprun.backends import Backend
from rcprun.errors import BackendUnavailable

OLDEST = 80
"""Compute capability, times ten."""


def why_unavailable() -> str | None:
    """Why this backend cannot run here, with the remedy; None when it can."""
    try:
        import cuda.bindings.nvrtc  # noqa: F401
        import cupy
        import cupy_backends.cuda.libs.cublas  # noqa: F401

        from rcprun.backends.cuda.compile import compiler_version

        compiler_version()
    except (ImportError, RuntimeError) as error:  # RuntimeError: a package is there, its library is not
        reason = str(error).partition("\n")[0]
        return f"{reason}; install the runtime with its GPU parts: pip install 'rcpconv[cuda]', or use --backend numpy"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no GPU here ({error}); use --backend numpy"
    if not count:
        return "CUDA finds no GPU here; use --backend numpy"
    found = int(cupy.cuda.Device().compute_capability)
    if found < OLDEST:
        return f"the GPU has compute capability {found / 10}, expected {OLDEST / 10} or newer; use --backend numpy"
    return None


def create(file: RcpFile, context: int, streams: int) -> Backend:
    """The backend for a file. Raises BackendUnavailable, BadRequest or OutOfMemory."""
    reason = why_unavailable()
    if reason:
        raise BackendUnavailable(f"backend cuda: {reason}")
    from rcprun.backends.cuda.backend import CudaBackend

    return CudaBackend(file, context, streams)
