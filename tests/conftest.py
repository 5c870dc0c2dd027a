"""Rules of a test session: workers share the cores, and a gpu-marked test without a GPU fails, never skips."""

import functools
import os
import signal

import pytest

# Read when numpy and torch are first imported, so it is set here, before any test module.
_CORES_PER_WORKER = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, str(_CORES_PER_WORKER))
# Tokenizers warn about, and may deadlock on, a fork after use.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def _missing_gpu() -> str | None:
    """Why CUDA tests cannot run here, or None."""
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except Exception as error:  # an absent package, driver or device: each is the answer
        return f"{type(error).__name__}: {error}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _missing_gpu()):
        pytest.fail(f'needs a CUDA device: {reason}. Deselect with -m "not gpu".', pytrace=False)
