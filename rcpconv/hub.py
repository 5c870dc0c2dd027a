"""Publishes a `.rcp` file on the Hugging Face Hub. Knows nothing of how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpconv.errors import PushFailed
from rcpconv.inspection import model_size
from rcpconv.modelcard import MARK, model_card, naming_duty
from rcpformat import spec
from rcpformat.reader import RcpFile

_SIGN_IN = (
    "run `hf auth login`, or set HF_TOKEN to a token with write permission (https://huggingface.co/settings/tokens)"
)


@dataclass(frozen=True)
class Pushed:
    """What an upload did."""

    url: str
    """Of the commit."""
    warnings: tuple[str, ...]
    """What the user should know: duties that were not met, a model card that was left alone."""


def push(path: Path, repository: str, *, private: bool = False, evaluation: Path | None = None) -> Pushed:
    """Verify a file and upload it with a generated model card.

    repository: "user/repo", created when it does not exist, private if `private`. A README.md there that rcpconv did
    not write stays as it is. evaluation: what `rcpconv eval --json` wrote about this file, for the card.
    Raises FormatError for a damaged file and PushFailed, with what to do, for what the Hub refuses.
    """
    with RcpFile.open(path, verify=True) as file:
        metadata, tokenizer_bytes = file.metadata, file.header_tensors[spec.TOKENIZER].nbytes
    sizes = model_size(metadata.architecture, metadata.quantization, metadata.provenance, tokenizer_bytes)
    card = model_card(
        repository,
        path.name,
        metadata,
        file_bytes=path.stat().st_size,
        fp16_bytes=sizes.fp16_bytes,
        evaluation=None if evaluation is None else _read_evaluation(evaluation, path),
    )
    warnings = [naming_duty(repository, metadata.provenance)]
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="rcpconv")
    with _explained(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path.name, path)]
        if _may_write_card(api, repository):
            operations.append(CommitOperationAdd("README.md", card.encode()))
        else:
            warnings.append(f"{repository}: README.md was not written by rcpconv, so it stays as it is")
        commit = api.create_commit(repository, operations, commit_message=f"Upload {path.name}")
    return Pushed(str(commit.commit_url), tuple(warning for warning in warnings if warning is not None))


def _read_evaluation(path: Path, model: Path) -> Mapping[str, Any]:
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        evaluated = [row["sha256"] for row in evaluation["models"] if row["sha256"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PushFailed(f"{path}: expected the JSON that `rcpconv eval --json` writes: {error}") from error
    if evaluated != [file_sha256(model)]:
        raise PushFailed(f"{path}: is not about {model}; run `rcpconv eval --rcp {model} --json {path}`")
    return evaluation  # type: ignore[no-any-return]


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _may_write_card(api: Any, repository: str) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        readme = Path(api.hf_hub_download(repository, "README.md"))
    except EntryNotFoundError:
        return True
    return MARK in readme.read_text(encoding="utf-8")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what the Hub's client raises into PushFailed, saying what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise PushFailed(f"{repository}: not the name of a repository, user/repo: {_first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or _first_line(error)
        remedy = {
            401: f"the Hub does not know who you are; {_SIGN_IN}",
            403: f"your token may not write there; {_SIGN_IN}, of an account that may write to this namespace",
            404: f"no such repository, or your token cannot see it; {_SIGN_IN}",
        }.get(status, "try again later; what was uploaded already is not sent again")
        raise PushFailed(f"{repository}: {remedy} ({status}: {reason})") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP library's own
        raise PushFailed(
            f"{repository}: the Hub could not be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE: "
            f"{_first_line(error)}"
        ) from error
    except RuntimeError as error:  # how the client reports a broken upload
        reason = _first_line(error.__cause__ or error)
        raise PushFailed(f"{repository}: the upload broke off; run the command again: {reason}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
