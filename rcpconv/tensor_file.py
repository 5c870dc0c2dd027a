"""A safetensors file written and read in pieces, so that no more is in memory. Knows nothing of models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rcpformat.header import lay_out, parse_entries, read_header_json, serialize_header
from rcpformat.spec import DTYPES, TensorSpec


class TensorWriter:
    """Fills an empty file. Tensors come in any order, each at once or some rows after the other."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, TensorSpec]) -> None:
        """tensors: what the file will hold; no shape has a free dimension."""
        self._file = file
        self._entries = lay_out(tensors)
        self._start = file.write(serialize_header({}, self._entries))
        self._position = {name: entry.begin for name, entry in self._entries.items()}
        self._sha256 = {name: hashlib.sha256() for name in self._entries}

    def write(self, name: str, rows: NDArray[Any]) -> None:
        """Write a tensor, or the rows that follow those already written of it."""
        entry = self._entries[name]
        assert rows.dtype == DTYPES[entry.dtype] and rows.shape[1:] == entry.shape[1:], (name, rows.dtype, rows.shape)
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._file.seek(self._start + self._position[name])
        self._file.write(data)
        self._position[name] += data.nbytes
        self._sha256[name].update(data)

    def finish(self) -> dict[str, str]:
        """Name -> SHA-256 of each tensor's bytes, once all are there."""
        missing = [name for name, entry in self._entries.items() if self._position[name] != entry.end]
        assert not missing, missing
        return {name: digest.hexdigest() for name, digest in sorted(self._sha256.items())}


class TensorReader:
    """Reads single tensors of a file that does not change meanwhile. Holds no file open, and maps none into memory."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or a FormatError for a damaged file."""
        self._path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, self._start = read_header_json(file, size)
        header.pop("__metadata__", None)
        self._entries = parse_entries(header, size - self._start)

    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self._entries)

    def read(self, name: str) -> NDArray[Any]:
        """A tensor of its own memory. Raises KeyError, OSError, or ValueError where the file has become shorter."""
        entry = self._entries[name]
        array = np.empty(entry.shape, DTYPES[entry.dtype])
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + entry.begin)
            data = array.reshape(-1).view(np.uint8).data
            while data:
                if not (count := file.readinto(data)):
                    raise ValueError(f"{name}: the file ends before it does")
                data = data[count:]
        return array
