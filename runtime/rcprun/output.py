"""Writes files whole or not at all, with the usual mode. Knows nothing of what is in them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rcprun.errors import BadRequest, InputOutputError

_OTHER_PATH = "choose another path"


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn the system's refusal to write into InputOutputError, which names `path` whatever file it was about."""
    try:
        yield
    except OSError as error:
        raise InputOutputError(
            f"{path}: expected a place that can be written, found: {error.strerror or error}; {remedy}"
        ) from error


@contextmanager
def replacing(path: Path, *, force: bool, remedy: str = _OTHER_PATH) -> Iterator[Path]:
    """An empty temporary file beside `path` to write to, renamed to it at the end, removed after an error.

    Raises BadRequest when `path` exists and force is not set, InputOutputError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path, remedy):
        if not path.parent.is_dir():
            raise InputOutputError(f"{path}: {path.parent} is not a folder; {remedy}")
        if path.exists() and not force:
            raise BadRequest(f"{path}: exists already; choose another name, or --force")
        temporary.open("xb").close()
    try:
        yield temporary
        with writing(path, remedy):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
