"""The sweep over recipes: what it leaves, in one process or two, cut off and started again."""

import json
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rcpconv.config import build_config
from rcpconv.export import export
from rcpconv.runs import Run

BENCHMARKS = Path(__file__).parents[3] / "examples" / "benchmarks"
RECIPES = sorted((BENCHMARKS / "recipes").glob("*.toml"))
SETS = """
[base]
data = ["text"]
steps = 3
seq_len = 24
batch_size = 2
grad_accum = 1
device = "cpu"

[[set]]
name = "written"

[[set]]
name = "sampled"
data = ["self", "text"]

[[set]]
name = "wrong"
lr = -1.0
"""


def sweep(folder: Path, checkpoint: Path, text: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run the script; its output, and the results."""
    (folder / "sets.toml").write_text(SETS)
    command = [sys.executable, BENCHMARKS / "sweep_recipe.py", checkpoint, text, folder / "sets.toml", folder / "out"]
    command += ["--work", folder / "work", "--keep-back", 300, "--max-eval-tokens", 100, "--sampled-tokens", 60]
    path = os.pathsep.join(str(BENCHMARKS.parents[1] / part) for part in (".", "formats", "runtime"))
    environment = dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1")
    command += ["--self-tokens", 200, "--eval-text", text, *options]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads((folder / "out" / "sweep.json").read_text())


def test_a_sweep_measures_every_set_and_goes_on_where_it_stopped(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    output, done = sweep(tmp_path, checkpoint, text, "--only", "written")
    assert [row["name"] for row in done["sets"]] == ["written"]
    assert done["sets"][0]["perplexity"].keys() == done["original"].keys() == {"kept", "text", "sampled"}
    first = (tmp_path / "work" / "train.npy").stat().st_mtime_ns
    output, done = sweep(tmp_path, checkpoint, text, "--processes", "2")
    assert {row["name"] for row in done["sets"]} == {"written", "sampled"} and len(done["sets"]) == 2
    assert "wrong" in output and "failed: options: lr: expected more than 0" in output
    assert (tmp_path / "work" / "train.npy").stat().st_mtime_ns == first
    best = min(done["sets"], key=lambda row: row["perplexity"]["kept"])["name"]
    with tarfile.open(tmp_path / "out" / "best.tar") as archive:
        archive.extractall(tmp_path / "best", filter="data")
    assert export(Run.open(tmp_path / "best" / best), tmp_path / "best.rcp").nbytes > 0


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_sets_of_settings_are_valid(path: Path) -> None:
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    names = [given.pop("name") for given in recipe["set"]]
    assert len(names) == len(set(names)) and all(name.replace("-", "").replace(".", "").isalnum() for name in names)
    for given in recipe["set"]:
        build_config("model", None, recipe["base"] | given)
