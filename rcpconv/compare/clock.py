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
        self.longest: dict[str, float] = {}
        """Seconds of the longest cell so far, by kind."""
        self.short = False
        """Whether some cell was not begun, or not finished, for want of time."""

    def took(self, cell: Cell, seconds: float) -> None:
        """Learn from a cell that is done, now or in an earlier call."""
        self.longest[cell.kind] = max(seconds, self.longest.get(cell.kind, 0.0))

    def may(self, cell: Cell) -> bool:
        """Whether a cell would probably end in time: if it takes as long as the longest of its kind.

        Where none of its kind is done, it takes as long as the longest of the sweep for each token; the first of all is
        begun.
        """
        if self.end is None:
            return True
        c, seconds = self.comparison, self.longest.get(cell.kind)
        if seconds is None:
            seconds = self.longest.get(SWEEP, 0.0) * c.tokens / c.sweep_tokens
        in_time = time.monotonic() + seconds <= self.end
        self.short |= not in_time
        return in_time

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
