"""Training checkpoints in a run folder: written whole or not at all, newest last. Knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rcpconv.errors import BadRun, NotSaved
from rcpconv.runs import Run, replacing

_FOLDER = "checkpoints"


def _paths(run: Run) -> list[Path]:
    """Checkpoints by step, oldest first."""
    return sorted((run.folder / _FOLDER).glob("step-*.pt"))


def save(run: Run, step: int, state: dict[str, Any], keep: int) -> None:
    """Write the state after `step` steps, then delete all but the `keep` newest checkpoints."""
    path = run.folder / _FOLDER / f"step-{step:07d}.pt"
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (NotSaved, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        reason = (
            str(error).partition("\n")[0] if isinstance(error, NotSaved) else f"{path}: cannot be written ({error})"
        )
        raise NotSaved(
            f"{reason}. The checkpoint before it is intact: continue with rcpconv quantize --resume {run.folder}"
        ) from error
    for old in _paths(run)[:-keep]:
        old.unlink()


def newest(run: Run) -> dict[str, Any] | None:
    """The state of the newest checkpoint, on the CPU; None when there is none. Raises BadRun when it is damaged."""
    paths = _paths(run)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadRun(f"{paths[-1]}: cannot be read ({reason}); delete it to resume from the one before") from error


def delete_all(run: Run) -> None:
    """Remove the checkpoints of a finished run."""
    for path in _paths(run):
        path.unlink()
