"""2-bit linear layers for many tokens: expanded to int8, multiplied by cuBLAS. Launches expand.cu and rescale.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from rcpformat import spec
from rcprun.backends.cuda.launch import check, kernel
from rcprun.backends.cuda.linear import SWIGLU, TILE_ROWS, UNIT_COLUMNS, UnitLinear

_CUDA_R_8I, _CUDA_R_32I, _CUBLAS_COMPUTE_32I = 3, 10, 72
_CUBLAS_GEMM_DEFAULT = -1
_THREADS = 256


class Gemm:
    """Products with any of some layers, one at a time, through buffers that they share."""

    def __init__(self, layers: Sequence[UnitLinear], tokens: int) -> None:
        """tokens: of one product, at most."""
        self.tokens = tokens
        self._integers = cupy.empty(
            max(layer.tiles * TILE_ROWS * layer.units * UNIT_COLUMNS for layer in layers), np.int8
        )
        self._sums = cupy.empty(tokens * max(layer.tiles * TILE_ROWS for layer in layers), np.int32)
        self._one, self._zero = np.array(1, np.int32), np.array(0, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._integers.nbytes + self._sums.nbytes)

    def __call__(self, weights: UnitLinear, codes_MK: Any, scale_M: Any, out: Any, *, epilogue: int) -> None:
        """out (m, n) float32 of codes int8 (m, padded(k)) and their scales (m,); epilogues as in linear."""
        m, rows, columns = len(codes_MK), weights.tiles * TILE_ROWS, weights.units * UNIT_COLUMNS
        assert m <= self.tokens and (epilogue == SWIGLU) == weights.interleaved
        check(codes_MK, "codes", np.int8, (m, columns))
        check(scale_M, "scale", np.float32, (m,))
        check(out, "out", np.float32, (m, weights.n))
        kernel("expand", "expand", (("GROUP", weights.group),)).launch(
            spec.ceil_div(weights.tiles * weights.units * 32, _THREADS),
            _THREADS,
            (weights.unit_TU, self._integers, np.int32(weights.tiles), np.int32(weights.units)),
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
        kernel("rescale", "rescale", (("EPILOGUE", epilogue),)).launch(
            (spec.ceil_div(weights.n, 4 * _THREADS), m, 1),
            _THREADS,
            (
                self._sums,
                scale_M,
                weights.scale_R,
                weights.bias_R,
                out,
                np.int32(rows),
                np.int32(weights.n),
            ),
        )
