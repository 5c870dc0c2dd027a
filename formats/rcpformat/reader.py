"""Opens `.rcp` files: structure checked at once, values at the first access to a tensor. Knows nothing of running them.

A file that shrinks while it is open kills the process (SIGBUS), as any mapped file does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from rcpformat import spec, values
from rcpformat.architecture import Architecture, Quantization
from rcpformat.codec import PackedLinear
from rcpformat.errors import (
    BadTokenizer,
    FormatError,
    HashListMismatch,
    NotAnRcpFile,
    TensorHashMismatch,
    UnreadableFile,
)
from rcpformat.header import TensorEntry, parse_entries, read_header_json, take_metadata
from rcpformat.metadata import RcpMetadata, check_entries

_VERIFIED_AT_A_TIME = 4
"""Tensors that are hashed and checked side by side."""


@dataclass(frozen=True)
class Structure:
    """What a file's header says, checked against itself and against the file's size."""

    metadata: RcpMetadata
    tensors: Mapping[str, TensorEntry]
    sha256: Mapping[str, str]
    data_start: int


def read_structure(file: BinaryIO, file_bytes: int) -> Structure:
    """Read the header of an open file of `file_bytes` bytes and apply every rule that needs no tensor data.

    Raises the FormatError that fits.
    """
    header, data_start = read_header_json(file, file_bytes)
    entries = take_metadata(header)
    check_entries(entries)
    tensors = parse_entries(header, file_bytes - data_start)
    metadata, sha256 = RcpMetadata.from_entries(entries)
    expected = spec.expected_tensors(metadata.architecture, metadata.quantization)
    values.check_names(set(tensors), set(expected))
    for name, tensor_spec in expected.items():
        values.check_spec(name, tensors[name].dtype, tensors[name].shape, tensor_spec)
    if sha256.keys() != tensors.keys():
        odd = min(sha256.keys() ^ tensors.keys())
        raise HashListMismatch(f"{spec.KEY_SHA256}: expected exactly the tensors in the file, found {odd} in one only")
    size = tensors[spec.TOKENIZER].nbytes
    if size > spec.MAX_TOKENIZER_BYTES:
        raise BadTokenizer(f"{spec.TOKENIZER}: expected at most {spec.MAX_TOKENIZER_BYTES} bytes, found {size}")
    return Structure(metadata, tensors, sha256, data_start)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path in front of every FormatError's message."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from error


class RcpFile:
    """An open `.rcp` file, mapped into memory. A context manager; arrays taken from it stay valid after close."""

    def __init__(self, path: Path, structure: Structure, data: NDArray[np.uint8]) -> None:
        """Use RcpFile.open. data: the file's bytes from data_start on."""
        self.path = path
        self.metadata = structure.metadata
        self.header_tensors: Mapping[str, TensorEntry] = structure.tensors
        self._sha256 = structure.sha256
        self._data: NDArray[np.uint8] | None = data
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Self:
        """Open and check everything that costs no pass over the data; with `verify`, everything.

        Raises UnreadableFile, or the FormatError that fits.
        """
        path = Path(path)
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                found = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
                raise NotAnRcpFile(f"{path}: expected a .rcp file, found {found}")
            with path.open("rb") as file, _naming(path):
                file_bytes = os.fstat(file.fileno()).st_size
                structure = read_structure(file, file_bytes)
                mapping = mmap.mmap(file.fileno(), file_bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UnreadableFile(f"{path}: expected a readable .rcp file, found: {error.strerror}") from error
        opened = cls(path, structure, np.frombuffer(mapping, np.uint8, offset=structure.data_start))
        if verify:
            opened.verify()
        return opened

    @property
    def architecture(self) -> Architecture:
        """The model's shape."""
        return self.metadata.architecture

    @property
    def quantization(self) -> Quantization:
        """Bit widths, group sizes and rotations."""
        return self.metadata.quantization

    def _view(self, name: str) -> NDArray[Any]:
        assert self._data is not None, f"{self.path} is closed"
        entry = self.header_tensors[name]
        view: NDArray[Any] = self._data[entry.begin : entry.end].view(spec.DTYPES[entry.dtype])
        return view.reshape(entry.shape)

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view on the mapped file. The first access checks the tensor's values: one pass over it.

        Raises KeyError for a name that is not in header_tensors, and the FormatError that fits for bad values.
        """
        array = self._view(name)
        if name not in self._checked:
            with _naming(self.path):
                values.check_values(name, array, self._linear_shape)
            self._checked.add(name)
        return array

    def _linear_shape(self, name: str) -> tuple[int, int]:
        return spec.linear_shape(self.architecture, spec.linear_kind(name))

    def linear(self, name: str) -> PackedLinear:
        """One linear layer ("layers.0.attn.q"), its values checked. Raises as tensor does."""
        return PackedLinear(
            name=name,
            shape=self._linear_shape(name),
            group_size=self.quantization.group_of(name),
            codes=self.tensor(f"{name}.codes"),
            levels=self.tensor(f"{name}.levels"),
            scale=self.tensor(f"{name}.scale"),
            bias=self.tensor(f"{name}.bias") if f"{name}.bias" in self.header_tensors else None,
        )

    def tokenizer_json(self) -> bytes:
        """The bytes of tokenizer.json. Raises BadTokenizer."""
        return self.tensor(spec.TOKENIZER).tobytes()

    def sha256(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, which is what the header says. Raises KeyError, TensorHashMismatch."""
        found = hashlib.sha256(self._view(name).reshape(-1).view(np.uint8).data).hexdigest()
        if found != self._sha256[name]:
            raise TensorHashMismatch(
                f"{self.path}: {name}: expected SHA-256 {self._sha256[name]}, found {found}; "
                f"the file was changed or damaged: copy or download it again"
            )
        return found

    def verify(self) -> None:
        """Check every tensor's SHA-256 and every value rule of SPEC section 7: a second or a few a gigabyte.

        Raises TensorHashMismatch, or the FormatError that fits.
        """
        with ThreadPoolExecutor(_VERIFIED_AT_A_TIME) as pool:
            try:
                for _ in pool.map(self._verify, self.header_tensors):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _verify(self, name: str) -> None:
        self.sha256(name)
        self.tensor(name)

    def close(self) -> None:
        """Let go of the mapping; it ends when the last array taken from it is gone."""
        self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
