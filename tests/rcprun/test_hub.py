"""Models by Hub name, with the real client against a server on the loopback interface."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loopback_hub import READ_TOKEN, LoopbackHub, serve_hub
from rcprun.errors import HubError
from rcprun.hub import only_model, resolve


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def rcp_run(hub: LoopbackHub, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """rcp_run(name, token=…, **environment) -> exit code, standard output and error of `rcp-run name --prompt a`."""

    def run(name: str, token: str | None = None, **environment: str) -> tuple[int, str, str]:
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        child = subprocess.run(
            [sys.executable, "-m", "rcprun", name, "--prompt", "a", "-n", "1", "--json"],
            env=hub.environment(tmp_path / "home", token) | path | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in child.stderr
        return child.returncode, child.stdout, child.stderr

    return run


def test_pulls_the_only_model_and_keeps_it(
    hub: LoopbackHub, rcp_run: Callable[..., tuple[int, str, str]], write_model: Callable[..., Path]
) -> None:
    hub.add("user/repo", {"README.md": b"hi", "model.rcp": write_model().read_bytes()})
    code, out, _ = rcp_run("user/repo")
    assert (code, json.loads(out)["prompt_tokens"]) == (0, 2)
    hub.requests.clear()
    assert rcp_run("hf://user/repo/model.rcp")[0] == 0
    assert not any(request.startswith("GET /user/repo/resolve") for request in hub.requests)
    assert rcp_run("hf://user/repo", HF_HUB_OFFLINE="1")[0] == 0
    assert rcp_run("hf://user/repo/model.rcp", HF_HUB_OFFLINE="1")[0] == 0


def test_names_the_choice(hub: LoopbackHub, rcp_run: Callable[..., tuple[int, str, str]]) -> None:
    hub.add("user/many", {"a.rcp": b"", "sub/b.rcp": b""})
    hub.add("user/none", {"model.safetensors": b""})
    code, _, message = rcp_run("user/many")
    assert code == 6 and "hf://user/many/a.rcp, hf://user/many/sub/b.rcp" in message
    code, _, message = rcp_run("user/none")
    assert code == 6 and "no .rcp file" in message
    code, _, message = rcp_run("hf://user/many/c.rcp")
    assert code == 6 and "no file 'c.rcp'" in message


def test_gated_private_and_missing_repositories(
    hub: LoopbackHub, rcp_run: Callable[..., tuple[int, str, str]], write_model: Callable[..., Path]
) -> None:
    content = write_model().read_bytes()
    hub.add("user/gated", {"model.rcp": content}, gated=True)
    hub.add("user/private", {"model.rcp": content}, private=True)
    code, _, message = rcp_run("user/gated")
    assert code == 6 and "accept its licence" in message and "HF_TOKEN" in message
    code, _, message = rcp_run("user/private")
    assert code == 6 and "HF_TOKEN" in message
    code, _, message = rcp_run("user/missing")
    assert code == 6 and "no such repository" in message
    assert rcp_run("user/gated", token=READ_TOKEN)[0] == 0


def test_without_network_and_cache(rcp_run: Callable[..., tuple[int, str, str]]) -> None:
    for name in ("user/repo", "hf://user/repo/model.rcp"):
        code, _, message = rcp_run(name, HF_HUB_OFFLINE="1")
        assert code == 6 and "HF_HUB_OFFLINE" in message


def test_a_hub_that_does_not_answer_is_said_in_one_line(rcp_run: Callable[..., tuple[int, str, str]]) -> None:
    """The client alone would repeat itself on standard error for half a minute."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code, _, message = rcp_run("user/repo", HF_ENDPOINT=endpoint)
    assert code == 6 and message.count("\n") == 1
    assert message.endswith(f"check the network, HF_HUB_OFFLINE and HF_ENDPOINT: {endpoint} does not answer\n")


def test_a_damaged_download_is_not_kept(
    hub: LoopbackHub, rcp_run: Callable[..., tuple[int, str, str]], write_model: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_model().read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    hub.add("user/repo", {"model.rcp": bytes(damaged)})
    code, _, message = rcp_run("user/repo")
    assert code == 3 and "deleted" in message
    assert not list((tmp_path / "home").rglob("*.rcp"))
    hub.repositories["user/repo"].files["model.rcp"] = whole
    assert rcp_run("user/repo")[0] == 0


def test_local_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "repo").touch()
    assert resolve("user/repo") == Path("user/repo")


def test_names_that_are_none() -> None:
    for name in ("hf://user", "hf://us er/repo"):
        with pytest.raises(HubError, match="hf://user/repo"):
            resolve(name)
    with pytest.raises(HubError, match="choose one"):
        only_model("user/repo", ["a.rcp", "b.rcp"])
