"""The sanitizer's driver, with scripts in the place of the sanitizer and of the model."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "sanitize.py"


def run(tmp_path: Path, sanitizer: str | None, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the driver with a compute-sanitizer that is this shell script; python itself runs nothing, and succeeds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "m.rcp").touch()
    if sanitizer is not None:
        (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{sanitizer}\n")
        (folder / "compute-sanitizer").chmod(0o755)
    code = f"import sys, runpy; sys.executable = '/bin/true'; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, tmp_path / "m.rcp", "--logs", tmp_path / "logs", *options]
    environment = {"PATH": str(folder), "CUDA_HOME": str(tmp_path / "none")}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)


def test_no_sanitizer_is_said(tmp_path: Path) -> None:
    result = run(tmp_path, None)
    assert result.returncode == 2
    assert "compute-sanitizer: not on PATH" in result.stderr


def test_each_tool_runs_and_is_judged(tmp_path: Path) -> None:
    sanitizer = 'echo "$@"; echo "ERROR SUMMARY: of $2"; [ $2 != racecheck ] || exit 99'
    result = run(tmp_path, sanitizer)
    assert result.returncode == 1
    for tool, verdict in (
        ("memcheck", "nothing found"),
        ("racecheck", "found something"),
        ("initcheck", "nothing found"),
    ):
        assert f"{tool}: {verdict}; ERROR SUMMARY: of {tool} see " in result.stdout
        assert f"--tool {tool} " in (tmp_path / "logs" / f"{tool}.log").read_text()


def test_a_tool_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    result = run(tmp_path, "/bin/sleep 60", "--tool", "memcheck", "--limit", 1)
    assert result.returncode == 1
    assert "memcheck: not done after 1 s" in result.stdout


def test_tools_run_side_by_side_on_what_was_asked_for(tmp_path: Path) -> None:
    """Each waits until all have begun."""
    folder = tmp_path / "begun"
    folder.mkdir()
    sanitizer = f"""echo "$@"; : > {folder}/$2
        for turn in 1 2 3 4 5 6 7 8 9 10; do
            [ -e {folder}/memcheck ] && [ -e {folder}/racecheck ] && [ -e {folder}/initcheck ] && exit 0
            /bin/sleep 1
        done
        exit 1"""
    result = run(tmp_path, sanitizer, "--no-graphs", "--serialized")
    assert result.returncode == 0, result.stdout
    assert "--plain --no-graphs --serialized" in (tmp_path / "logs" / "racecheck.log").read_text()
