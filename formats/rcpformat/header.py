"""The safetensors header: strict parsing, tensor layout, canonical bytes (SPEC section 1). Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from rcpformat.errors import (
    BadMetadata,
    BadTensorEntry,
    HeaderTooLarge,
    Misaligned,
    NotAnRcpFile,
    TensorGap,
    TensorOverlap,
    TensorSizeMismatch,
    TrailingBytes,
    TruncatedFile,
    UnknownDtype,
    brief,
)
from rcpformat.spec import (
    DTYPES,
    KEY_VERSION,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_METADATA_VALUE_BYTES,
    MAX_NAME,
    TensorSpec,
)
from rcpformat.strict_json import dump_json, parse_json

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
_MAX_INTEGER = (1 << 63) - 1
_OTHER_FORMATS = {
    b"GGUF": "a GGUF file; rcp-run reads .rcp files only",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; convert the model with `rcpconv quantize`",
    b"\x80\x02": "a Python pickle, perhaps a PyTorch checkpoint; convert the model with `rcpconv quantize`",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull` or `rcpconv pull`",
    b"<": "HTML or XML, perhaps an error page that was saved; download the file again",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header. begin and end are in bytes from the start of the tensor data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A parsed header. data_start is the file offset of the tensor data."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    data_start: int


def read_header_json(file: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], int]:
    """The header of an open file as parsed JSON, and the offset of the tensor data.

    Reads no more than the header, and that only once its length is known to be within the limit and the file.
    Raises NotAnRcpFile, HeaderTooLarge, TruncatedFile, Misaligned, BadJson or DuplicateKey.
    """
    start = file.read(_LENGTH_BYTES + max(map(len, _OTHER_FORMATS)))
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    opens_object = start[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
    if not opens_object or length > MAX_HEADER_BYTES:
        for magic, description in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise NotAnRcpFile(f"expected a .rcp file, found {description}")
    if not opens_object:
        found = f"a file that begins with {start[:16]!r}" if start else "an empty file"
        raise NotAnRcpFile(f"expected a .rcp file, found {found}; it may be damaged or of another format")
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"header: expected at most {MAX_HEADER_BYTES} bytes, found a length of {length}")
    data_start = _LENGTH_BYTES + length
    if data_start > file_bytes:
        raise TruncatedFile(f"header: expected {length} bytes, found the end of the file; download or copy it again")
    if data_start % _ALIGNMENT:
        raise Misaligned(f"header: expected tensor data at a multiple of {_ALIGNMENT}, found it at {data_start}")
    file.seek(_LENGTH_BYTES)
    header = parse_json(file.read(length), "header")
    return header, data_start  # an object: its first byte is {


def take_metadata(header: dict[str, Any]) -> dict[str, str]:
    """Remove and return `__metadata__`. Raises NotAnRcpFile, HeaderTooLarge or BadMetadata."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise BadMetadata(f"{_METADATA}: expected an object of strings, found {brief(metadata)}")
    if not any(key.startswith("rcp.") for key in metadata):
        raise NotAnRcpFile(
            f"expected a .rcp file, found safetensors without {KEY_VERSION}; "
            f"if this is a model's checkpoint, convert it with `rcpconv quantize`"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise BadMetadata(f"{brief(key)}: expected a string, found {brief(value)}")
        if "\0" in key or "\0" in value:
            raise BadMetadata(f"{brief(key)}: expected metadata without U+0000, found one")
        size = len(value.encode())
        if size > MAX_METADATA_VALUE_BYTES:
            raise HeaderTooLarge(f"{brief(key)}: expected at most {MAX_METADATA_VALUE_BYTES} bytes, found {size}")
    return metadata


def _natural(name: str, key: str, value: object, low: int) -> int:
    if type(value) is not int or not low <= value <= _MAX_INTEGER:
        raise BadTensorEntry(f"{name}: expected integers from {low} to 2^63 - 1 in {key}, found {brief(value)}")
    return value


def _parse_entry(name: str, value: object) -> TensorEntry:
    if len(name) > MAX_NAME:
        raise BadTensorEntry(f"{brief(name)}: expected a name of at most {MAX_NAME} characters, found {len(name)}")
    if not isinstance(value, dict) or set(value) != set(_ENTRY_KEYS):
        raise BadTensorEntry(f"{name}: expected an object with exactly {', '.join(_ENTRY_KEYS)}, found {brief(value)}")
    dtype, shape, offsets = (value[key] for key in _ENTRY_KEYS)
    if not isinstance(dtype, str):
        raise BadTensorEntry(f"{name}: expected the name of a dtype, found {brief(dtype)}")
    if dtype not in DTYPES:
        raise UnknownDtype(f"{name}: expected a dtype of {', '.join(DTYPES)}, found {brief(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise BadTensorEntry(f"{name}: expected a shape of at most {MAX_DIMENSIONS} entries, found {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise BadTensorEntry(f"{name}: expected data_offsets [begin, end], found {brief(offsets)}")
    size = DTYPES[dtype].itemsize
    for dimension in shape:
        size *= _natural(name, "shape", dimension, 1)
    begin, end = (_natural(name, "data_offsets", offset, 0) for offset in offsets)
    if end - begin != size:
        raise TensorSizeMismatch(
            f"{name}: expected {size} bytes for shape {shape} of {dtype}, found data_offsets {[begin, end]}"
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def parse_entries(entries: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    """Validate the tensor entries against each other and against the size of the tensor data.

    Raises BadTensorEntry, UnknownDtype, TensorSizeMismatch, Misaligned, TensorOverlap, TensorGap, TruncatedFile
    or TrailingBytes.
    """
    tensors = {name: _parse_entry(name, value) for name, value in entries.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        if entry.begin < position:
            raise TensorOverlap(f"{name}: expected data from byte {position}, found it at {entry.begin}, in another's")
        if entry.begin > position:
            raise TensorGap(f"{name}: expected data from byte {position}, found it at {entry.begin}, after a gap")
        if entry.begin % DTYPES[entry.dtype].itemsize:
            raise Misaligned(f"{name}: expected {entry.dtype} data at a multiple of its size, found {entry.begin}")
        position = entry.end
    if position > data_bytes:
        raise TruncatedFile(f"data: expected {position} bytes of data, found {data_bytes}; download or copy it again")
    if position < data_bytes:
        raise TrailingBytes(
            f"data: expected its end after {position} bytes of data, found {data_bytes - position} more"
        )
    return tensors


def lay_out(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorEntry]:
    """Canonical order and offsets. No shape may have a free dimension left."""
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name, form in sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
        shape = tuple(size for size in form.shape if size is not None)
        assert len(shape) == len(form.shape), f"{name} has a free dimension"
        end = position + DTYPES[form.dtype].itemsize * math.prod(shape)
        entries[name] = TensorEntry(form.dtype, shape, position, end)
        position = end
    return entries


def serialize_header(metadata: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> bytes:
    """The canonical header with its length in front; `tensors` in the order of lay_out. Raises HeaderTooLarge."""
    members = [f"{dump_json(_METADATA, 'header')}:{dump_json(dict(metadata), 'metadata')}"]
    for name, entry in tensors.items():
        shape = ",".join(map(str, entry.shape))
        members.append(
            f'{dump_json(name, "tensor name")}:{{"dtype":"{entry.dtype}","shape":[{shape}],'
            f'"data_offsets":[{entry.begin},{entry.end}]}}'
        )
    text = ("{" + ",".join(members) + "}").encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"header: expected at most {MAX_HEADER_BYTES} bytes, found {len(text)}")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
