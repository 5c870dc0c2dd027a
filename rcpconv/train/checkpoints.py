"""Training checkpoints in a run folder: written whole or not at all, newest last. Knows nothing of what is in them.

One process writes a file. Several write a folder, each its own parts (torch.distributed.checkpoint). Any number of
processes can go on from either. What all processes share has one file, whatever their number (StateFile).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor

from rcpconv import distributed
from rcpconv.errors import BadRun, NotSaved
from rcpconv.runs import CHECKPOINTS, Run, replacing, saving, sync_folder, unfinished


def _paths(run: Run) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted((run.folder / CHECKPOINTS).glob("step-*"))


def save(run: Run, step: int, state: dict[str, Any], keep: int) -> None:
    """Write the state after `step` steps, then delete all but the `keep` newest checkpoints."""
    path = run.folder / CHECKPOINTS / f"step-{step:07d}.pt"
    if distributed.processes() > 1:
        path = path.with_suffix("")
    remedy = f"The checkpoint before it is intact: continue with rcpconv quantize --resume {run.folder}"
    with _saying(path, remedy):
        if distributed.processes() > 1:
            _save_parts(path, state)
        else:
            _write(path, state)
    if not distributed.rank():
        for old in _paths(run)[:-keep]:
            _delete(old)


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A state that all processes share, in one file, which the first of them writes and all can go on from."""

    path: Path
    how: str
    """What goes on from it: "rcpconv quantize --resume FOLDER"."""

    def save(self, state: dict[str, Any]) -> None:
        """Write it, instead of the one before. Raises NotSaved."""
        with _saying(self.path, f"What was saved before, if anything, is intact: continue with {self.how}"):
            _write(self.path, state)

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None where there is nothing, by the first process's word. Raises BadRun when damaged."""
        there = distributed.from_first(self.path.exists())
        return _read(self.path, self.remedy) if there else None

    def delete(self) -> None:
        """Remove it, where it is of no more use, and what a kill left of one."""
        for path in (self.path, unfinished(self.path)):
            path.unlink(missing_ok=True)

    @property
    def remedy(self) -> str:
        """For what cannot be used."""
        return f"delete it to begin anew with {self.how}"


def _write(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary, _without_checksums():
        torch.save(state, temporary)


@contextmanager
def _saying(path: Path, remedy: str) -> Iterator[None]:
    """Within, an error in writing the file says what to do."""
    try:
        yield
    except (NotSaved, RuntimeError, CheckpointException) as error:  # torch turns a full disk into a RuntimeError
        reason = _reason(error)
        if not isinstance(error, NotSaved):
            reason = f"{path}: cannot be written ({reason})"
        raise NotSaved(f"{reason}. {remedy}") from error


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Within, torch.save computes none, which more than doubles its speed; torch.load with mmap would read none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _save_parts(path: Path, state: dict[str, Any]) -> None:
    """Every process writes what it has into a folder beside `path`, which then becomes `path`."""
    temporary = unfinished(path)
    if not distributed.rank():
        with saving(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    distributed.wait_for_all()
    state_dict_saver.save(state, checkpoint_id=temporary)
    if not distributed.rank():
        with saving(path):
            temporary.rename(path)
            sync_folder(path.parent)


def newest(run: Run) -> Path | None:
    """The newest checkpoint, if there is one."""
    paths = _paths(run)
    return paths[-1] if paths else None


def load(path: Path, like: Callable[[Collection[str]], dict[str, Any]]) -> dict[str, Any]:
    """The state in a checkpoint; of tensors that processes have parts of, those parts. Raises BadRun when damaged.

    like: gives a state of the same form; its argument are the keys of what is not None. Its tensors may be overwritten,
    and it may have tensors that the checkpoint has not: those are left out.
    """
    if path.is_dir():
        names = _names(path)
        target: dict[str, Any] = _held(like({name.partition(".")[0] for name in names if "." in name}), names)
        with _reading(path):
            state_dict_loader.load(target, checkpoint_id=path, no_dist=distributed.processes() == 1)
        return target
    state = _read(path)
    if distributed.processes() == 1:
        return state
    target = like({key for key, value in state.items() if value is not None})
    with _reading(path):
        return _parts(state, target)  # type: ignore[no-any-return]


_UNREADABLE = (OSError, RuntimeError, ValueError, CheckpointException)
_REMEDY = "delete it to resume from the one before"


@contextmanager
def _reading(
    path: Path, remedy: str = _REMEDY, errors: tuple[type[BaseException], ...] = _UNREADABLE
) -> Iterator[None]:
    """Within, an error of these means that the checkpoint is damaged."""
    try:
        yield
    except errors as error:
        raise BadRun(f"{path}: cannot be read ({_reason(error)}); {remedy}") from error


def _read(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Of a file, on the CPU."""
    with _reading(path, remedy):
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state


def _names(path: Path) -> set[str]:
    """Of all values in a folder: their keys from the outermost one on, with dots between."""
    with _reading(path, errors=(Exception,)):  # it is a pickle, and damaged ones end in errors of any kind
        return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def _held(state: Any, names: set[str], prefix: str = "") -> Any:
    """Without tensors that are not among the names: parameters that learn late have no optimizer states until then."""
    if not isinstance(state, dict):
        return state
    return {
        key: _held(value, names, f"{prefix}{key}.")
        for key, value in state.items()
        if not isinstance(value, Tensor) or f"{prefix}{key}" in names
    }


def _reason(error: BaseException) -> str:
    """In a line; of several processes' errors the first one."""
    if isinstance(error, CheckpointException):
        number, (error, _) = next(iter(error.failures.items()))
        return f"process {number}: {_reason(error)}"
    return str(error).partition("\n")[0]


@torch.no_grad()
def _parts(state: Any, like: Any) -> Any:
    """This process's parts of whole tensors, where `like` has parts, which are overwritten: no whole one stays."""
    if isinstance(state, dict):
        return {key: _parts(value, like.get(key)) if isinstance(like, dict) else value for key, value in state.items()}
    if isinstance(state, list) and isinstance(like, list) and len(state) == len(like):
        return [_parts(value, part) for value, part in zip(state, like, strict=True)]
    if isinstance(state, Tensor) and isinstance(like, DTensor):
        value = state.to(like.device)
        return like.copy_(distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None))
    return state


def delete_all(run: Run) -> None:
    """Remove the checkpoints of a finished run."""
    for path in _paths(run):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
