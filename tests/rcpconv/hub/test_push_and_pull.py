"""`rcpconv push` and the pull of `rcp-run`, with the real client against a server on 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub, serve_hub
from rcpconv.hub import file_sha256
from rcpconv.modelcard import MARK
from tiny_rcp import write_random


@dataclass
class Home:
    """A user's machine: what is typed there talks to the loopback Hub."""

    hub: LoopbackHub
    folder: Path

    def type(self, module: str, *arguments: str, token: str | None = WRITE_TOKEN, **variables: str) -> tuple[int, str]:
        """Exit code and output of `python -m module arguments`."""
        environment = self.hub.environment(self.folder / "hf", token) | {"PYTHONPATH": ":".join(sys.path)} | variables
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert "Traceback" not in done.stdout, done.stdout
        return done.returncode, done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    write_random(tmp_path / "model.rcp")
    with serve_hub() as hub:
        yield Home(hub, tmp_path)


def test_push_then_run_from_the_hub(home: Home) -> None:
    model = home.folder / "model.rcp"
    row = {"name": "rcp", "perplexity": 21.5, "bytes": model.stat().st_size, "ratio": 3.0, "sha256": file_sha256(model)}
    evaluation = {"text": "some text", "window": 64, "tokens": 1000, "models": [row], "agreement": {}}
    (home.folder / "eval.json").write_text(json.dumps(evaluation))

    code, output = home.type("rcpconv", "push", "model.rcp", "user/tiny", "--private", "--evaluation", "eval.json")
    assert code == 0, output
    repository = home.hub.repositories["user/tiny"]
    assert repository.private
    assert repository.files["model.rcp"] == model.read_bytes()
    card = repository.files["README.md"].decode()
    assert MARK in card
    assert "rcp-run user/tiny --prompt" in card
    assert "21.50" in card
    assert f"/user/tiny/commit/{repository.sha}" in output

    model.unlink()
    for name in ("user/tiny", "hf://user/tiny", "hf://user/tiny/model.rcp"):
        code, output = home.type("rcprun", name, "--prompt", "w3 w4", "-n", "2", token=READ_TOKEN)
        assert code == 0, output
    downloads = [request for request in home.hub.requests if request == "GET /user/tiny/resolve/main/model.rcp"]
    assert len(downloads) <= 1, "a cached file is not downloaded again"
    code, output = home.type("rcprun", "user/tiny", "--prompt", "w3", "-n", "1", HF_HUB_OFFLINE="1")
    assert code == 0, output


def test_second_push_updates_the_file_but_not_a_card_written_by_hand(home: Home) -> None:
    home.hub.add("user/tiny", {"README.md": b"# mine", "model.rcp": b"old"})
    code, output = home.type("rcpconv", "push", "model.rcp", "user/tiny")
    assert code == 0, output
    assert "README.md was not written by rcpconv" in output
    files = home.hub.repositories["user/tiny"].files
    assert files == {"README.md": b"# mine", "model.rcp": (home.folder / "model.rcp").read_bytes()}


@pytest.mark.parametrize(
    ("repository", "token", "offline", "remedy"),
    [
        ("user/new", None, "0", "hf auth login"),
        ("user/new", "hf_wrong", "0", "hf auth login"),
        ("user/new", READ_TOKEN, "0", "write permission"),
        ("other/new", WRITE_TOKEN, "0", "namespace"),
        ("user/new", WRITE_TOKEN, "1", "HF_HUB_OFFLINE"),
        ("no-slash/or/too/many", WRITE_TOKEN, "0", "user/repo"),
    ],
)
def test_refusals_say_what_to_do(home: Home, repository: str, token: str | None, offline: str, remedy: str) -> None:
    code, output = home.type("rcpconv", "push", "model.rcp", repository, token=token, HF_HUB_OFFLINE=offline)
    assert code == 1
    assert output.startswith(f"Error: {repository}: ")
    assert remedy in output
    assert home.hub.repositories == {}


def test_a_damaged_file_or_a_stranger_s_evaluation_is_not_pushed(home: Home) -> None:
    model = home.folder / "model.rcp"
    (home.folder / "eval.json").write_text(json.dumps({"models": [{"sha256": "0" * 64}]}))
    code, output = home.type("rcpconv", "push", "model.rcp", "user/tiny", "--evaluation", "eval.json")
    assert (code, home.hub.requests) == (1, [])
    assert "is not about model.rcp" in output
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    code, output = home.type("rcpconv", "push", "model.rcp", "user/tiny")
    assert (code, home.hub.requests) == (1, [])
    assert "Error: model.rcp: " in output


def test_pull_explains_gated_missing_and_empty_repositories(home: Home) -> None:
    content = (home.folder / "model.rcp").read_bytes()
    home.hub.add("org/gated", {"model.rcp": content}, gated=True)
    home.hub.add("org/two", {"a.rcp": content, "b.rcp": content})
    home.hub.add("org/none", {"README.md": b""})
    for name, remedy in (
        ("org/gated", "accept its licence"),
        ("org/missing", "no such repository"),
        ("org/two", "hf://org/two/b.rcp"),
        ("org/none", "no .rcp file"),
    ):
        code, output = home.type("rcprun", name, "--prompt", "w3", "-n", "1", token=READ_TOKEN)
        assert code == 6, output
        assert remedy in output
