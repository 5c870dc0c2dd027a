"""The arithmetic of SPEC.md, chapter "Arithmetic", in NumPy: the truth that every backend is compared with.

Rounding is half to even, every float operation is one float32 operation unless said otherwise. Knows nothing of
files, layers or devices.

Shape suffixes: M tokens, K channels, N output rows, H heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Float32Array = NDArray[np.float32]
Int8Array = NDArray[np.int8]
UInt8Array = NDArray[np.uint8]

ZERO_TOKEN = F32(2.0**-100)
"""A token whose largest magnitude is below this quantizes to zeros with scale 1."""
SMALLEST_KV_SCALE = np.float16(2.0**-14)
LARGEST_HALF = F32(65504.0)
EXACT_FLOAT32_INTEGER = 1 << 24
"""Integers up to this magnitude are exact in float32, so that a float32 sum of them is exact below it."""


def quantize_activations(x_MK: Float32Array, clip: float | np.float32, bits: int) -> tuple[Int8Array, Float32Array]:
    """Per-token symmetric quantization (SPEC.md, "Activations").

    x_MK: (..., K) float32. Returns codes int8 (..., K) in -2**(bits-1) .. 2**(bits-1)-1 and scale float32 (..., 1),
    with x ≈ codes * scale.
    """
    largest = F32(2 ** (bits - 1) - 1)
    x_MK = np.asarray(x_MK, dtype=F32)
    peak = np.abs(x_MK).max(axis=-1, keepdims=True)
    zero = peak < ZERO_TOKEN
    scale = np.where(zero, F32(1), (F32(clip) * peak) / largest).astype(F32)
    codes = np.rint(x_MK * (F32(1) / scale))
    np.clip(codes, -largest - 1, largest, out=codes)
    codes[np.broadcast_to(zero, codes.shape)] = 0
    return codes.astype(np.int8), scale


def quantize_head_input(x_MK: Float32Array) -> tuple[Int8Array, Float32Array]:
    """int8 activations of an int8 head: quantize_activations with 8 bits and no clip; codes lie in -127..127."""
    return quantize_activations(x_MK, F32(1), 8)


@dataclass(frozen=True, kw_only=True)
class QuantizedVectors:
    """Keys or values of the KV cache. codes uint8 (..., D), one a byte; low and step float16 (..., 1)."""

    codes: UInt8Array
    low: NDArray[np.float16]
    step: NDArray[np.float16]

    def dequantize(self) -> Float32Array:
        """low + codes * step in float32, the product rounded before the sum."""
        return self.low.astype(F32) + self.codes.astype(F32) * self.step.astype(F32)


def quantize_kv(x_HD: Float32Array, clip: float | np.float32, bits: int) -> QuantizedVectors:
    """Per-token, per-head asymmetric quantization (SPEC.md, "KV cache"). x_HD: (..., D) float32."""
    top = F32(2**bits - 1)
    x_HD = np.asarray(x_HD, dtype=F32)
    high = np.clip(F32(clip) * x_HD.max(axis=-1, keepdims=True), -LARGEST_HALF, LARGEST_HALF)
    low = np.clip(F32(clip) * x_HD.min(axis=-1, keepdims=True), -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    low32 = low.astype(F32)
    step = np.minimum((high - low32) / top, LARGEST_HALF).astype(np.float16)
    step = np.maximum(step, SMALLEST_KV_SCALE)
    codes = np.clip(np.rint((x_HD - low32) * (F32(1) / step.astype(F32))), 0, top)
    return QuantizedVectors(codes=codes.astype(np.uint8), low=low, step=step)


def pack_nibbles(codes: UInt8Array) -> UInt8Array:
    """4-bit codes (..., D), D even -> (..., D/2): element 2i in the low nibble of byte i."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: UInt8Array) -> UInt8Array:
    """Inverse of pack_nibbles."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out


def integer_matmul(codes_MK: Int8Array, integers_NK: Int8Array) -> NDArray[np.int64]:
    """Σ_k integers[n, k] * codes[m, k], exactly, as int64 (M, N). The plain form: the truth for the fast ones."""
    return codes_MK.astype(np.int64) @ integers_NK.astype(np.int64).T


def scale_sums(
    sums_MN: NDArray[np.int64], activation_scale_M1: Float32Array, row_scale_N: Float32Array
) -> Float32Array:
    """float32(sum) * activation scale, then * row scale: each operation rounded to float32 (SPEC.md, "Linear")."""
    return (sums_MN.astype(F32) * activation_scale_M1) * row_scale_N


def rms_normalize(x_MK: Float32Array, eps: float) -> Float32Array:
    """x * (1 / sqrt(mean(x²) + eps)) in float32; gains are folded away (SPEC.md, "RMSNorm")."""
    mean_square = np.mean(np.square(x_MK), axis=-1, keepdims=True, dtype=F32)
    inverse_root: Float32Array = np.reciprocal(np.sqrt(mean_square + F32(eps)))
    return x_MK * inverse_root


def rope_tables(
    positions_M: NDArray[np.int64], inv_freq: NDArray[np.float64], attention_factor: float
) -> tuple[Float32Array, Float32Array]:
    """cos and sin, each (M, D/2): angle, cosine and factor in float64, cast to float32 once."""
    angle = positions_M.astype(np.float64)[:, None] * inv_freq[None, :]
    return (np.cos(angle) * attention_factor).astype(F32), (np.sin(angle) * attention_factor).astype(F32)


def apply_rope(x_MHD: Float32Array, cos_M2: Float32Array, sin_M2: Float32Array) -> Float32Array:
    """Rotate-half RoPE: channel i pairs with i + D/2. cos, sin: (M, D/2), the same for every head."""
    half = x_MHD.shape[-1] // 2
    first, second = x_MHD[..., :half], x_MHD[..., half:]
    cos, sin = cos_M2[:, None, :], sin_M2[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def silu(x: Float32Array) -> Float32Array:
    """x / (1 + exp(-x)) in float32; exp overflowing to infinity gives the right limit, 0."""
    with np.errstate(over="ignore"):
        y: Float32Array = x / (1 + np.exp(-x))
    return y
