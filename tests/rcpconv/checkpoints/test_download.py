"""Hub repositories, through the real client and a server on 127.0.0.1."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loopback_hub import READ_TOKEN, LoopbackHub, serve_hub
from rcpconv.checkpoint import load_source
from rcpconv.errors import DownloadFailed
from tiny_checkpoints import make_tiny_checkpoint, make_tiny_meta_checkpoint

# One process for all: importing transformers takes seconds. The client asks for its settings at each call.
CLIENT = """
import json, shutil, sys
from types import SimpleNamespace
from huggingface_hub import constants
from rcpconv.checkpoint import download
from rcpconv.checkpoint import load_source
for line in sys.stdin:
    request = json.loads(line)
    constants.HF_HUB_OFFLINE = request.pop("offline", False)
    free = request.pop("free", None)
    download.shutil = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=free)) if free else shutil
    try:
        source = load_source(**request)
        answer = {"folder": str(source.folder), **source.provenance}
    except ValueError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


@dataclass
class Client:
    """A process that loads what it is told to, with the loopback server as its Hub."""

    hub: LoopbackHub
    process: subprocess.Popen[str]

    def load(self, model: str, **options: Any) -> dict[str, Any]:
        """What load_source made of it: provenance and folder, or the error's class and message."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.hub.requests.clear()
        self.process.stdin.write(json.dumps({"model": model} | options) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def downloads(self) -> set[str]:
        """Names of the files that the last load fetched."""
        gets = [request for request in self.hub.requests if request.startswith("GET") and "/resolve/" in request]
        return {request.rsplit("/", 1)[1] for request in gets}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serve_hub() as hub:
        environment = hub.environment(tmp_path_factory.mktemp("home"), READ_TOKEN)
        environment["PYTHONPATH"] = ":".join(path for path in sys.path if path)
        with subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            yield Client(hub, process)
            process.kill()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, bytes]]:
    """Layout name -> files of a repository."""
    folder = tmp_path_factory.mktemp("files")
    for layout in ("safetensors", "sharded", "bin", "sharded-bin"):
        make_tiny_checkpoint("tinyllama", folder / layout, layout=layout)
    make_tiny_meta_checkpoint(folder / "meta", 2)
    return {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in folder.iterdir()}


def test_disk_is_checked_before_weights_are_fetched(client: Client, files: Mapping[str, Mapping[str, bytes]]) -> None:
    client.hub.add("org/large", files["sharded"])
    weights = sum(len(content) for name, content in files["sharded"].items() if name.endswith(".safetensors"))
    answer = client.load("org/large", free=weights - 1)
    assert answer["error"] == "DownloadFailed"
    assert f"org/large: its weights take {weights:,} bytes of disk, {weights - 1:,} are free in" in answer["message"]
    assert not any(name.endswith(".safetensors") for name in client.downloads())
    assert "error" not in client.load("org/large", free=weights)
    assert "error" not in client.load("org/large", free=1)  # all in the cache


def test_only_the_preferred_layout_is_downloaded(client: Client, files: Mapping[str, Mapping[str, bytes]]) -> None:
    everything = files["meta"] | files["sharded-bin"] | files["sharded"] | {"README.md": b"---\nlicense: mit\n---\n"}
    extras = {"original/consolidated.00.pth": b"x", "pytorch_model.bin": b"x", "tf_model.h5": b"x", "model.gguf": b"x"}
    repository = client.hub.add("org/every-layout", everything | extras)
    answer = client.load("org/every-layout")
    assert answer["layout"] == "hf-safetensors"
    assert (answer["revision"], answer["license"]) == (repository.sha, "mit")
    assert answer["base_model"] == "org/every-layout"
    weights = {name for name in client.downloads() if name.endswith((".safetensors", ".bin", ".pth", ".h5", ".gguf"))}
    assert weights == {name for name in files["sharded"] if name.endswith(".safetensors")}
    assert client.load("org/every-layout", revision=repository.sha) == answer
    assert not client.downloads()


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded-bin", "meta"])
def test_every_layout_downloads_and_then_loads_offline(
    layout: str, client: Client, files: Mapping[str, Mapping[str, bytes]]
) -> None:
    name = f"org/{layout}"
    client.hub.add(name, files[layout])
    answer = client.load(name)
    assert answer["layout"] == {"safetensors": "hf-safetensors", "meta": "meta"}.get(layout, "hf-bin")
    assert client.load(name, offline=True) == answer


def test_another_cache_folder(client: Client, files: Mapping[str, Mapping[str, bytes]], tmp_path: Path) -> None:
    client.hub.add("org/elsewhere", files["safetensors"])
    assert client.load("org/elsewhere", cache_dir=str(tmp_path))["folder"].startswith(str(tmp_path))


def test_unsupported_models_are_refused_before_their_weights_are_downloaded(
    client: Client, files: Mapping[str, Mapping[str, bytes]]
) -> None:
    config = json.loads(files["safetensors"]["config.json"]) | {"hidden_act": "relu"}
    client.hub.add("org/relu", dict(files["safetensors"]) | {"config.json": json.dumps(config).encode()})
    assert client.load("org/relu")["error"] == "UnsupportedArchitecture"
    assert "model.safetensors" not in client.downloads()


def test_refusals_say_what_to_do(client: Client, files: Mapping[str, Mapping[str, bytes]]) -> None:
    client.hub.add("org/gated", files["safetensors"], gated=True)
    client.hub.add("org/private", files["safetensors"], private=True)
    client.hub.add("org/open", files["safetensors"])
    client.hub.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    client.hub.add("org/gguf", {"model-q4.gguf": b""})
    for model, options, error, words in [
        ("org/gated", {}, "AccessDenied", ("https://huggingface.co/org/gated", "hf auth login", "HF_TOKEN")),
        ("org/private", {}, "CheckpointNotFound", ("spelling", "hf auth login")),
        ("org/nothing", {}, "CheckpointNotFound", ("spelling",)),
        ("org/open", {"revision": "v9"}, "CheckpointNotFound", ("'v9'",)),
        ("org/adapter", {}, "UnsupportedFormat", ("merge_and_unload",)),
        ("org/gguf", {}, "UnsupportedFormat", ("GGUF",)),
        ("org/-bad-", {}, "CheckpointNotFound", ("org/name",)),
        ("org/open", {"offline": True}, "DownloadFailed", ("HF_HUB_OFFLINE", "local folder")),
    ]:
        answer = client.load(model, **options)
        assert answer.get("error") == error, answer
        assert all(word in answer["message"] for word in words), answer["message"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
        (ConnectionResetError("reset by peer"), "reset by peer.*try again"),
    ],
)
def test_downloads_that_break_off(failure: OSError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*args: object, **options: object) -> str:
        raise failure

    monkeypatch.setattr("rcpconv.checkpoint.download.snapshot_download", break_off)
    with pytest.raises(DownloadFailed, match=message):
        load_source("org/name")
