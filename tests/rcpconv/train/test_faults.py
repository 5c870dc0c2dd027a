"""Kills, full disks and second processes: never a damaged run folder or file, and the same weights in the end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rcpconv.quantize
import rcpformat.writer
from rcpconv.cli import main
from rcpconv.errors import BadRun, NotEnoughMachine, NotSaved
from rcpconv.export import export
from rcpconv.runs import BAKED, FINISHED, RECORD, RUNNING, Run
from rcpconv.train import checkpoints
from rcpformat import OutputNotWritable, RcpFile
from tiny_runs import make_tiny_run
from tiny_trainings import EVALUATED, assert_same_result, in_child, resume, train, wait_for_line

DRILL_LOG = "RCPCONV_DRILL_LOG"
"""Environment variable: a file that the long drill writes a line of JSON to for every kill."""
KILLS = 100
OLD_FILE = b"what was there before"


def kill(child: int) -> bool:
    """SIGKILL; whether the child was still there."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def wait_until(happened: Callable[[], object], child: int) -> None:
    while not happened():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended early"


def begin_or_go_on(model: str, text: Path, folder: Path, **settings: Any) -> Callable[[], int]:
    """For a child: train, or continue what an earlier child has begun."""

    def action() -> int:
        if folder.exists():
            resume(folder)
        else:
            train(Path(model), text, folder, eval_data=str(text), **settings)
        return 0

    return action


def phase_of(folder: Path) -> str:
    """What a training was doing when it was killed, by what it left."""
    if not folder.exists():
        return "before its folder"
    if Run.open(folder).status == FINISHED:
        return "finished"
    if (folder / f".{BAKED}.tmp").exists():
        return "baking"
    if (folder / BAKED).exists():
        return "after baking"
    if list(folder.glob("checkpoints/.step-*.tmp")):
        return "writing a checkpoint"
    lines = (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0
    return f"training, step {lines}" if lines else "before its first step"


def require_intact(folder: Path) -> None:
    """Whatever has its name is whole."""
    if not folder.exists():
        return
    run = Run.open(folder)
    assert run.config and run.tokenizer_json and run.architecture
    for path in (folder / "checkpoints").glob("step-*"):
        assert torch.load(path, map_location="cpu", weights_only=True)["optimizer"]
    if (folder / BAKED).exists():
        for name in run._baked.names():
            run.baked(name)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files stay long enough under their temporary names to be met there."""
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.02), sync(descriptor)))


def test_killed_at_any_moment_and_resumed_gives_the_same_weights(
    reference: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    folder, chance = tmp_path / "killed", random.Random(0)
    action = begin_or_go_on(str(checkpoint), text, folder, **EVALUATED)
    for lines in (2, 7, 7, 14):
        child = in_child(action, tmp_path / "log")
        wait_for_line(folder, lines, child)
        time.sleep(chance.random() * 0.1)
        assert kill(child)
        assert Run.open(folder).status == RUNNING
        require_intact(folder)
    assert_same_result(resume(folder), reference)


@pytest.mark.usefixtures("slow_disk")
def test_killed_while_it_writes_a_checkpoint_or_the_result(
    reference: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    action = begin_or_go_on(str(checkpoint), text, folder, **EVALUATED)
    for half_written in ("checkpoints/.step-*.tmp", "checkpoints/.step-*8.pt.tmp", f".{BAKED}.tmp"):
        child = in_child(action, tmp_path / "log")
        wait_until(lambda pattern=half_written: list(folder.glob(pattern)), child)
        assert kill(child)
        require_intact(folder)
    assert_same_result(resume(folder), reference)


@pytest.mark.usefixtures("slow_disk")
@pytest.mark.parametrize("there", [False, True], ids=["new", "overwritten"])
def test_killed_while_it_exports(reference: Run, tmp_path: Path, there: bool) -> None:
    """The file is the old one, or not there, and what a killed export leaves is gone after the next."""
    export(reference, tmp_path / "expected.rcp")
    out = tmp_path / "out" / "model.rcp"
    out.parent.mkdir()
    if there:
        out.write_bytes(OLD_FILE)
    for _ in range(3):
        child = in_child(lambda: export(reference, out, force=True).nbytes and 0, tmp_path / "log")
        wait_until(lambda: list(out.parent.glob(".rcp-*.tmp")), child)
        assert kill(child)
        assert out.read_bytes() == OLD_FILE if there else not out.exists()
    export(reference, out, force=there)
    assert out.read_bytes() == (tmp_path / "expected.rcp").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["model.rcp"]


@pytest.mark.slow
@pytest.mark.usefixtures("slow_disk")
def test_killed_many_times_at_random_moments(tmp_path: Path) -> None:
    """The demo model, from set-up to the last write, and its export; a checkpoint after every step."""
    text = tmp_path / "text.txt"
    text.write_text((Path(rcpconv.quantize.__file__).parent / "demo" / "heldout.txt").read_text()[:20_000])
    settings = {"steps": 10, "checkpoint_every": 1, "max_eval_tokens": 300, "eval_every": 5}
    began = time.perf_counter()
    reference = train(Path("demo"), text, tmp_path / "reference", eval_data=str(text), **settings)
    training_s = time.perf_counter() - began
    began = time.perf_counter()
    export(reference, tmp_path / "expected.rcp")
    export_s = time.perf_counter() - began
    expected = (tmp_path / "expected.rcp").read_bytes()
    chance, log = random.Random(1), []

    def note(killed: str, phase: str, after: float) -> None:
        log.append({"kill": len(log) + 1, "killed": killed, "phase": phase, "after_s": round(after, 3), "intact": True})

    while len(log) < KILLS:
        folder, out = tmp_path / f"run-{len(log)}", tmp_path / f"out-{len(log)}" / "model.rcp"
        action = begin_or_go_on("demo", text, folder, **settings)
        while not folder.exists() or Run.open(folder).status != FINISHED:
            child = in_child(action, tmp_path / "log")
            time.sleep(after := training_s * chance.random() ** 3)
            killed = kill(child)
            require_intact(folder)
            if killed:
                note("quantize", phase_of(folder), after)
        run = Run.open(folder)
        assert_same_result(run, reference)
        out.parent.mkdir()
        out.write_bytes(OLD_FILE)
        for _ in range(3):
            child = in_child(lambda run=run, out=out: export(run, out, force=True).nbytes and 0, tmp_path / "log")
            time.sleep(after := 1.5 * export_s * chance.random())
            killed = kill(child)
            found = out.read_bytes()
            assert found in (OLD_FILE, expected)
            half = list(out.parent.glob(".rcp-*.tmp"))
            if killed:
                phase = "writing" if half else "before its file" if found == OLD_FILE else "after its file"
                note("export", phase, after)
        export(run, out, force=True)
        assert out.read_bytes() == expected
        assert [path.name for path in out.parent.iterdir()] == ["model.rcp"]
    if DRILL_LOG in os.environ:
        Path(os.environ[DRILL_LOG]).write_text("".join(json.dumps(line) + "\n" for line in log))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB. Needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take the room that there is, but for some bytes."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
        file.truncate(max(0, file.tell() - leave))
    return path


def test_disk_full_at_a_checkpoint_keeps_the_one_before(
    reference: Run, checkpoint: Path, text: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, save = small_disk / "runs" / "a", checkpoints.save

    def save_on_a_full_disk(run: Run, step: int, *rest: Any) -> None:
        if step == 8:
            fill(small_disk, leave=8192)
        save(run, step, *rest)

    monkeypatch.setattr(checkpoints, "save", save_on_a_full_disk)
    with pytest.raises(
        NotSaved, match=r"step-0000008\.pt: cannot be written .*The checkpoint before it is intact: cont"
    ):
        train(checkpoint, text, folder, eval_data=str(text), **EVALUATED)
    monkeypatch.undo()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-0000004.pt"]
    require_intact(folder)
    assert Run.open(folder).status == RUNNING
    (small_disk / "filler").unlink()
    assert_same_result(resume(folder), reference)


@pytest.mark.parametrize("when", ["before", "while"])
def test_disk_full_at_the_result_keeps_the_checkpoint(
    reference: Run, checkpoint: Path, text: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Found out before anything is written, or only while it is."""
    folder, require_room = small_disk / "runs" / "a", rcpconv.quantize.require_room

    def no_room(path: Path, nbytes: int) -> None:
        if when == "before":
            fill(small_disk, leave=8192)
            require_room(path, nbytes)
        require_room(path, nbytes)
        fill(small_disk, leave=8192)

    monkeypatch.setattr(rcpconv.quantize, "require_room", no_room)
    says = (
        "needs .* bytes of disk, .* are free" if when == "before" else r"cannot be written \(No space left on device\)"
    )
    with pytest.raises(NotSaved, match=rf"baked\.safetensors: {says}.*; make room"):
        train(checkpoint, text, folder, eval_data=str(text), **EVALUATED)
    monkeypatch.undo()
    assert not (folder / BAKED).exists() and not (folder / f".{BAKED}.tmp").exists()
    require_intact(folder)
    (small_disk / "filler").unlink()
    assert_same_result(resume(folder), reference)


def test_disk_full_at_a_line_of_metrics(checkpoint: Path, text: Path, small_disk: Path, reference: Run) -> None:
    folder = small_disk / "runs" / "a"

    def until_full() -> int:
        append = rcpconv.train.loop.Metrics.append

        def fill_first(self: Any, line: Any) -> None:
            if line["step"] == 6:
                fill(small_disk)
            append(self, line | ({"long": "x" * 5000} if line["step"] == 6 else {}))

        rcpconv.train.loop.Metrics.append = fill_first
        with pytest.raises(NotSaved, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            train(checkpoint, text, folder, eval_data=str(text), **EVALUATED)
        return 0

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(until_full, small_disk.parent / "log"), 0)[1]) == 0
    require_intact(folder)
    (small_disk / "filler").unlink()
    assert_same_result(resume(folder), reference)


@pytest.mark.parametrize("when", ["before", "while"])
def test_disk_full_at_an_export_keeps_the_old_file(
    reference: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out = small_disk / "model.rcp"
    out.write_bytes(OLD_FILE)
    require_room = rcpformat.writer._require_room
    if when == "before":
        fill(small_disk, leave=8192)
    else:
        monkeypatch.setattr(
            rcpformat.writer, "_require_room", lambda *asked: (require_room(*asked), fill(small_disk, leave=8192))
        )
    result = CliRunner().invoke(main, ["export", "--run", str(reference.folder), "--out", str(out), "--force"])
    assert result.exit_code == 1
    says = "expected room for" if when == "before" else "No space left on device"
    assert f"Error: {out}: " in result.output and says in result.output
    assert out.read_bytes() == OLD_FILE
    assert {path.name for path in small_disk.iterdir()} == {"model.rcp", "filler"}
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    export(reference, out, force=True)
    RcpFile.open(out, verify=True)


def test_a_new_run_on_a_full_disk_leaves_nothing(checkpoint: Path, text: Path, small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(NotEnoughMachine, match=r"0 kB of disk are free in .*, the result takes .*: make room"):
        train(checkpoint, text, small_disk / "runs" / "a")
    assert not list(small_disk.glob("runs/*"))


def test_checkpoints_that_are_there_need_no_more_disk(checkpoint: Path, text: Path, small_disk: Path) -> None:
    """A run that fitted the disk when it began can go on."""
    folder = small_disk / "runs" / "a"
    child = in_child(begin_or_go_on(str(checkpoint), text, folder, steps=10_000), small_disk.parent / "log")
    wait_for_line(folder, 13, child)
    assert kill(child)
    fill(small_disk, leave=2_000_000)  # of 3.4 MB that it needs in all
    action = begin_or_go_on(str(checkpoint), text, folder)
    child = in_child(action, small_disk.parent / "log")
    wait_for_line(folder, 20, child)
    assert kill(child)
    (small_disk / "filler").unlink()
    fill(small_disk, leave=500_000)
    with pytest.raises(NotEnoughMachine, match=r"take .* more than is there: use --keep-checkpoints 1"):
        resume(folder)


def test_a_second_process_is_refused_by_the_command_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    child = in_child(begin_or_go_on(str(checkpoint), text, folder, steps=10_000), tmp_path / "log")
    try:
        wait_for_line(folder, 2, child)
        before = (folder / RECORD).read_bytes()
        for command, says in (
            (["quantize", "--resume", str(folder)], "another process is training in this run folder; wait for it or"),
            (["export", "--run", str(folder), "--out", str(tmp_path / "m.rcp")], "its training is not finished"),
        ):
            result = CliRunner().invoke(main, command)
            assert result.exit_code == 1 and says in result.output, result.output
        with pytest.raises(BadRun, match="already there"):
            train(checkpoint, text, folder)
        assert (folder / RECORD).read_bytes() == before and os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        kill(child)


def test_what_another_process_still_writes_is_not_cleared_away(tmp_path: Path) -> None:
    run = make_tiny_run("llama1", tmp_path)
    written, left = tmp_path / ".rcp-0000000000000000.tmp", tmp_path / ".rcp-1111111111111111.tmp"
    left.write_bytes(b"")
    with written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        export(run, tmp_path / "model.rcp")
    assert written.exists() and not left.exists()


def test_an_export_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    run = make_tiny_run("llama1", tmp_path)
    with pytest.raises(OutputNotWritable, match="expected a writable path"):
        export(run, tmp_path / "no folder" / "model.rcp")
