"""The folder of a comparison: its plan, and a result for each cell that is done. Knows nothing of training.

plan.json             what is compared
results/<cell>.json   of finished cells, each written whole or not at all
runs/<cell>/          run folders of unfinished cells, and those that are kept
tokens.npy            the training texts, the validation part first
validation.txt        that part, to read
self.npy              text sampled from the model, where there is other text too
rotations/            learned rotations, or that they diverge, for all trainings whose settings give the same
compare.md, compare.json, compare.png

The folder may be moved, also to another machine. tokens.npy, validation.txt, rotations and run folders may be left
behind: the first three are made again, and unfinished trainings begin anew. Where rates come to the grid, results and
run folders of finals at those that were best before stay, and are not in the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcpconv.compare.plan import Cell, Comparison, differences
from rcpconv.errors import BadRun
from rcpconv.runs import held, require_free, saving, write_json

PLAN, TOKENS, SAMPLED, VALIDATION = "plan.json", "tokens.npy", "self.npy", "validation.txt"
MARKDOWN, JSON, PLOT = "compare.md", "compare.json", "compare.png"
_RESULTS, _RUNS, _ROTATIONS = "results", "runs", "rotations"
_ASKED, _SHAPE = "comparison", "shape"

Result = dict[str, Any]


class Folder:
    """One comparison's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.path / name

    def run(self, cell: Cell) -> Path:
        """Where a cell's run folder is."""
        return self.path / _RUNS / cell.name

    def rotations(self, settings: Mapping[str, Any]) -> Path:
        """The path of what is learned with these settings, of a folder that is there."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.path / _ROTATIONS
        with saving(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{digest}.safetensors"

    def result(self, cell: Cell) -> Result | None:
        """What was measured for a cell; None before. Raises BadRun when the file is damaged."""
        path = self.path / _RESULTS / f"{cell.name}.json"
        return _read(path) if path.exists() else None

    def save(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Write what was measured for a cell: it is done."""
        write_json(self.path / _RESULTS / f"{cell.name}.json", result)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadRun(f"{path}: cannot be read ({error}); delete it, and the same command makes it anew") from error
    if not isinstance(value, dict):
        raise BadRun(f"{path}: expected a JSON object; delete it, and the same command makes it anew")
    return value


def shape_of(path: Path, comparison: Comparison) -> dict[str, int] | None:
    """The shape of steps that the comparison in this folder was begun with; None where there is no folder yet.

    Raises BadRun when the folder is of another comparison, or of something else.
    """
    if not os.path.lexists(path):
        return None
    if not (path / PLAN).is_file():
        if path.is_dir() and not any(path.iterdir()):
            return None
        raise BadRun(f"{path}: already there, and not of a comparison (no {PLAN}); choose another --out")
    plan = _read(path / PLAN)
    if not {_ASKED, _SHAPE} <= plan.keys():
        raise BadRun(f"{path / PLAN}: not a plan of this version; choose another --out")
    if not _begun(path):
        return None
    if found := differences(plan[_ASKED], comparison.to_json()):
        raise BadRun(
            f"{path}: holds another comparison: {'; '.join(found)}. Choose another --out, repeat the command that "
            "began it, or give a changed variant another name"
        )
    return dict(plan[_SHAPE])


def _begun(path: Path) -> bool:
    """Whether there is a result, or a training that could go on."""
    return any((path / _RESULTS).glob("*.json")) or any((path / _RUNS).glob("*"))


@contextmanager
def opened(path: Path, comparison: Comparison, shape: Mapping[str, int]) -> Iterator[Folder]:
    """The comparison's folder, new or to be continued, held for this process."""
    if not os.path.lexists(path):
        require_free(path)
    with saving(path, "choose another --out"):
        for folder in (path, path / _RESULTS, path / _RUNS):
            folder.mkdir(parents=True, exist_ok=True)
    with held(path, path):
        if not _begun(path):  # what a comparison left that found no beginning is of no use to this one
            for name in (PLAN, TOKENS, SAMPLED, VALIDATION):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / _ROTATIONS, ignore_errors=True)
        before = _read(path / PLAN)[_ASKED]["variants"] if (path / PLAN).exists() else {}
        asked = comparison.to_json()
        asked["variants"] = before | asked["variants"]  # results of all that ever were compared here stay
        write_json(path / PLAN, {_ASKED: asked, _SHAPE: dict(shape)})
        yield Folder(path)
