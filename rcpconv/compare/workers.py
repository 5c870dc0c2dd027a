"""Cells in this process, or in several side by side, which take the GPUs in turn. Knows nothing of cells' insides."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from rcpconv.compare.folder import Result
from rcpconv.compare.plan import Cell
from rcpconv.errors import ConversionError

_SECONDS_TO_SAVE = 120
"""That a worker has to leave a checkpoint when the comparison is stopped."""


class Does(Protocol):
    """What does a cell."""

    def do(self, cell: Cell) -> Result:
        """Train, measure, save."""


May = Callable[[Cell], bool]
"""Whether there is time for a cell; asked just before it would be begun."""


class Alone:
    """This process does the cells."""

    def __init__(self, workshop: Does) -> None:
        self._workshop = workshop

    def each(self, cells: Sequence[Cell], may: May = lambda cell: True) -> Iterator[tuple[Cell, Result]]:
        """Every cell that may be begun with its result, when it is done."""
        for cell in cells:
            if may(cell):
                yield cell, self._workshop.do(cell)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    variants: set[str] = field(default_factory=set)
    """Those that it has compiled."""
    cell: Cell | None = None


class SideBySide:
    """Several processes do the cells; each takes variants that it has compiled before, as long as there are any."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers

    def each(self, cells: Sequence[Cell], may: May = lambda cell: True) -> Iterator[tuple[Cell, Result]]:
        """As Alone.each. Raises what a worker raised; ConversionError where one died."""
        left = list(cells)
        for worker in self._workers:
            self._give(worker, left, may)
        while busy := {worker.pipe: worker for worker in self._workers if worker.cell is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                cell, worker.cell = worker.cell, None
                assert cell is not None
                try:
                    answer = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    raise ConversionError(
                        f"{cell.name}: the process that trained it ended ({worker.process.exitcode}); give the same "
                        "command again to go on, with fewer --jobs if memory was short"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                self._give(worker, left, may)
                yield cell, answer

    def _give(self, worker: _Worker, left: list[Cell], may: May) -> None:
        left[:] = filter(may, left)
        if not left:
            return
        taken = set().union(*(other.variants for other in self._workers))
        cell = next(
            (c for c in left if c.variant in worker.variants),
            next((c for c in left if c.variant not in taken), left[0]),
        )
        left.remove(cell)
        worker.cell = cell
        worker.variants.add(cell.variant)
        worker.pipe.send(cell)


@contextmanager
def side_by_side(
    jobs: int, make: Callable[..., Does], arguments: dict[str, Any], gpus: Sequence[str] = ()
) -> Iterator[SideBySide]:
    """Processes that do cells, until the block ends; then they save what they are at, and end.

    make(**arguments) makes what does cells in a process; both are pickled. gpus: what CUDA_VISIBLE_DEVICES is in the
    processes, in turn; none = as it is here.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    for i in range(jobs):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, make, arguments, gpus[i % len(gpus)] if gpus else None))
        process.start()
        theirs.close()
        workers.append(_Worker(process=process, pipe=ours))
    try:
        yield SideBySide(workers)
    finally:
        for worker in workers:
            worker.pipe.close()  # an idle one ends
            if worker.cell is not None:
                worker.process.terminate()  # a busy one saves, and ends
        for worker in workers:
            worker.process.join(_SECONDS_TO_SAVE)
            if worker.process.exitcode is None:
                worker.process.kill()


def _work(pipe: Connection, make: Callable[..., Does], arguments: dict[str, Any], gpu: str | None) -> None:
    """What a worker does: cells, until there are no more. gpu: the only one that it sees."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used, which is below
    from rcpconv.train.stopping import Interrupted

    os.setsid()  # Ctrl-C is the first process's to answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workshop = make(**arguments)
    try:
        while True:
            cell = pipe.recv()
            try:
                answer: Result | Exception = workshop.do(cell)
            except ConversionError as error:
                answer = error
            pipe.send(answer)
    except (EOFError, BrokenPipeError, Interrupted):
        pass
