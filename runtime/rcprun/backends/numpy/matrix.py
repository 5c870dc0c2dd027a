"""Products with stored weight matrices in NumPy, exact where the weights are integers. Knows nothing of layers.

Integer weights stay int8 and become float32 a block of rows at a time, just before BLAS multiplies them. That is a
quarter of float32's memory, and no slower: a block stays in a core's cache, while float32 weights would be read from
memory. A float32 sum of integers is exact while every partial sum stays within 2**24, in whatever order and with
whatever fused operations BLAS computes it; a product over more columns than that is made of parts, added in float64.

Shape suffixes: M tokens, K columns, N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rcpformat.arithmetic import EXACT_FLOAT32_INTEGER, Float32Array, Int8Array
from rcpformat.spec import LEVEL_LIMIT

_BLOCK_WEIGHTS = 1 << 18
"""Weights converted at a time: 1 MiB of float32."""


class IntegerMatrix:
    """Integers (N, K) in -LEVEL_LIMIT..LEVEL_LIMIT, multiplied exactly."""

    def __init__(self, integers_NK: Int8Array, *, largest_code: int) -> None:
        """largest_code: the largest magnitude that `product`'s operand may have."""
        self._integers_NK = np.ascontiguousarray(integers_NK)
        self._block_rows = max(1, _BLOCK_WEIGHTS // integers_NK.shape[1])
        self._exact_columns = EXACT_FLOAT32_INTEGER // (LEVEL_LIMIT * largest_code)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._integers_NK.nbytes

    def product(self, codes_MK: Float32Array) -> Float32Array:
        """Σ_k codes[m, k] · integers[n, k] of integer-valued codes, rounded once to float32: (M, N)."""
        rows, columns = self._integers_NK.shape
        out_MN = np.empty((len(codes_MK), rows), dtype=np.float32)
        for row in range(0, rows, self._block_rows):
            block = slice(row, row + self._block_rows)
            weight_NK = self._integers_NK[block].astype(np.float32)
            if columns <= self._exact_columns:
                np.matmul(codes_MK, weight_NK.T, out=out_MN[:, block])
            else:
                out_MN[:, block] = self._sum_of_parts(codes_MK, weight_NK)
        return out_MN

    def _sum_of_parts(self, codes_MK: Float32Array, weight_NK: Float32Array) -> NDArray[np.float64]:
        sums_MN = np.zeros((len(codes_MK), len(weight_NK)), dtype=np.float64)
        for column in range(0, codes_MK.shape[1], self._exact_columns):
            part = slice(column, column + self._exact_columns)
            sums_MN += codes_MK[:, part] @ weight_NK[:, part].T
        return sums_MN
