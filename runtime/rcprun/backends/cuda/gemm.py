"""2-bit linear layers for many tokens: expanded to int8, multiplied by cuBLAS. Launches expand.cu and rescale.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from rcpformat import spec
from rcprun.backends.cuda.launch import check, kernel
from rcprun.backends.cuda.linear import STORE, SWIGLU, TILE_ROWS, UNIT_COLUMNS, UnitLinear

_CUDA_R_8I, _CUDA_R_32I, _CUBLAS_COMPUTE_32I = 3, 10, 72
_CUBLAS_GEMM_DEFAULT = -1
_SUMS_BYTES = 256 << 20
"""Of the integer sums of one product; a layer with more rows takes several."""
_ROUND_ROWS = 256
"""Rows of a product are a multiple, as of cuBLAS's blocks."""
_EXPAND_WARPS, _EXPAND_TURNS = 8, 2
_RESCALE_THREADS = 256


class Gemm:
    """Products with any of some layers, one at a time, through buffers that they share."""

    def __init__(self, layers: Sequence[UnitLinear], tokens: int) -> None:
        """tokens: of one product, at most."""
        self.tokens = tokens
        self._rows = _rows_at_once(tokens)
        integers, sums = _sizes([(layer.tiles * TILE_ROWS, layer.units * UNIT_COLUMNS) for layer in layers], tokens)
        self._integers, self._sums = cupy.empty(integers, np.int8), cupy.empty(sums, np.int32)
        self._one, self._zero = np.array(1, np.int32), np.array(0, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._integers.nbytes + self._sums.nbytes)

    def __call__(self, weights: UnitLinear, codes_MK: Any, scale_M: Any, out: Any, *, epilogue: int) -> None:
        """out (m, n) float32 of codes int8 (m, padded(k)) and their scales (m,); epilogues as in linear."""
        m, columns = len(codes_MK), weights.units * UNIT_COLUMNS
        assert m <= self.tokens and (epilogue == SWIGLU) == weights.interleaved
        check(codes_MK, "codes", np.int8, (m, columns))
        check(scale_M, "scale", np.float32, (m,))
        check(out, "out", np.float32, (m, weights.n))
        tiles = self._rows // TILE_ROWS
        for first in range(0, weights.tiles, tiles):
            part = slice(first, min(first + tiles, weights.tiles))
            self._expand(weights, part)
            self._multiply((part.stop - part.start) * TILE_ROWS, codes_MK)
            self._rescale(weights, part, scale_M, out, epilogue)

    def _expand(self, weights: UnitLinear, tiles: slice) -> None:
        kernel("expand", "expand", (("GROUP", weights.group),)).launch(
            (tiles.stop - tiles.start) * spec.ceil_div(weights.units, _EXPAND_WARPS * _EXPAND_TURNS),
            32 * _EXPAND_WARPS,
            (weights.unit_TU[tiles], self._integers, np.int32(weights.units)),
            overlap=True,
        )

    def _multiply(self, rows: int, codes_MK: Any) -> None:
        """sums (m, rows) = codes · integersᵀ, row-major: in cuBLAS's column-major terms, integersᵀ · codes."""
        m, columns = codes_MK.shape
        handle = cupy.cuda.device.get_cublas_handle()
        cublas.setStream(handle, cupy.cuda.get_current_stream().ptr)
        cublas.gemmEx(
            handle,
            cublas.CUBLAS_OP_T,
            cublas.CUBLAS_OP_N,
            rows,
            m,
            columns,
            self._one.ctypes.data,
            self._integers.data.ptr,
            _CUDA_R_8I,
            columns,
            codes_MK.data.ptr,
            _CUDA_R_8I,
            columns,
            self._zero.ctypes.data,
            self._sums.data.ptr,
            _CUDA_R_32I,
            rows,
            _CUBLAS_COMPUTE_32I,
            _CUBLAS_GEMM_DEFAULT,
        )

    def _rescale(self, weights: UnitLinear, tiles: slice, scale_M: Any, out: Any, epilogue: int) -> None:
        """Sums of these tiles to their columns of out."""
        m, rows = len(out), slice(tiles.start * TILE_ROWS, tiles.stop * TILE_ROWS)
        tile_columns = TILE_ROWS // 2 if epilogue == SWIGLU else TILE_ROWS
        first, end = tiles.start * tile_columns, min(tiles.stop * tile_columns, weights.n)
        tokens = 8 if epilogue == STORE else 4
        kernel("rescale", "rescale", (("EPILOGUE", epilogue), ("WHOLE", int(weights.n % 4 == 0)))).launch(
            (spec.ceil_div(end - first, 4 * _RESCALE_THREADS), spec.ceil_div(m, tokens), 1),
            _RESCALE_THREADS,
            (
                self._sums,
                scale_M,
                weights.scale_R[rows],
                None if weights.bias_R is None else weights.bias_R[rows],
                out,
                *map(np.int32, (m, rows.stop - rows.start, first, end, weights.n)),
            ),
            overlap=True,
        )


def bytes_needed(shapes: Sequence[tuple[int, int]], tokens: int) -> int:
    """What a Gemm for layers of these (rows, columns) would hold, but for their padding, without allocating it."""
    integers, sums = _sizes(shapes, tokens)
    return integers + 4 * sums


def _sizes(shapes: Sequence[tuple[int, int]], tokens: int) -> tuple[int, int]:
    """Numbers of integers and of sums that the largest product needs."""
    limited = [(min(_rows_at_once(tokens), rows), columns) for rows, columns in shapes]
    return max(rows * columns for rows, columns in limited), tokens * max(rows for rows, _ in limited)


def _rows_at_once(tokens: int) -> int:
    return max(1, _SUMS_BYTES // (4 * tokens * _ROUND_ROWS)) * _ROUND_ROWS
