"""Ctrl-C and SIGTERM: told to what asks, and never lost."""

import os
import signal
from collections.abc import Iterator

import pytest

from rcpconv.errors import TrainingDiverged
from rcpconv.train.stopping import Interrupted, catching_signals


class Stopped(BaseException):
    """What the handler of before does."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[list[int]]:
    """Signals that acted as ever."""
    acted: list[int] = []

    def act(number: int, frame: object) -> None:
        acted.append(number)
        raise Stopped

    before = signal.signal(signal.SIGTERM, act)
    yield acted
    signal.signal(signal.SIGTERM, before)


def test_a_signal_is_told_and_acts_no_more_where_the_block_ends_for_it(handler: list[int]) -> None:
    with pytest.raises(Interrupted), catching_signals() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped() == signal.SIGTERM
        raise Interrupted("here", stopped())
    assert handler == []


def test_a_second_one_acts_as_ever(handler: list[int]) -> None:
    with pytest.raises(Stopped), catching_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert handler == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert handler[0] == signal.SIGTERM


def test_one_that_nobody_asked_for_acts_in_the_end(handler: list[int]) -> None:
    with pytest.raises(Stopped), catching_signals() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), signal.SIGTERM)
    assert handler == [signal.SIGTERM]


def test_one_before_an_error_acts_in_the_end(handler: list[int]) -> None:
    """Else a comparison would note the error, and begin the next training."""
    with pytest.raises(Stopped), catching_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        raise TrainingDiverged("step 1: the loss is not finite")
    assert handler == [signal.SIGTERM]
