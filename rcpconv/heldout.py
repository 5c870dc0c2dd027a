"""The texts that perplexity is measured on. Knows nothing of models or tokens."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rcpconv.config import DEMO
from rcpconv.errors import DownloadFailed, EvaluationFailed
from rcpconv.hub_data import fetch
from rcpconv.train.texts import demo_text


@dataclass(frozen=True)
class Text:
    """A text to evaluate on, and where it comes from."""

    name: str
    content: str


def read_text(path: Path) -> Text:
    """A UTF-8 file as a Text. Raises EvaluationFailed."""
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise EvaluationFailed(f"{path}: expected plain UTF-8 text: {error}") from error
    except OSError as error:
        raise EvaluationFailed(f"{path}: expected a readable text file, found: {error.strerror or error}") from error


def default_text(model: str | None) -> Text:
    """The held-out text of the bundled model when `model` is "demo", else the WikiText-2 test set from the Hub."""
    if model == DEMO:
        return Text("demo, held-out", demo_text("heldout.txt").read_text(encoding="utf-8"))
    return wikitext2_test()


def fetch_wikitext2() -> Path:
    """The archive that WikiText-2 is in.

    Raises DownloadFailed when the Hub cannot be reached and the text is not in its cache.
    """
    try:
        return fetch("ggml-org/ci", "wikitext-2-raw-v1.zip")
    except DownloadFailed as error:
        raise DownloadFailed(f"the default text: {error}, or name a text with --text FILE") from error


def wikitext2_test() -> Text:
    """The raw WikiText-2 test set, its lines joined by blank lines as the quantization papers do.

    Raises DownloadFailed: see fetch_wikitext2.
    """
    with zipfile.ZipFile(fetch_wikitext2()) as content:
        lines = io.StringIO(content.read("wikitext-2-raw/wiki.test.raw").decode()).readlines()
    return Text("WikiText-2 test", "\n\n".join("" if line.isspace() else line for line in lines))
