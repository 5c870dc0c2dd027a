"""RMSNorm and quantization of activations. Launches kernels/norm.cu; knows nothing of what uses the codes.

Shape suffixes: M tokens, K channels, P channels with padding (any multiple of 4 from K on), R rows of a layer.
"""

from __future__ import annotations

import cupy
import numpy as np

from rcprun.backends.cuda.launch import Kernel, check, kernel

_LARGEST_BLOCK = 1024
_TURNS = 2
"""Vector loads a thread, where the block is not full."""


def norm_quantize(
    x_MK: cupy.ndarray,
    codes_MP: cupy.ndarray,
    scale_M: cupy.ndarray,
    *,
    eps: np.float32,
    clip: np.float32,
    bits: int,
) -> None:
    """SPEC.md, "RMSNorm", then "Activations": int8 codes and float32 scale of the normalized rows of float32 x.

    The padding of the codes is not written. A row that holds NaN gets the scale NaN.
    """
    norm, block = _kernel("norm_quantize", x_MK)
    padded = _check_codes(x_MK, codes_MP, scale_M)
    arguments = [x_MK, codes_MP, scale_M, padded, np.float32(eps), np.float32(clip), np.int32(bits)]
    norm.launch(len(x_MK), block, arguments, overlap=True)


def add_norm_quantize(
    sum_MR: cupy.ndarray,
    scale_R: cupy.ndarray,
    bias_R: cupy.ndarray | None,
    x_MK: cupy.ndarray,
    codes_MP: cupy.ndarray,
    scale_M: cupy.ndarray,
    *,
    eps: np.float32,
    clip: np.float32,
    bits: int,
) -> None:
    """norm_quantize of x after a linear layer's output is added to it, in place.

    That output is integer sums (int32, rows of tiles as gemm.Gemm gives them), scales and biases of rows; the scale of
    their input is what scale_M holds before.
    """
    norm, block = _kernel("add_norm_quantize", x_MK)
    padded = _check_codes(x_MK, codes_MP, scale_M)
    rows = sum_MR.shape[1]
    check(sum_MR, "sums", np.int32, (len(x_MK), rows))
    check(scale_R, "scale of rows", np.float32, (rows,))
    assert rows >= x_MK.shape[1] and rows % 4 == 0
    arguments = [sum_MR, scale_R, bias_R, x_MK, codes_MP, scale_M, np.int32(rows), padded]
    norm.launch(len(x_MK), block, [*arguments, np.float32(eps), np.float32(clip), np.int32(bits)], overlap=True)


def quantize(x_MK: cupy.ndarray, codes_MP: cupy.ndarray, scale_M: cupy.ndarray, *, clip: np.float32, bits: int) -> None:
    """SPEC.md, "Activations", without a norm before; else like norm_quantize."""
    norm, block = _kernel("quantize", x_MK)
    padded = _check_codes(x_MK, codes_MP, scale_M)
    norm.launch(len(x_MK), block, [x_MK, codes_MP, scale_M, padded, np.float32(clip), np.int32(bits)], overlap=True)


def normalize(x_MK: cupy.ndarray, out_MK: cupy.ndarray, *, eps: np.float32) -> None:
    """SPEC.md, "RMSNorm", as float32 rows. `out` may be x."""
    norm, block = _kernel("normalize", x_MK)
    check(out_MK, "out", np.float32, x_MK.shape)
    norm.launch(len(x_MK), block, [x_MK, out_MK, np.float32(eps)], overlap=True)


def _kernel(name: str, x_MK: cupy.ndarray) -> tuple[Kernel, int]:
    """The kernel for rows like these, and its block."""
    check(x_MK, "x", np.float32, (None, None))
    channels = x_MK.shape[1]
    vectors = channels if channels % 4 else channels // 4
    block = min(_LARGEST_BLOCK, -(-vectors // (32 * _TURNS)) * 32)
    return kernel("norm", name, (("RCP_K", channels), ("RCP_THREADS", block))), block


def _check_codes(x_MK: cupy.ndarray, codes_MP: cupy.ndarray, scale_M: cupy.ndarray) -> np.int32:
    """The padded width of the codes."""
    tokens, channels = x_MK.shape
    check(codes_MP, "codes", np.int8, (tokens, None))
    check(scale_M, "scale", np.float32, (tokens,))
    padded = codes_MP.shape[1]
    assert padded % 4 == 0 and padded >= channels, f"codes: {padded} columns for {channels} channels"
    return np.int32(padded)
