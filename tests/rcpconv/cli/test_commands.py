"""What a user types, and what comes back: output, exit codes, and never a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rcpconv.export
from rcpconv.cli import main
from rcpconv.runs import Run
from rcpformat import RcpFile
from tiny_checkpoints import CORPUS
from tiny_rcp import write_random
from tiny_runs import make_tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run("llama2", tmp_path_factory.mktemp("finished"))


@pytest.fixture(autouse=True)
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RCPCONV_RUNS", raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments, prog_name="rcpconv")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def add_run(source: Run, folder: Path, finished_at: str) -> Run:
    shutil.copytree(source.folder, folder)
    copy = Run.open(folder)
    copy.update(finished=finished_at)
    return copy


def test_export_takes_the_run_that_finished_last(finished: Run, work_folder: Path) -> None:
    late = add_run(finished, work_folder / "rcp-runs" / "a", "2025-02-01")
    add_run(finished, work_folder / "rcp-runs" / "b", "2025-01-01")
    add_run(finished, work_folder / "rcp-runs" / "c", "2025-03-01").update(status="running")
    result = run("export", "--out", "model.rcp")
    assert result.exit_code == 0, result.output
    assert "rcp-runs/a" in result.output
    for part in (
        "codes",
        "levels",
        "embedding",
        "original in FP16",
        "×",
        f"{Path('model.rcp').stat().st_size:,} bytes",
    ):
        assert part in result.output
    with RcpFile.open("model.rcp") as file:
        assert file.architecture == late.architecture

    result = run("export", "--out", "model.rcp")
    assert result.exit_code == 1
    assert result.output.startswith("Error: model.rcp: ")
    assert "--force" in result.output
    assert run("export", "--run", "rcp-runs/b", "--out", "model.rcp", "--force").exit_code == 0


def test_inspect_shows_everything_and_json_says_it_too(finished: Run) -> None:
    assert run("export", "--run", str(finished.folder)).exit_code == 0
    text = run("inspect", "model.rcp").output
    for part in ("hidden_size", "ldp", "base_model", "layers.1.mlp.down", "bits a weight", "█", "rope.inv_freq"):
        assert part in text
    assert "…\n" not in text, "nothing is cut off at 80 columns"
    report = json.loads(run("inspect", "model.rcp", "--json").output)
    assert report["architecture"]["num_layers"] == 2
    assert report["sizes"]["bits_per_linear_weight"] > 2
    assert len(report["linears"]) == 14


def test_verify_prints_a_line_for_each_file(work_folder: Path) -> None:
    for name in ("good.rcp", "bad.rcp"):
        write_random(work_folder / name)
    content = bytearray((work_folder / "bad.rcp").read_bytes())
    content[-1] ^= 1
    (work_folder / "bad.rcp").write_bytes(content)
    result = run("verify", "good.rcp", "bad.rcp", "absent.rcp")
    good, bad, absent = result.output.splitlines()
    assert result.exit_code == 1
    assert good.startswith("good.rcp: ok")
    assert bad.startswith("bad.rcp: ")
    assert bad.endswith("[TensorHashMismatch]")
    assert absent.startswith("absent.rcp: ")
    assert run("verify", "good.rcp").exit_code == 0


def test_eval_prints_one_table_and_writes_json(finished: Run, work_folder: Path) -> None:
    (work_folder / "text.txt").write_text(" ".join(CORPUS * 2), encoding="utf-8")
    assert run("export", "--run", str(finished.folder)).exit_code == 0
    options = ["--run", str(finished.folder), "--rcp", "model.rcp", "--text", "text.txt", "--window", "50"]
    result = run("eval", *options, "--max-tokens", "200", "--agreement", "--json", "eval.json")
    assert result.exit_code == 0, result.output
    for part in ("original", "fake-quant", "rcp", "perplexity", "196 tokens scored", "text.txt", "top-1"):
        assert part in result.output
    found = json.loads((work_folder / "eval.json").read_text())
    assert [row["name"] for row in found["models"]] == ["original", "fake-quant", "rcp"]
    # Without any run, a file is evaluated alone.
    result = run("eval", "--rcp", "model.rcp", "--text", "text.txt", "--max-tokens", "100")
    assert result.exit_code == 0, result.output
    assert "fake-quant" not in result.output
    result = run("eval", "--rcp", "model.rcp", "--text", "text.txt", "--window", "50", "--max-tokens", "0.1k")
    assert "98 tokens scored" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export"], 1, "no finished run"),
        (["export", "--run", "nowhere"], 1, "nowhere: expected a run folder"),
        (["inspect", "absent.rcp"], 1, "absent.rcp: expected a readable .rcp file"),
        (["eval"], 1, "no finished run"),
        (["push", "absent.rcp", "user/repo"], 1, "absent.rcp: "),
        (["export", "--nonsense"], 2, "No such option"),
        (["eval", "--skip", "everything"], 2, "Invalid value"),
        (["eval", "--max-tokens", "1"], 2, "expected at least 2"),
        (["verify"], 2, "Missing argument"),
    ],
)
def test_mistakes_are_one_message_and_an_exit_code(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.output
    if code == 1:
        assert result.output.startswith("Error: ")
        assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [(KeyboardInterrupt(), 130, "Interrupted"), (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left")],
)
def test_interrupt_and_system_errors(
    finished: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(rcpconv.export, "export", fail)
    result = run("export", "--run", str(finished.folder))
    assert result.exit_code == code
    assert message in result.output


def test_ctrl_c_ends_eval_and_its_child_without_a_traceback(finished: Run, work_folder: Path) -> None:
    """A real SIGINT to the whole group, as a terminal sends it, while the runtime scores."""
    assert run("export", "--run", str(finished.folder)).exit_code == 0
    (work_folder / "text.txt").write_text(" ".join(CORPUS * 300), encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, "-m", "rcpconv", "eval", "--rcp", "model.rcp", "--text", "text.txt"],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    while child.poll() is None and not children.read_text().split():
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert output == ""


def test_quantizes_help_lists_options_alone() -> None:
    text = CliRunner().invoke(main, ["quantize", "--help"]).output
    assert "[OPTIONS] [MODEL]" in text and "object at" not in text
