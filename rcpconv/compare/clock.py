"""How much time a comparison has: which cells are still begun, and when it stops. Knows nothing of what a cell is."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rcpconv.compare.plan import SWEEP, Cell, Comparison


class Clock:
    """Minutes that a comparison may take from now on; None = as many as it wants."""

    def __init__(self, minutes: float | None, comparison: Comparison) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.comparison = comparison
        self.seconds: dict[str, list[float]] = {}
        """Of every cell that is done, by kind, without those for rotations."""
        self.rotations: dict[str, float] = {}
        """The most that they took, by kind of cell; not every cell learns them."""
        self.begun = False
        self.short = False
        """Whether some cell was not begun, or not finished, for want of time."""

    def took(self, cell: Cell, seconds: float, rotations: float = 0.0) -> None:
        """Learn from a cell that is done, now or in an earlier call. rotations: how much of it these took."""
        self.seconds.setdefault(cell.kind, []).append(seconds - rotations)
        self.rotations[cell.kind] = max(rotations, self.rotations.get(cell.kind, 0.0))

    def may(self, cell: Cell) -> bool:
        """Whether a cell would probably end in time, and so may be begun; the first one always may."""
        if self.end is None or not self.begun:
            self.begun = True
            return True
        in_time = time.monotonic() + self.estimate(cell) <= self.end
        self.short |= not in_time
        return in_time

    def estimate(self, cell: Cell) -> float:
        """Seconds of the longest cell of this kind so far, rotations included.

        Where there is none, those of the shortest of the sweep for each token, and how much longer the longest took,
        for what depends on no tokens (compiling).
        """
        if cell.kind in self.seconds:
            return max(self.seconds[cell.kind]) + self.rotations[cell.kind]
        c, swept = self.comparison, self.seconds.get(SWEEP, [0.0])
        for_tokens = min(swept) + self.rotations.get(SWEEP, 0.0)
        return for_tokens * c.tokens / c.sweep_tokens + max(swept) - min(swept)

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Within, this process gets SIGTERM when the time is up. Without effect outside the main thread."""
        if self.end is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        timer = threading.Timer(max(0.0, self.end - time.monotonic()), self._ring)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _ring(self) -> None:
        self.short = True
        os.kill(os.getpid(), signal.SIGTERM)
