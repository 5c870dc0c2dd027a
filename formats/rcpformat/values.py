"""What tensors may hold: the dtype, shape and value rules of SPEC section 7. Knows nothing of files.

The value rules cost one pass over a tensor, in pieces, so that a table of gigabytes needs no second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpformat import spec
from rcpformat.errors import (
    BadClip,
    BadScale,
    BadSign,
    BadTokenizer,
    CodesShapeMismatch,
    DecreasingLevels,
    FormatError,
    LevelOutOfRange,
    LevelsShapeMismatch,
    MissingTensor,
    NegativeFrequency,
    NonZeroPadding,
    NotFinite,
    ScaleShapeMismatch,
    TableEntryOutOfRange,
    UnknownDtype,
    UnknownTensor,
    WrongDtype,
    WrongShape,
)
from rcpformat.strict_json import parse_json

Array = NDArray[Any]

_SHAPE_ERRORS = {"codes": CodesShapeMismatch, "levels": LevelsShapeMismatch, "scale": ScaleShapeMismatch}
_PIECE = 1 << 20


def check_spec(name: str, dtype: str, shape: tuple[int, ...], expected: spec.TensorSpec) -> None:
    """Raise WrongDtype or (a subclass of) WrongShape when dtype (safetensors name) or shape is not the expected one."""
    if dtype != expected.dtype:
        raise WrongDtype(f"{name}: expected dtype {expected.dtype}, found {dtype}")
    fits = len(shape) == len(expected.shape) and all(
        want in (None, have) for want, have in zip(expected.shape, shape, strict=True)
    )
    if not fits:
        wanted = [size if size is not None else "any" for size in expected.shape]
        raise _SHAPE_ERRORS.get(name.rpartition(".")[2], WrongShape)(
            f"{name}: expected shape {wanted}, found {list(shape)}; architecture, group size and tensor must agree"
        )


def dtype_name(name: str, dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy dtype. Raises UnknownDtype for those that the format does not use."""
    for known, candidate in spec.DTYPES.items():
        if candidate == dtype:
            return known
    raise UnknownDtype(f"{name}: expected a little-endian dtype of {', '.join(spec.DTYPES)}, found {dtype!r}")


def check_array(name: str, array: Array, expected: spec.TensorSpec) -> None:
    """check_spec for an array in memory."""
    check_spec(name, dtype_name(name, array.dtype), array.shape, expected)


def check_names(found: set[str], expected: set[str]) -> None:
    """Raise MissingTensor or UnknownTensor unless found is expected plus extensions."""
    missing = expected - found
    if missing:
        raise MissingTensor(f"{min(missing)}: the architecture asks for this tensor ({len(missing)} missing in all)")
    unknown = {name for name in found - expected if not name.startswith(spec.EXTENSION_PREFIX)}
    if unknown:
        raise UnknownTensor(
            f"{min(unknown)}: the architecture has no such tensor ({len(unknown)} unknown in all); "
            f"optional extensions are called {spec.EXTENSION_PREFIX}*"
        )


def _pieces(array: Array) -> Iterator[tuple[int, Array]]:
    """(index of its first element, piece) for a C-contiguous array, flattened."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield start, flat[start : start + _PIECE]


def _require(
    error: type[FormatError], name: str, array: Array, expected: str, good: Callable[[Array], NDArray[np.bool_]]
) -> None:
    """Raise `error`, naming the first element of `array` for which `good` is false."""
    for start, piece in _pieces(array):
        fine = good(piece)
        if not fine.all():
            at = int(np.argmin(fine))
            index = [int(i) for i in np.unravel_index(start + at, array.shape)]
            raise error(f"{name}{index}: expected {expected}, found {piece[at]}")


def _check_finite(name: str, array: Array) -> None:
    _require(NotFinite, name, array, "a finite number", np.isfinite)


def _check_clip(name: str, array: Array) -> None:
    low = spec.SMALLEST_CLIP
    _require(BadClip, name, array, "a clip factor from 2^-16 to 1", lambda clip: (clip >= low) & (clip <= 1))


def _check_scale(name: str, array: Array) -> None:
    low, high = spec.SMALLEST_SCALE, np.finfo(np.float32).max
    _require(BadScale, name, array, "a finite, positive, normal number", lambda scale: (scale >= low) & (scale <= high))


def _check_table(name: str, array: Array) -> None:
    if array.dtype == np.int8:
        _require(TableEntryOutOfRange, name, array, "-127 to 127", lambda entry: entry != -128)
    else:
        # Exponent bits all set; far faster than isfinite on float16.
        _require(NotFinite, name, array, "a finite number", lambda half: (half.view(np.uint16) & 0x7C00) != 0x7C00)


def _check_inv_freq(name: str, array: Array) -> None:
    _check_finite(name, array)
    _require(NegativeFrequency, name, array, "a frequency of 0 or more", lambda frequency: frequency >= 0)


def _check_signs(name: str, array: Array) -> None:
    _require(BadSign, name, array, "-1 or 1", lambda sign: np.abs(sign) == 1)


def _check_levels(name: str, array: Array) -> None:
    _require(LevelOutOfRange, name, array, "-127 to 127", lambda level: level != -128)
    for start, piece in _pieces(array):
        ordered = piece[:-1] <= piece[1:]
        ordered[spec.LEVELS_PER_GROUP - 1 :: spec.LEVELS_PER_GROUP] = True  # from one group to the next
        if not ordered.all():
            at = int(np.argmin(ordered)) // spec.LEVELS_PER_GROUP
            level = piece.reshape(-1, spec.LEVELS_PER_GROUP)
            row, group = divmod(start // spec.LEVELS_PER_GROUP + at, array.shape[1])
            raise DecreasingLevels(
                f"{name}[{row}, {group}]: expected levels that do not decrease, found {level[at].tolist()}; "
                f"sort them and renumber the codes"
            )


def _check_codes(name: str, array: Array, columns: int) -> None:
    used = columns % spec.CODES_PER_BYTE
    if used:
        bad = np.flatnonzero(array[:, -1] >> (spec.WEIGHT_BITS * used))
        if bad.size:
            raise NonZeroPadding(
                f"{name}[{bad[0]}]: expected zeros in the {8 - spec.WEIGHT_BITS * used} unused bits of the last byte, "
                f"found {array[bad[0], -1]:#010b}"
            )


def check_tokenizer(name: str, array: Array) -> None:
    """Raise BadTokenizer unless the bytes are a JSON object with a `model` entry."""
    if array.size > spec.MAX_TOKENIZER_BYTES:
        raise BadTokenizer(f"{name}: expected at most {spec.MAX_TOKENIZER_BYTES} bytes, found {array.size}")
    try:
        tokenizer = parse_json(array.tobytes(), name, max_separators=spec.MAX_TOKENIZER_SEPARATORS)
    except FormatError as error:
        raise BadTokenizer(f"{error}; expected the bytes of a Hugging Face tokenizer.json") from error
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("model"), dict):
        raise BadTokenizer(f"{name}: expected a JSON object with a `model` object, found none")


_VALUE_CHECKS: dict[str, Callable[[str, Array], None]] = {
    "levels": _check_levels,
    "scale": _check_scale,
    "bias": _check_finite,
    "act_clip": _check_clip,
    "kv_clip": _check_clip,
    "q_norm": _check_finite,
    "k_norm": _check_finite,
    "weight": _check_table,
    "gain": _check_finite,
    "signs": _check_signs,
    "inv_freq": _check_inv_freq,
    "json": check_tokenizer,
}


def check_values(name: str, array: Array, shape_of: Callable[[str], tuple[int, int]]) -> None:
    """Raise the FormatError that fits when a tensor of the right dtype and shape holds what it must not.

    shape_of: name of a linear layer -> its (N, K), asked for codes only. Extensions may hold anything.
    """
    owner, _, part = name.rpartition(".")
    if name.startswith(spec.EXTENSION_PREFIX):
        return
    if part == "codes":
        _check_codes(name, array, columns=shape_of(owner)[1])
    else:
        _VALUE_CHECKS[part](name, array)
