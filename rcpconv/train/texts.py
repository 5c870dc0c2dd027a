"""Reads training texts, document by document: files, folders, the Hub, and what is bundled. Knows nothing of tokens.

A plain-text file holds documents separated by two or more blank lines. A .jsonl file holds one a line, as `text` or as
chat `messages`. Both may be compressed (.gz, .xz).
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rcpconv.config import DEFAULT_CORPUS, DEMO, SELF
from rcpconv.errors import BadTrainingData, DownloadFailed
from rcpconv.hub_data import fetch

Render = Callable[[list[Any]], str | None]
"""Chat messages -> the text that the model's chat template makes of them; None when it has no template.

Raises BadTrainingData when the template fails."""

HUB_PREFIX = "hf:"
TEXT_SUFFIXES = (".txt", ".text", ".md")
LINES_SUFFIXES = (".jsonl", ".ndjson")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

LONGEST_PIECE = 100_000
"""Characters; longer documents come in pieces, cut at line ends, so that memory stays bounded."""
_READ_CHARACTERS = 1 << 20
_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[ \t\r]*\n){2,}")

# The default corpus: WikiText-2 raw, as llama.cpp's scripts fetch it, and Dolly's instructions. Both are CC BY-SA 3.0.
_WIKITEXT = ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.train.raw")
_DOLLY = ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl")
_WIKITEXT_ARTICLE = re.compile(r"^ = [^=\n]+ = \n", re.MULTILINE)


class Piece(NamedTuple):
    """A document, or a part of a long one: `begins` and `ends` tell whether its ends are the document's."""

    text: str
    begins: bool
    ends: bool


def pieces(document: str) -> Iterator[Piece]:
    """The document in pieces of at most LONGEST_PIECE characters, cut after line ends where there are any."""
    start = 0
    while start < len(document):
        stop = min(start + LONGEST_PIECE, len(document))
        if stop < len(document):
            line_end = document.rfind("\n", start, stop)
            stop = line_end + 1 if line_end >= start else stop
        yield Piece(document[start:stop], start == 0, stop == len(document))
        start = stop


def read_source(source: str, render: Render) -> list[Iterator[Piece]]:
    """The documents of one --data value: one stream, or several that are to be mixed. Nothing is read yet but names.

    Raises BadTrainingData, also while a stream is read.
    """
    if source == DEFAULT_CORPUS:
        return [_cut(_wikitext()), _cut(_dolly(render))]
    if source == DEMO:
        return [_read_file(demo_text("train.txt"), render)]
    if source.startswith(HUB_PREFIX):
        return [_cut(_read_hub(source, render))]
    path = Path(source).expanduser()
    if path.is_dir():
        return [_read_folder(path, render)]
    if not path.is_file():
        raise BadTrainingData(
            f"{source}: no such file or folder; give one, {HUB_PREFIX}org/name for a Hub dataset, {SELF}, {DEMO} or "
            f"{DEFAULT_CORPUS}"
        )
    return [_read_file(path, render)]


def demo_text(name: str) -> Path:
    """A text that is bundled with the demo model: train.txt or heldout.txt."""
    return Path(str(resources.files("rcpconv") / "demo" / name))


def _cut(documents: Iterable[str]) -> Iterator[Piece]:
    for document in documents:
        if not document.isspace():
            yield from pieces(document)


def _bare_suffix(path: Path) -> str:
    """The suffix under a compression's: ".jsonl" for a.jsonl.xz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _OPENERS else path.suffix.lower()


def _read_folder(folder: Path, render: Render) -> Iterator[Piece]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    known = [path for path in paths if _bare_suffix(path) in TEXT_SUFFIXES + LINES_SUFFIXES]
    if not known:
        raise BadTrainingData(
            f"{folder}: expected {', '.join(TEXT_SUFFIXES + LINES_SUFFIXES)} files (.gz and .xz too), found none among "
            f"{len(paths)} files"
        )
    for path in known:
        yield from _read_file(path, render)


def _read_file(path: Path, render: Render) -> Iterator[Piece]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if _bare_suffix(path) in LINES_SUFFIXES:
                yield from _cut(_read_lines(path, file, render))
            else:
                yield from split_documents(file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise BadTrainingData(f"{path}: cannot be read as UTF-8 text ({error}); give another file") from error


def split_documents(file: TextIO) -> Iterator[Piece]:
    """Documents of plain text, in pieces; memory stays bounded however long a document is."""
    rest, begins = "", True
    while block := file.read(_READ_CHARACTERS):
        *documents, rest = _BETWEEN_DOCUMENTS.split(rest + block)
        for document in documents:
            yield from _part(document, begins)
            begins = True
        if len(rest) > LONGEST_PIECE:
            *parts, last = pieces(rest)
            for piece in parts:
                yield Piece(piece.text, begins and piece.begins, False)
            rest, begins = last.text, False
    yield from _part(rest, begins)


def _part(text: str, begins: bool) -> Iterator[Piece]:
    """Pieces of the last part of a document; `begins` tells whether it is the first part too."""
    if not text.isspace():
        for piece in pieces(text.lstrip("\n") if begins else text):
            yield piece._replace(begins=begins and piece.begins)


def _read_lines(path: Path, file: TextIO, render: Render) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadTrainingData(f"{path}: line {number}: expected a JSON object ({error})") from error
        yield document_of(row, render, f"{path}: line {number}")


def document_of(row: object, render: Render, where: str) -> str:
    """The text of a dataset row: its `text`, or its `messages` through the chat template. Raises BadTrainingData."""
    if isinstance(row, Mapping):
        if isinstance(row.get("text"), str):
            return _encodable(str(row["text"]), where)
        messages = row.get("messages")
        if isinstance(messages, list) and all(
            isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
            for message in messages
        ):
            text = _rendered(messages, render, where)
            if text is None:
                raise BadTrainingData(
                    f"{where}: chat messages, but this model has no chat template to render them; give rows a text"
                )
            return _encodable(text, where)
    found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise BadTrainingData(
        f"{where}: expected an object with a string `text`, or with `messages` of role and content; found {found}"
    )


def _rendered(messages: list[Any], render: Render, where: str) -> str | None:
    try:
        return render(messages)
    except BadTrainingData as error:
        raise BadTrainingData(f"{where}: {error}") from error


def _encodable(text: str, where: str) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadTrainingData(f"{where}: not Unicode text ({error.reason}); mend or remove it") from error
    return text


def _read_hub(source: str, render: Render) -> Iterator[str]:
    """hf:org/name[:config[:split]] through the `datasets` library, streamed."""
    name, config, split, *more = (source.removeprefix(HUB_PREFIX) + "::").split(":")
    if not name or any(more):
        raise BadTrainingData(f"{source}: expected {HUB_PREFIX}org/name[:config[:split]]")
    try:
        import datasets
    except ImportError:
        raise BadTrainingData(
            f"{source}: needs the datasets library; install it with: pip install 'rcpconv[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield document_of(row, render, f"{source}: row {number}")
    except BadTrainingData:
        raise
    except Exception as error:  # datasets raises whatever its many builders and the network raise
        reason = " ".join(str(error).split())[:300]
        raise BadTrainingData(f"{source}: the dataset cannot be read ({reason}); check its name and access") from error


def _fetch(repository: str, file: str) -> Path:
    try:
        return fetch(repository, file)
    except DownloadFailed as error:
        raise BadTrainingData(f"the default corpus: {error}, or give texts of your own with --data") from error


def _wikitext() -> Iterator[str]:
    repository, archive, member = _WIKITEXT
    path = _fetch(repository, archive)
    try:
        with zipfile.ZipFile(path) as files, io.TextIOWrapper(files.open(member), encoding="utf-8") as file:
            text = file.read()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise BadTrainingData(f"{path}: not the WikiText-2 archive ({error}); delete it and try again") from error
    starts = [match.start() for match in _WIKITEXT_ARTICLE.finditer(text)]
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text[start:stop]


def _dolly(render: Render) -> Iterator[str]:
    path = _fetch(*_DOLLY)
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            question = "\n\n".join(part for part in (row["instruction"], row["context"]) if part)
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}]
            yield _rendered(chat, render, "the default corpus") or f"{question}\n\n{row['response']}"
