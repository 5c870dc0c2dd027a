"""Run folders: whole or not there, held by one process, found by time."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcpconv import runs
from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadRun, RunNotFound
from rcpconv.runs import FAILED, FINISHED, RUNNING, Run
from tiny_runs import make_tiny_run


def make(folder: Path, status: str, created: str = "2026-01-01", finished: str | None = None) -> Path:
    record = {"status": status, "created": created, "finished": finished, "model": "m"}
    with runs.created(folder, record, QuantizeConfig(model="m").to_toml(), b"{}"):
        pass
    return folder


def test_newest_by_time_of_finish_or_of_creation(tmp_path: Path) -> None:
    make(tmp_path / "a", FINISHED, created="2026-01-01", finished="2026-01-05")
    make(tmp_path / "b", FINISHED, created="2026-01-02", finished="2026-01-03")
    make(tmp_path / "c", RUNNING, created="2026-01-03")
    make(tmp_path / "d", RUNNING, created="2026-01-02")
    make(tmp_path / "e", FAILED, created="2026-01-09")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert runs.newest_finished(tmp_path).name == "a"
    assert runs.newest_unfinished(tmp_path).name == "c"


def test_nothing_found(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a", RUNNING)
    with pytest.raises(RunNotFound, match=r"no finished run in it \(of 1 runs\); RCPCONV_RUNS or --runs"):
        runs.newest_finished(tmp_path / "runs")
    with pytest.raises(RunNotFound, match=r"no unfinished run in it \(of 0 runs\)"):
        runs.newest_unfinished(tmp_path / "nowhere")
    with pytest.raises(RunNotFound, match=r"expected a run folder, found no run\.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"status": "odd"}', "\x00"])
def test_damaged_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(BadRun, match=r"run\.json"):
        Run.open(tmp_path)


def test_where_runs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(runs.RUNS_VARIABLE, raising=False)
    assert runs.runs_root() == Path("rcp-runs")
    monkeypatch.setenv(runs.RUNS_VARIABLE, str(tmp_path))
    assert runs.runs_root() == tmp_path
    assert runs.runs_root(Path("other")) == Path("other")


def test_names_of_new_runs(tmp_path: Path) -> None:
    first = runs.new_run_folder(tmp_path, "meta-llama/Llama-2-7b")
    assert first.parent == tmp_path and first.name.startswith("llama-2-7b-20")
    first.mkdir()
    second = runs.new_run_folder(tmp_path, "meta-llama/Llama-2-7b")
    assert second != first and not second.exists()
    assert runs.new_run_folder(tmp_path, "/models/My Model!/").name.startswith("my-model-20")


def test_a_run_folder_appears_whole_and_is_never_overwritten(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", RUNNING)
    assert {path.name for path in folder.iterdir()} == {".lock", "run.json", "recipe.toml", "tokenizer.json"}
    with pytest.raises(BadRun, match=r"a: already there, and a run never overwrites"):
        make(folder, RUNNING)


def test_a_second_process_is_refused_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    run = Run.open(make(tmp_path / "a", RUNNING))
    started, held = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with runs.locked(run):
            os.write(started[1], b"x")
            os.read(held[0], 1)
        os._exit(0)
    os.read(started[0], 1)
    with pytest.raises(BadRun, match=r"another process is training in this run folder"), runs.locked(run):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with runs.locked(run) as again:
        assert again.name == "a"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    runs.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"x": object()})
    with pytest.raises(RuntimeError), runs.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_what_a_finished_run_tells(tmp_path: Path) -> None:
    run = make_tiny_run("llama32", tmp_path, one_table=True, group_size=64)
    assert run.architecture.tied_table and run.quantization.group_size == 64
    assert run.tokenizer.add_bos and json.loads(run.tokenizer_json)["model"]
    assert run.tensor("layers.0.attn.q.levels").dtype == np.int8
    assert set(run.weight_hashes) == {name[:-6] for name in run.tensor_names() if name.endswith(".codes")}
    assert run.source().architecture.hidden_size == run.architecture.hidden_size
    assert run.config.model == run.record["model"]


def test_an_unfinished_run_has_no_tensors(tmp_path: Path) -> None:
    run = Run.open(make(tmp_path / "a", RUNNING))
    calls: list[Any] = [lambda: run.tensor("embed.weight"), lambda: run.weight_hashes, run.require_finished]
    for call in calls:
        with pytest.raises(BadRun, match=r"not finished \(status: running\); continue it with: rcpconv quantize --res"):
            call()
