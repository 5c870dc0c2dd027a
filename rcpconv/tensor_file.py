"""A safetensors file written in pieces, so that no more than a piece is in memory. Knows nothing of models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rcpformat.header import lay_out, serialize_header
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
