"""Every kind of training text, and what is said about those that cannot be read."""

import gzip
import io
import json
import lzma
import socket
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rcpconv.errors import BadTrainingData
from rcpconv.train import texts
from rcpconv.train.texts import Piece, pieces, read_source, split_documents


def no_template(messages: list[Any]) -> str | None:
    return None


def joined(messages: list[Any]) -> str | None:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def read(source: str | Path, render: texts.Render = no_template) -> list[str]:
    """The documents of a source, put together from their pieces."""
    documents: list[str] = []
    for stream in read_source(str(source), render):
        for piece in stream:
            if piece.begins:
                documents.append("")
            documents[-1] += piece.text
    return documents


PLAIN = "One.\n\nStill one.\n\n\nTwo: ü\n  \n\t\n\n    indented three\n"
DOCUMENTS = ["One.\n\nStill one.", "Two: ü", "    indented three\n"]


def test_plain_text_is_split_at_two_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PLAIN, encoding="utf-8")
    assert read(path) == DOCUMENTS


def test_any_other_suffix_is_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "README"
    path.write_text(PLAIN, encoding="utf-8")
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize(("suffix", "opener"), [(".txt.gz", gzip.open), (".txt.xz", lzma.open)])
def test_compressed_text(tmp_path: Path, suffix: str, opener: Any) -> None:
    path = tmp_path / f"a{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(PLAIN)
    assert read(path) == DOCUMENTS


def test_json_lines_with_text_or_messages(tmp_path: Path) -> None:
    rows = [{"text": "first", "id": 1}, {"messages": [{"role": "user", "content": "hi"}]}]
    content = "\n".join(map(json.dumps, rows)) + "\n\n"
    for path, opener in ((tmp_path / "a.jsonl", open), (tmp_path / "b.jsonl.xz", lzma.open)):
        with opener(path, "wt") as file:
            file.write(content)
        assert read(path, joined) == ["first", "<user>hi"]


def test_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "sub" / "c.md").write_text("third")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["first", "second", "third"]


def test_demo_text_is_bundled() -> None:
    assert sum(map(len, read("demo"))) > 100_000


@pytest.mark.parametrize("length", [10, 1000, 12_345])
def test_documents_do_not_depend_on_how_the_file_is_read(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    text = "\n\n\n".join(f"Document {i}.\nLine two\n\nof it." * (1 + i % 5) for i in range(200))
    whole = list(split_documents(io.StringIO(text)))
    monkeypatch.setattr(texts, "_READ_CHARACTERS", length)
    assert list(split_documents(io.StringIO(text))) == whole
    assert len(whole) == 200


def test_long_documents_come_in_pieces_cut_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_PIECE", 50)
    monkeypatch.setattr(texts, "_READ_CHARACTERS", 120)
    document = "".join(f"line number {i}\n" for i in range(40))
    found = list(split_documents(io.StringIO(document + "\n\n\nshort")))
    assert "".join(piece.text for piece in found) == document.rstrip("\n") + "short"
    assert all(len(piece.text) <= 50 for piece in found)
    assert all(piece.text.endswith("\n") for piece in found[:-2])
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 2) + [True]
    assert [piece.ends for piece in found] == [False] * (len(found) - 2) + [True, True]


def test_pieces_of_a_document_without_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_PIECE", 4)
    assert list(pieces("abcdefg")) == [Piece("abcd", True, False), Piece("efg", False, True)]
    assert list(pieces("")) == []


def test_blank_documents_are_left_out() -> None:
    assert list(split_documents(io.StringIO(" \n\n\n\n\nx" + "\n" * 9 + " " * 1000))) == [Piece("x", True, True)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": 5}\n', r"a\.jsonl: line 2: expected an object with a string `text`"),
        ("a.jsonl", b"not json\n", r"a\.jsonl: line 1: expected a JSON object"),
        ("a.jsonl", b'["text"]\n', r"line 1: expected an object .* found list"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"found \['prompt'\]"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"no chat template"),
        ("a.jsonl", b'{"messages": ["x"]}\n', r"`messages` of role and content"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: cannot be read as UTF-8 text"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], r"a\.txt\.gz: cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadTrainingData, match=message):
        read(tmp_path / name)


def test_missing_text_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadTrainingData, match=r"nowhere\.txt: no such file or folder; give one, hf:"):
        read("nowhere.txt")
    with pytest.raises(BadTrainingData, match=r"expected \.txt, .* found none among 0 files"):
        read(tmp_path)


class FakeDatasets(types.ModuleType):
    """Stands in for the optional library."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__("datasets")
        self.rows = rows
        self.calls: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[Any]:
        self.calls.append((name, config, split, streaming))
        if name == "no/such":
            raise RuntimeError("Dataset 'no/such' doesn't exist on the Hub")
        return iter(self.rows)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([{"text": "a"}, {"messages": [{"role": "user", "content": "b"}]}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read("hf:org/name", joined) == ["a", "<user>b"]
    assert read("hf:org/name:en:validation", joined) == ["a", "<user>b"]
    assert fake.calls == [("org/name", None, "train", True), ("org/name", "en", "validation", True)]
    with pytest.raises(BadTrainingData, match=r"hf:no/such: the dataset cannot be read \(Dataset 'no/such'"):
        read("hf:no/such")
    with pytest.raises(BadTrainingData, match=r"expected hf:org/name"):
        read("hf:a:b:c:d")
    fake.rows = [{"question": "x"}]
    with pytest.raises(BadTrainingData, match=r"hf:org/name: row 1: expected an object"):
        read("hf:org/name")


def test_hub_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadTrainingData, match=r"pip install 'rcpconv\[datasets\]'"):
        read("hf:org/name")


def fake_hub(folder: Path) -> Any:
    """hf_hub_download for the two files of the default corpus."""
    wikitext = " \n = First = \n \n Text . \n = = Section = = \n \n More . \n \n = Second = \n \n Text @-@ two . \n"
    with zipfile.ZipFile(folder / "wikitext-2-raw-v1.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.train.raw", wikitext)
    row = {"instruction": "Say hi.", "context": "", "response": "Hi.", "category": "x"}
    rows = [row, row | {"context": "Politely."}]
    (folder / "databricks-dolly-15k.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lambda repository, file, **_: str(folder / file)


def test_default_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """WikiText-2 by article and Dolly's instructions, through the chat template where there is one."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake_hub(tmp_path))
    articles = [" = First = \n \n Text . \n = = Section = = \n \n More . \n \n", " = Second = \n \n Text @-@ two . \n"]
    assert read("default") == [*articles, "Say hi.\n\nHi.", "Say hi.\n\nPolitely.\n\nHi."]
    assert read("default", joined)[2] == "<user>Say hi.<assistant>Hi."
    (tmp_path / "wikitext-2-raw-v1.zip").write_bytes(b"no zip")
    with pytest.raises(BadTrainingData, match=r"not the WikiText-2 archive"):
        read("default")


def test_default_corpus_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, without the client's retries: the Hub is asked whether it is there at all."""
    from huggingface_hub import constants, errors

    def cached_only(*arguments: Any, local_files_only: bool = False, **more: Any) -> str:
        assert local_files_only, "the client would retry for half a minute"
        raise errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached_only)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(BadTrainingData) as found:
            read("default")
    assert str(found.value) == (
        "the default corpus: ggml-org/ci/wikitext-2-raw-v1.zip: not in the cache, and the Hub "
        f"({constants.ENDPOINT}) cannot be reached; check the network, HF_HUB_OFFLINE and HF_ENDPOINT, "
        "or give texts of your own with --data"
    )


def test_a_download_that_fails_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **more: Any) -> str:
        raise OSError("No space left on device. " + "x" * 500)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    monkeypatch.setattr("rcpconv.hub_data.reachable", lambda: True)
    with pytest.raises(BadTrainingData, match=r"failed \(No space left on device\. x{500}\); try again, or give texts"):
        read("default")
