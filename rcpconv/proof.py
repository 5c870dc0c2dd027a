"""What shows that tensors are those that were trained: SHA-256 of their bytes and of the weights they decode to.

Knows no torch, for `rcpconv export` does without.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpformat.codec import PackedLinear, decode_integers

Array = NDArray[Any]

_HASHED_WEIGHTS = 1 << 17
"""Weights that are decoded and hashed at a time, in the processor's cache."""


def hash_tensor(array: Array) -> str:
    """SHA-256 of an array's bytes in row-major order, as in a file's header."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def hash_weights(weights_NK: Array) -> str:
    """SHA-256 of float32 weights in row-major order, zeros taken as +0."""
    digest = hashlib.sha256()
    rows = max(1, _HASHED_WEIGHTS // weights_NK.shape[1])
    for start in range(0, len(weights_NK), rows):
        digest.update(np.ascontiguousarray(weights_NK[start : start + rows] + np.float32(0)).data)
    return digest.hexdigest()


def hash_decoded(linear: PackedLinear) -> str:
    """hash_weights of the weights that codes, levels and scale decode to, which are never in memory as a whole."""
    digest = hashlib.sha256()
    n, k = linear.shape
    rows = max(1, _HASHED_WEIGHTS // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        integers = decode_integers(linear.codes[part], linear.levels[part], linear.group_size, k)
        digest.update((linear.scale[part, None] * integers.astype(np.float32) + np.float32(0)).data)
    return digest.hexdigest()
