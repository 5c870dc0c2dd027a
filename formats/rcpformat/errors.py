"""One exception class per way a `.rcp` file can lie. Knows nothing of bytes, models or devices.

Every message names the subject, what was expected, what was found, and (where there is one) the remedy.
formats/SPEC.md, "Refusals", lists every subclass of FormatError with its condition; a test compares the two.
"""

from __future__ import annotations

import reprlib

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def brief(value: object) -> str:
    """repr of a value that came from a file, cut short so that no message grows with the file."""
    return _repr.repr(value)


class FormatError(ValueError):
    """A `.rcp` file, or data meant for one, breaks a rule of formats/SPEC.md."""


# The container.


class NotAnRcpFile(FormatError):
    """Something else: an empty file, a folder, GGUF, a pickle, a checkpoint, a Git LFS pointer."""


class TruncatedFile(FormatError):
    """The file ends before its header, or before the data that the header announces."""


class HeaderTooLarge(FormatError):
    """The header, or one value of its metadata, is longer than the limit."""


class BadJson(FormatError):
    """Text is not the JSON it must be: encoding, syntax, NaN, numbers, nesting, separators, a lone surrogate."""


class DuplicateKey(FormatError):
    """A JSON object holds the same key twice; in the header, a tensor name twice."""


class BadTensorEntry(FormatError):
    """A tensor's entry in the header does not have the three keys it must have, or they hold the wrong things."""


class UnknownDtype(FormatError):
    """A tensor's dtype is not one that the format uses."""


class TensorSizeMismatch(FormatError):
    """A tensor's offsets do not span as many bytes as its shape and dtype take."""


class TensorOverlap(FormatError):
    """Two tensors share bytes."""


class TensorGap(FormatError):
    """Bytes between two tensors belong to neither."""


class TrailingBytes(FormatError):
    """Bytes follow the last tensor."""


class Misaligned(FormatError):
    """The tensor data, or one tensor in it, does not begin at a multiple of its alignment."""


# The metadata.


class BadMetadata(FormatError):
    """A metadata entry is not what it has to be, or holds an impossible value."""


class MissingMetadata(FormatError):
    """A metadata key that every file must have is not there."""


class MetadataHashMismatch(FormatError):
    """The metadata is not what it was when the file was written."""


class MalformedVersion(FormatError):
    """The format version is not two decimal numbers with a dot between."""


class UnsupportedVersion(FormatError):
    """The file's major format version is not the one this reader was written for."""


class UnknownRequiredFeature(FormatError):
    """The file needs a feature that this reader does not have; a newer release may."""


class FeatureMismatch(FormatError):
    """The required features listed are not those that the architecture and quantization use."""


class TokenIdOutOfRange(FormatError):
    """A special token's id is not below the vocabulary size."""


class HashListMismatch(FormatError):
    """`rcp.sha256` does not list exactly the tensors in the file, or lists something that is no SHA-256."""


# Which tensors there are.


class MissingTensor(FormatError):
    """The architecture and quantization ask for a tensor that is not there."""


class UnknownTensor(FormatError):
    """A tensor that the architecture and quantization have no place for."""


class WrongDtype(FormatError):
    """A tensor's dtype is not the one that its name asks for."""


class WrongShape(FormatError):
    """A tensor's shape is not the one that its name asks for."""


class CodesShapeMismatch(WrongShape):
    """The codes of a linear layer do not fit its shape."""


class LevelsShapeMismatch(WrongShape):
    """The levels of a linear layer do not fit its shape and group size."""


class ScaleShapeMismatch(WrongShape):
    """There is not one scale for each row."""


# What is in them.


class TensorHashMismatch(FormatError):
    """A tensor's bytes are not what they were when the file was written."""


class NonZeroPadding(FormatError):
    """The unused bits in the last byte of a row of codes are not zero."""


class LevelOutOfRange(FormatError):
    """A level is -128, which no level may be."""


class DecreasingLevels(FormatError):
    """The four levels of a group are not in order."""


class BadScale(FormatError):
    """A row scale is not a finite, positive, normal number."""


class BadClip(FormatError):
    """A clip factor is not between 2^-16 and 1."""


class TableEntryOutOfRange(FormatError):
    """An int8 embedding or head entry is -128, which none may be."""


class NotFinite(FormatError):
    """A bias, gain, frequency or float16 table entry is infinite or not a number."""


class NegativeFrequency(FormatError):
    """A RoPE frequency is below zero."""


class BadSign(FormatError):
    """An entry of the rotation signs is neither 1 nor -1."""


class BadTokenizer(FormatError):
    """The tokenizer is too large, is not JSON, or has no model."""


# Not the file's fault.


class UnreadableFile(ValueError):
    """The operating system does not let the file be opened: it does not exist, or access is denied."""


class OutputExists(ValueError):
    """The output path is taken, and overwriting was not asked for."""


class OutputNotWritable(ValueError):
    """The operating system does not let the output be written: no such folder, no permission, disk full."""
