"""How fast this GPU reads its memory, measured. Launches bandwidth.cu."""

from __future__ import annotations

import statistics

import cupy
import numpy as np

from rcprun.backends.cuda.launch import kernel, multiprocessors

_BYTES = 1 << 30


def read_bandwidth(repetitions: int = 9) -> float:
    """Bytes a second, median of a few reads of 1 GiB."""
    data, out = cupy.zeros(_BYTES // 16 * 4, dtype=np.uint32), cupy.zeros(1, dtype=np.uint32)
    seconds = []
    for _ in range(repetitions + 1):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel("bandwidth", "bandwidth").launch(multiprocessors() * 4, 512, (data, np.int64(_BYTES // 16), out))
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return float(_BYTES / statistics.median(seconds[1:]))
