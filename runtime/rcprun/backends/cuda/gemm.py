"""2-bit linear layers for many tokens: expanded to int8, multiplied by cuBLAS. Launches expand.cu and rescale.cu."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from rcpformat import spec
from rcprun.backends.cuda.launch import check, kernel
from rcprun.backends.cuda.linear import STORE, SWIGLU, TILE_ROWS, UNIT_COLUMNS, UnitLinear

_CUDA_R_8I, _CUDA_R_32I, _CUBLAS_COMPUTE_32I = 3, 10, 72
_CUBLAS_GEMM_DEFAULT = -1
_EXPAND_WARPS, _EXPAND_TURNS = 8, 2
_RESCALE_THREADS = 256


class Gemm:
    """Products with any of some layers, one at a time, through buffers that they share."""

    def __init__(self, layers: Iterable[UnitLinear], tokens: int) -> None:
        """tokens: of one product, at most."""
        self.tokens = tokens
        integers, sums = _sizes(map(_shape, layers), tokens)
        self._integers, self._sums = cupy.empty(integers, np.int8), cupy.empty(sums, np.int32)
        self._one, self._zero = np.array(1, np.int32), np.array(0, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._integers.nbytes + self._sums.nbytes)

    def multiply(self, weights: UnitLinear, codes_MK: Any) -> Any:
        """Integer sums (m, rows of tiles) of codes (m, padded(k)); they stay until the next product."""
        m, (rows, columns) = len(codes_MK), _shape(weights)
        assert m <= self.tokens
        check(codes_MK, "codes", np.int8, (m, columns))
        kernel("expand", "expand", (("GROUP", weights.group),)).launch(
            weights.tiles * spec.ceil_div(weights.units, _EXPAND_WARPS * _EXPAND_TURNS),
            32 * _EXPAND_WARPS,
            (weights.unit_TU, self._integers, *map(np.int32, (weights.tiles, weights.units, weights.blocks))),
            overlap=True,
        )
        # Row-major (m, rows) = codes · integersᵀ is, in cuBLAS's column-major terms, integersᵀ · codes.
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
        return self._sums[: m * rows].reshape(m, rows)

    def rescale(self, weights: UnitLinear, first: int, scale_M: Any, out: Any, *, epilogue: int) -> None:
        """out (m, n) float32 of the sums of m tokens from the first on, whose scales are scale_M (m,)."""
        m, (rows, _) = len(out), _shape(weights)
        assert first + m <= self.tokens and (epilogue == SWIGLU) == weights.interleaved
        check(scale_M, "scale", np.float32, (m,))
        check(out, "out", np.float32, (m, weights.n))
        tokens = 8 if epilogue == STORE else 4
        kernel("rescale", "rescale", (("EPILOGUE", epilogue), ("WHOLE", int(weights.n % 4 == 0)))).launch(
            (spec.ceil_div(weights.n, 4 * _RESCALE_THREADS), spec.ceil_div(m, tokens), 1),
            _RESCALE_THREADS,
            (
                self._sums[first * rows : (first + m) * rows],
                scale_M,
                weights.scale_R,
                weights.bias_R,
                out,
                *map(np.int32, (m, rows, weights.n)),
            ),
            overlap=True,
        )


def bytes_needed(shapes: Iterable[tuple[int, int]], tokens: int) -> int:
    """What a Gemm for layers of these (rows, columns) would hold, but for their padding, without allocating it."""
    integers, sums = _sizes(shapes, tokens)
    return integers + 4 * sums


def _sizes(shapes: Iterable[tuple[int, int]], tokens: int) -> tuple[int, int]:
    """Numbers of integers, and of sums, that the largest product needs."""
    chosen = list(shapes)
    return max(rows * columns for rows, columns in chosen), tokens * max(rows for rows, _ in chosen)


def _shape(layer: UnitLinear) -> tuple[int, int]:
    """Rows and columns with their padding."""
    return layer.tiles * TILE_ROWS, layer.units * UNIT_COLUMNS
