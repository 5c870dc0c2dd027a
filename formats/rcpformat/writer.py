"""Writes `.rcp` files: two tensors in memory at a time, canonical bytes, all or nothing. Knows nothing of models."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rcpformat import spec, values
from rcpformat.errors import OutputExists, OutputNotWritable
from rcpformat.header import TensorEntry, lay_out, serialize_header
from rcpformat.metadata import RcpMetadata
from rcpformat.reader import read_structure

TensorSource = Callable[[], NDArray[Any]]

_TEMPORARY = ".rcp-{}.tmp"


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """What was written."""

    path: Path
    nbytes: int
    """Size of the file."""
    tensor_sha256: Mapping[str, str]
    """Tensor name -> lower-case hex SHA-256."""


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputNotWritable(
            f"{path}: expected a writable path, found: {error.strerror or error}; choose another, or make it writable"
        ) from error


def _lock(file: BinaryIO, *, wait: bool) -> None:
    """Hold an open file as long as it is open. Raises OSError or ImportError where that cannot be."""
    import fcntl  # which not every system has

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _clear_away(folder: Path) -> None:
    """Remove what killed writers left: temporary files that nobody holds."""
    for path in folder.glob(_TEMPORARY.format("*")):
        with suppress(OSError, ImportError), path.open("rb+") as file:
            _lock(file, wait=False)
            path.unlink()


@contextmanager
def _new_file(temporary: Path, path: Path) -> Iterator[BinaryIO]:
    removed = True
    while removed:  # which another writer may do between the next two calls
        with _output_errors(path):
            file = temporary.open("xb")
        with suppress(OSError, ImportError):
            _lock(file, wait=True)
        if removed := not os.fstat(file.fileno()).st_nlink:
            file.close()
    try:
        yield file
    finally:
        with _output_errors(path):
            file.close()


def _refuse_existing(path: Path, force: bool) -> None:
    with _output_errors(path):
        if path.is_dir():
            raise OutputNotWritable(f"{path}: expected a file name, found a folder; name a file in it")
    if not force and os.path.lexists(path):
        raise OutputExists(f"{path}: expected a free path, found a file; choose another, or overwrite it with --force")


def _require_room(path: Path, nbytes: int) -> None:
    """The file that may be overwritten stays until the new one is whole."""
    with _output_errors(path):
        free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise OutputNotWritable(
            f"{path}: expected room for {nbytes:,} bytes, found {free:,} free; make room, or choose another disk"
        )


def _header(metadata: RcpMetadata, entries: Mapping[str, TensorEntry], sha256: Mapping[str, str]) -> bytes:
    return serialize_header(metadata.to_entries(sha256), entries)


def write_rcp(
    path: str | os.PathLike[str],
    metadata: RcpMetadata,
    tensors: Mapping[str, TensorSource],
    *,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> WriteReport:
    """Write one file. Equal content gives equal bytes.

    tensors: name -> function that returns the array, for every tensor of spec.expected_tensors and any `x.*`. Each is
    called once, in the order of the file; tokenizer.json and `x.*`, whose shapes are free, once more at the start.
    check: called with the finished temporary file; what it raises keeps the file from its place.

    The data goes to a temporary file in the same folder, which then takes the name `path`; after any failure or
    interrupt it is removed, and what was at `path` stays; what a killed process left in that folder is removed first.

    Raises OutputExists, OutputNotWritable (at once where the disk has no room for the file), or the FormatError that
    fits (MissingTensor, UnknownTensor, WrongDtype, WrongShape, and those of the values).
    """
    path = Path(path)
    _refuse_existing(path, force)
    expected = spec.expected_tensors(metadata.architecture, metadata.quantization)
    values.check_names(set(tensors), set(expected))
    for name in tensors:
        if name not in expected or None in expected[name].shape:
            array = tensors[name]()
            expected[name] = spec.TensorSpec(values.dtype_name(name, array.dtype), array.shape)
    entries = lay_out(expected)

    sha256 = dict.fromkeys(entries, "0" * 64)
    header = _header(metadata, entries, sha256)
    nbytes = len(header) + max(entry.end for entry in entries.values())
    read_structure(io.BytesIO(header), nbytes)

    def linear_shape(name: str) -> tuple[int, int]:
        return spec.linear_shape(metadata.architecture, spec.linear_kind(name))

    _clear_away(path.parent)
    _require_room(path, nbytes)
    temporary = path.parent / _TEMPORARY.format(secrets.token_hex(8))
    try:
        with _new_file(temporary, path) as file, ThreadPoolExecutor(1) as pool:
            with _output_errors(path):
                file.write(header)
            hashed: list[Future[Any]] = []
            for name in entries:
                array = np.asarray(tensors[name](), order="C")
                values.check_array(name, array, expected[name])
                data = array.reshape(-1).view(np.uint8).data
                hashed.append(pool.submit(hashlib.sha256, data))
                values.check_values(name, array, linear_shape)
                with _output_errors(path):
                    file.write(data)
                wait(hashed[-2:-1])  # so that no more than two tensors are in memory
            sha256 |= {name: digest.result().hexdigest() for name, digest in zip(entries, hashed, strict=True)}
            with _output_errors(path):
                file.seek(0)
                file.write(_header(metadata, entries, sha256))
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            _refuse_existing(path, force)
            with _output_errors(path):
                os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return WriteReport(path=path, nbytes=nbytes, tensor_sha256=sha256)
