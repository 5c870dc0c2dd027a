"""How bench_linear.py measures other people's layers: what their process is asked, what becomes of its answers."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from example_scripts import EXAMPLES, load_script


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return load_script("benchmarks/peers.py")


def measured(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limit: float) -> object:
    """What is found with this code in the place of the script."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(textwrap.dedent(code))
    monkeypatch.setattr(peers, "__file__", str(stand_in))
    return peers.measure("torch int4", [(8, 256), (16, 128)], 3, (1, 8), limit)


def test_a_process_is_asked_for_all_of_it(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        import json, sys
        expected = "--peer|torch int4|--layers|3|--linear|8x256|--linear|16x128|--batch|1|--batch|8"
        assert sys.argv[1:] == expected.split("|"), sys.argv
        print("Loaded something")
        for batch in (1, 8):
            print(json.dumps({"batch": batch, "seconds": batch / 4}))
    """
    assert measured(peers, tmp_path, monkeypatch, code, 60) == {1: 0.25, 8: 2.0}
    assert capsys.readouterr().out == ""


def test_what_fails_is_said_in_a_line(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        print('{"batch": 1, "seconds": 0.5}')
        raise RuntimeError("no such kernel")
    """
    assert measured(peers, tmp_path, monkeypatch, code, 60) == {1: 0.5}
    assert capsys.readouterr().out == "torch int4: not measured, or not all: RuntimeError: no such kernel\n"


def test_what_takes_too_long_is_ended(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        import time
        print('{"batch": 1, "seconds": 0.5}', flush=True)
        time.sleep(60)
    """
    assert measured(peers, tmp_path, monkeypatch, code, 2) == {1: 0.5}
    assert "not done after 2 s" in capsys.readouterr().out


def test_a_peer_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("import os, time\nprint(os.getpid(), file=open('begun', 'w'), flush=True)\ntime.sleep(60)\n")
    code = "import peers, signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
    code += f"peers.__file__ = {str(stand_in)!r}; peers.measure('torch int4', [(8, 8)], 1, [1], 60)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(EXAMPLES / 'benchmarks')!r}); {code}"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as asking:
        while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
            assert asking.poll() is None
            time.sleep(0.05)
        asking.terminate()
        assert asking.wait(30) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)


def test_a_picture_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    rows = [
        {"shape": shape, "batch": batch, "what": what, "us": 500.0, "bytes": 10**9}
        for shape, batch, what in (("a", 1, "linear"), ("a", 8, "torch int4"), ("b", 1, "fused"))
    ]
    (tmp_path / "a.json").write_text(json.dumps({"gpu": "some GPU", "read_bandwidth": 4e12, "rows": rows}))
    with pytest.raises(SystemExit) as ended:
        load_script("benchmarks/roofline.py").main([str(tmp_path / "out.png"), str(tmp_path / "a.json")])
    assert ended.value.code == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
