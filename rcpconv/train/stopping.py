"""Ctrl-C and SIGTERM: training ends its step, saves, and says where it was; everything else ends where it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rcpconv import distributed


class Interrupted(Exception):
    """The user asked to stop (Ctrl-C or SIGTERM); the text says where that was."""

    def __init__(self, where: str, signal_number: int) -> None:
        super().__init__(where)
        self.signal_number = signal_number


@contextmanager
def catching_signals() -> Iterator[Callable[[], int]]:
    """Collect Ctrl-C and SIGTERM; gives a function that says which has come to any process, or 0.

    A second one of either acts as ever, but not where several processes train: torchrun repeats to them what the
    terminal has sent already, and after a while kills them. One that does not end the block as Interrupted acts after
    it. Without effect outside the main thread.
    """
    caught: list[int] = []
    acted = False

    def stopped() -> int:
        return distributed.largest(caught[0] if caught else 0)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if distributed.processes() == 1:
            for each, handler in before.items():
                signal.signal(each, handler)

    for number in before:
        signal.signal(number, catch)
    try:
        yield stopped
    except Interrupted:
        acted = True
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught and not acted:
            signal.raise_signal(caught[0])


@contextmanager
def stoppable(tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupted, after `tell` has heard what happened, to say how to go on."""
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except Interrupted as stopped:
        tell(f"{stopped}; everything is saved")
        raise
    except KeyboardInterrupt:
        tell("Stopped")
        raise Interrupted("Stopped", caught[0] if caught else signal.SIGINT) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
