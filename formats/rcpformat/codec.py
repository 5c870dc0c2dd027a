"""2-bit codes and levels to bytes and back, and one linear layer made of them. Knows nothing of files.

Shape suffixes: N rows (out-features), K columns (in-features), G groups of K, 4 levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcpformat import values
from rcpformat.spec import CODES_PER_BYTE, WEIGHT_BITS, ceil_div, linear_tensors

_CHUNK_WEIGHTS = 1 << 18
"""Weights decoded at a time: the temporaries stay in the cache."""


def pack_codes(codes_NK: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes 0..3, uint8 (N, K) -> uint8 (N, ceil(K/4)), four a byte, lowest bits first, padding zero (SPEC 8)."""
    n, k = codes_NK.shape
    padded = np.zeros((n, ceil_div(k, CODES_PER_BYTE) * CODES_PER_BYTE), dtype=np.uint8)
    padded[:, :k] = codes_NK
    packed = padded[:, 0::CODES_PER_BYTE].copy()
    for place in range(1, CODES_PER_BYTE):
        packed |= padded[:, place::CODES_PER_BYTE] << (WEIGHT_BITS * place)
    return packed


def unpack_codes(packed: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """Inverse of pack_codes: uint8 (N, ceil(K/4)) -> codes 0..3, uint8 (N, K)."""
    codes = np.empty((*packed.shape, CODES_PER_BYTE), dtype=np.uint8)
    for place in range(CODES_PER_BYTE):
        codes[..., place] = (packed >> (WEIGHT_BITS * place)) & 3
    return codes.reshape(len(packed), -1)[:, :k]


def decode_integers(
    codes_packed: NDArray[np.uint8], levels_NG4: NDArray[np.int8], group_size: int, k: int
) -> NDArray[np.int8]:
    """The level of each weight: levels[n, k // group_size, code[n, k]] as int8 (N, K).

    Time and temporary memory: about 1 ns a weight, and a few hundred KiB.
    """
    n, groups = levels_NG4.shape[:2]
    integers = np.empty((n, k), dtype=np.int8)
    rows = max(1, _CHUNK_WEIGHTS // (groups * group_size))
    codes = np.zeros((rows, groups * group_size), dtype=np.uint8)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        count = part.stop - start
        codes[:count, :k] = unpack_codes(codes_packed[part], k)
        # Bit 0 of the code selects within each pair of levels, bit 1 between the pairs; masks are 0 or -1.
        code = codes[:count].reshape(count, groups, group_size).view(np.int8)
        level = levels_NG4[part, :, :, None]
        low, high = -(code & 1), -(code >> 1)
        first = level[:, :, 0] ^ (low & (level[:, :, 0] ^ level[:, :, 1]))
        second = level[:, :, 2] ^ (low & (level[:, :, 2] ^ level[:, :, 3]))
        first ^= high & (first ^ second)
        integers[part] = first.reshape(count, -1)[:, :k]
    return integers


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """A linear layer as the file holds it: W[n, k] = scale[n] * levels[n, k // group_size, code[n, k]]."""

    name: str
    shape: tuple[int, int]
    """(N, K) = (out_features, in_features)."""
    group_size: int
    codes: NDArray[np.uint8]
    """(N, ceil(K/4)), as pack_codes gives them."""
    levels: NDArray[np.int8]
    """(N, G, 4), not decreasing along the last axis."""
    scale: NDArray[np.float32]
    """(N,)."""
    bias: NDArray[np.float32] | None = None
    """(N,) or None."""

    def integers(self) -> NDArray[np.int8]:
        """The level of each weight, int8 (N, K)."""
        return decode_integers(self.codes, self.levels, self.group_size, self.shape[1])

    def weights(self) -> NDArray[np.float32]:
        """scale[n] * level, one float32 product a weight, float32 (N, K)."""
        return self.scale[:, None] * self.integers().astype(np.float32)

    def check(self) -> None:
        """Raise the FormatError that fits when a dtype, a shape or a value breaks SPEC section 7 or 8."""
        for name, expected in linear_tensors(self.name, self.shape, self.group_size, self.bias is not None).items():
            array = getattr(self, name.rpartition(".")[2])
            values.check_array(name, array, expected)
            values.check_values(name, array, lambda _: self.shape)
