"""examples/benchmarks/measure_training.py on a CPU: what it runs where a GPU is rented has run before."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from example_scripts import load_script

ROOT = Path(__file__).parents[3]
OPTIONS = ["--case", "demo:full", "--device", "cpu", "--steps", "1", "--set", "seq_len=16"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/measure_training.py")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_states": "int8", "teacher_weights": "int8", "master_weights": "bf16", "step_in_backward": "on"},
        {"grad_checkpointing": "on", "batch_size": 2, "grad_accum": 2},
    ],
)
def test_training_and_plain_training_are_measured(script: ModuleType, tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.get("optimizer_states") == "int8":
        pytest.importorskip("torchao", reason="the extra low-memory is not installed")
    out = tmp_path / "results.json"
    pairs = [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(
        script.main, [*OPTIONS, *pairs, "--plain", "--profile", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0 and ": QAT at " in done.output
    (result,) = json.loads(out.read_text())
    assert len(result["times"]) == 3 and result["seconds"] == result["times"][-1]
    assert 0 < result["update_seconds"] < 10 and "the update alone takes" in done.output
    assert 0 < result["profile"]["kernels"][0]["seconds"] < result["profile"]["busy"] and "the longest:" in done.output
    assert result["plain"]["training"] > 0 and result["plain"]["teacher"] > 0
    assert {name: result["settings"][name] for name in settings} == settings
    with pytest.raises(click.ClickException, match="nothing in it was measured on a GPU"):
        script.factors([result])


def test_the_packages_calibration_is_what_the_results_say(script: ModuleType) -> None:
    """`measure_training.py --calibrate rcpconv/calibration.json` with these files."""
    results = ROOT / "examples" / "benchmarks" / "results"
    files = [results / "real-sizes-second" / f"{name}.json" for name in ("1b", "3b", "train-7b-80", "train-7b-48")]
    files.insert(2, results / "real-sizes" / "train-7b-full.json")
    found = script.factors([result for path in files for result in json.loads(path.read_text())])
    assert json.loads(json.dumps(dataclasses.asdict(found))) == json.loads(
        (ROOT / "rcpconv" / "calibration.json").read_text()
    )


def test_too_little_memory_is_a_result_and_no_calibration(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(script, "_train", fail)
    out = tmp_path / "results.json"
    done = CliRunner().invoke(script.main, [*OPTIONS, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 1 and "  failed  CUDA out of memory" in done.output
    (result,) = json.loads(out.read_text())
    measured = result | {"peak_allocated": 8 << 30, "seconds": 1.0}
    assert not script._usable(measured)
    del measured["error"]
    (tmp_path / "measured.json").write_text(json.dumps([measured]))
    files = [str(out), str(tmp_path / "measured.json")]
    written = tmp_path / "calibration.json"
    CliRunner().invoke(script.main, ["--calibrate", str(written), *files], catch_exceptions=False)
    found = json.loads(written.read_text())
    (row,) = found["measured"]
    assert found["seconds"]["eager"] == round(1 / row["estimated_seconds"], 3)
