"""Training in several processes, over gloo on the CPU: as in one, also when they die."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rcpconv import distributed
from rcpconv.errors import BadOption, ProcessDied
from rcpconv.export import export
from rcpconv.quantize import quantize
from rcpconv.runs import FINISHED, RUNNING, Run
from rcpconv.train.loop import Interrupted
from rcpconv.train.progress import read_metrics

SETTINGS: dict[str, Any] = {
    "seq_len": 24,
    "batch_size": 2,
    "grad_accum": 2,
    "steps": 6,
    "lr": 1e-3,
    "log_every": 1,
    "checkpoint_every": 3,
    "device": "cpu",
}
OTHERWISE: dict[str, Any] = {
    "batch_size": 4,
    "grad_accum": 1,
    "tables": "two",
    "optimizer": "muon",
    "ema": 0.9,
    "hidden_loss": 1.0,
    "start": "feedback",
    "weight_range": "fixed",
    "lr_scale": "relative",
    "grad_checkpointing": "on",
}


def forked(action: Callable[[], Any], log: Path, **variables: str) -> int:
    """The id of a child process that does it. Forking saves the import of torch, which takes seconds."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(variables)
        with log.open("a", buffering=1) as output, redirect_stdout(output), redirect_stderr(output):
            try:
                action()
                code = 0
            except Interrupted:
                code = 3
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                raise
    finally:
        os._exit(code)


def together(count: int, action: Callable[[], Any], log: Path) -> list[int]:
    """Exit codes of as many processes as one training, each doing it."""

    def member() -> None:
        with distributed.joined():
            action()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    children = [forked(member, log, RANK=str(i), LOCAL_RANK=str(i), **where) for i in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def losses(folder: Path) -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") for key in ("loss", "kl", "grad_norm")]


@pytest.fixture
def train(checkpoint: Path, text: Path, tmp_path: Path) -> Callable[..., None]:
    def train(count: int, name: str, **settings: Any) -> None:
        folder = tmp_path / name

        def action() -> None:
            resume = str(folder) if folder.exists() else None
            quantize(
                None if resume else str(checkpoint),
                settings if resume else SETTINGS | {"data": (str(text),)} | settings,
                out=None if resume else folder,
                resume=resume,
                runs=tmp_path,
                console=Console(),
            )

        log = tmp_path / f"{name}.log"
        codes = together(count, action, log)
        assert codes in ([0] * count, [3] * count), log.read_text()

    return train


@pytest.mark.parametrize("settings", [{"eval_every": 4}, OTHERWISE], ids=["plain", "otherwise"])
def test_two_processes_find_the_losses_of_one(
    train: Callable[..., None], text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = settings | {"eval_data": str(text), "max_eval_tokens": 200}
    train(1, "one", **settings)
    train(2, "two", **settings)
    one, two = Run.open(tmp_path / "one"), Run.open(tmp_path / "two")
    assert losses(two.folder) == pytest.approx(losses(one.folder), rel=2e-3)
    assert two.status == FINISHED
    assert two.evaluation["perplexity"] == pytest.approx(one.evaluation["perplexity"], rel=2e-3)
    assert export(two, tmp_path / "two.rcp").nbytes == export(one, tmp_path / "one.rcp").nbytes
    log = (tmp_path / "two.log").read_text()
    assert log.count("step 6/6") == 1 and log.count("Finished") == 1


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "optimizer": "muon"}], ids=["adamw", "muon"])
def test_another_number_of_processes_goes_on(
    train: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: tuple[int, int],
    settings: dict[str, Any],
) -> None:
    train(1, "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("rcpconv.train.loop.rate_factor", stop_at(3))
        train(counts[0], "moved", **settings)
    folder = tmp_path / "moved"
    assert Run.open(folder).status == RUNNING and len(losses(folder)) == 3 * 4
    assert [path.is_dir() for path in (folder / "checkpoints").iterdir()] == [counts[0] > 1] * 2
    train(counts[1], "moved")
    assert Run.open(folder).status == FINISHED and not list((folder / "checkpoints").iterdir())
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)


def stop_at(step: int) -> Callable[..., float]:
    """rate_factor that asks the last process to stop in this step, 0-based."""
    from rcpconv.train.optimizer import rate_factor

    def factor(at: int, *rest: Any) -> float:
        if at == step and distributed.rank() == distributed.processes() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate_factor(at, *rest)

    return factor


def test_sequences_are_divided_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += distributed.own_sequences(100, 4, 6)
    assert [count for _, count in found] == [4] * 6
    assert [start for start, _ in found] == list(range(100, 124, 4))
    assert distributed.own_sequences(0, 2, 3) == [(4, 2)]
    assert distributed.own_sequences(0, 5, 3) == [(10, 5)]
    with pytest.raises(BadOption, match="3 processes"):
        distributed.own_sequences(0, 4, 2)


def test_a_killed_process_ends_the_job_and_is_named(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def member() -> None:
        with distributed.joined():
            quantize(str(checkpoint), SETTINGS | {"data": (str(text),)}, out=tmp_path / "run", console=Console())

    def job() -> None:
        def factor(*_: Any) -> float:
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rcpconv.train.loop.rate_factor", factor)
            distributed.launch(2, member, start_method="fork")

    start = time.monotonic()
    child = forked(job, tmp_path / "log")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99
    said = (tmp_path / "log").read_text()
    assert f"{ProcessDied.__name__}: process 1 of 2 was ended by SIGKILL" in said, said
    assert time.monotonic() - start < 60
