"""The reference arithmetic against SPEC section 10 written out one scalar at a time, and at its edges."""

import math

import numpy as np
import pytest

from rcpformat import arithmetic as ar

F32, F16 = np.float32, np.float16


def slow_activations(x: np.ndarray, clip: float, bits: int) -> tuple[list[int], np.float32]:
    """One token, one operation at a time."""
    largest = 2 ** (bits - 1) - 1
    peak = max(F32(abs(value)) for value in x)
    if peak < 2.0**-100:
        return [0] * len(x), F32(1)
    scale = F32(F32(F32(clip) * peak) / F32(largest))
    inverse = F32(F32(1) / scale)
    codes = [round(float(F32(value * inverse))) for value in x]  # Python rounds halves to even
    return [max(-largest - 1, min(largest, code)) for code in codes], scale


def slow_kv(x: np.ndarray, clip: float, bits: int) -> tuple[list[int], np.float16, np.float16, list[np.float32]]:
    top = 2**bits - 1
    high = F32(min(max(F32(F32(clip) * max(x)), -65504), 65504))
    low = F16(min(max(F32(F32(clip) * min(x)), -65504), 65504))
    step = max(F16(min(F32(F32(high - F32(low)) / F32(top)), F32(65504))), F16(2.0**-14))
    inverse = F32(F32(1) / F32(step))
    codes = [max(0, min(top, round(float(F32(F32(value - F32(low)) * inverse))))) for value in x]
    return codes, low, step, [F32(F32(low) + F32(F32(code) * F32(step))) for code in codes]


def wide(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """float32 values with exponents from low to high."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(low, high, (*shape[:-1], 1))).astype(F32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9, 0.3, 2.0**-16])
def test_activations_equal_the_scalar_form(bits: int, clip: float) -> None:
    x = wide(np.random.default_rng(bits), (60, 33), -110, 120)
    codes, scale = ar.quantize_activations(x, clip, bits)
    assert codes.dtype == np.int8 and scale.dtype == F32 and scale.shape == (60, 1)
    for token in range(60):
        slow_codes, slow_scale = slow_activations(x[token], clip, bits)
        assert codes[token].tolist() == slow_codes
        assert scale[token, 0] == slow_scale


def test_halves_go_to_even() -> None:
    x = np.array([[7, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]], F32)
    codes, scale = ar.quantize_activations(x, 1, 4)
    assert scale[0, 0] == 1 and codes[0].tolist() == [7, 0, 2, 2, 4, 0, -2, -2]


def test_clipped_codes_stop_at_the_ends() -> None:
    codes, _ = ar.quantize_activations(np.array([[4.0, -4.0, 1.0]], F32), 0.25, 4)
    assert codes[0].tolist() == [7, -8, 7]
    codes, _ = ar.quantize_head_input(np.array([[1.0, -1.0]], F32))
    assert codes[0].tolist() == [127, -127]


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_tokens(bits: int) -> None:
    below, border = F32(2.0**-100) * F32(1 - 2.0**-24), F32(2.0**-100)
    x = np.array([[0, 0], [-0.0, 0], [below, -below], [1e-45, 0], [border, 0], [3, 0]], F32)
    codes, scale = ar.quantize_activations(x, 1, bits)
    assert not codes[:4].any() and (scale[:4] == 1).all()
    largest = 2 ** (bits - 1) - 1
    assert codes[4:, 0].tolist() == [largest] * 2 and scale[4, 0] == border / F32(largest)


def test_extreme_tokens_have_normal_scales() -> None:
    """The reason for the least clip: no scale and no reciprocal is subnormal or infinite."""
    for clip in (2.0**-16, 1.0):
        for bits in (4, 8):
            x = np.array([[2.0**-100], [np.finfo(F32).max]], F32)
            _, scale = ar.quantize_activations(x, clip, bits)
            for value in (scale, F32(1) / scale):
                assert np.isfinite(value).all() and (value >= 2.0**-126).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.95, 0.5])
def test_kv_equals_the_scalar_form(bits: int, clip: float) -> None:
    rng = np.random.default_rng(bits)
    x = np.concatenate(
        [
            wide(rng, (40, 16), -30, 30),
            np.abs(wide(rng, (4, 16), -3, 3)),
            -np.abs(wide(rng, (4, 16), -3, 3)),
            np.zeros((1, 16), F32),
            np.full((1, 16), 3.25, F32),
            np.full((1, 16), -1e30, F32),
        ]
    )
    quantized = ar.quantize_kv(x, clip, bits)
    restored = quantized.dequantize()
    assert quantized.codes.dtype == np.uint8 and quantized.low.dtype == quantized.step.dtype == F16
    assert restored.dtype == F32
    for token in range(len(x)):
        codes, low, step, values = slow_kv(x[token], clip, bits)
        assert quantized.codes[token].tolist() == codes, token
        assert quantized.low[token, 0] == low and quantized.step[token, 0] == step
        assert restored[token].tolist() == values


def test_kv_error_is_at_most_half_a_step() -> None:
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(F32)
    quantized = ar.quantize_kv(x, 1.0, 4)
    error = np.abs(quantized.dequantize() - x)
    # 15 steps span the range up to the rounding of low (2^-11 of it) and step (15 · 2^-11 of it) to float16.
    bound = 0.5 * quantized.step.astype(F32) + 2.0**-10 * np.abs(x).max(-1, keepdims=True) * 2
    assert (error <= bound).all()


def test_nibbles() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 5, 8), dtype=np.uint8)
    packed = ar.pack_nibbles(codes)
    assert packed.dtype == np.uint8 and packed.shape == (3, 5, 4)
    assert packed[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 1]
    assert np.array_equal(ar.unpack_nibbles(packed), codes)
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(ar.pack_nibbles(ar.unpack_nibbles(every)), every)


def test_integer_matmul_is_exact() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 8, (3, 50), dtype=np.int8)
    w = rng.integers(-127, 128, (4, 50), dtype=np.int8)
    sums = ar.integer_matmul(x, w)
    for m, n in np.ndindex(3, 4):
        assert sums[m, n] == sum(int(a) * int(b) for a, b in zip(x[m], w[n], strict=True))
    worst = ar.integer_matmul(np.full((1, 40000), -8, np.int8), np.full((1, 40000), 127, np.int8))
    assert worst.item() == -8 * 127 * 40000


def test_sums_are_rounded_once_then_scaled_twice() -> None:
    sums = np.array([[2**24 + 1, 2**24 + 3, -(2**25) - 6]], np.int64)
    one = np.ones((1, 1), F32)
    assert ar.scale_sums(sums, one, np.ones(3, F32)).tolist() == [[2**24, 2**24 + 4, -(2**25) - 8]]
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**30), 2**30, (5, 7))
    s_x, s_w = rng.random((5, 1)).astype(F32), rng.random(7).astype(F32)
    y = ar.scale_sums(sums, s_x, s_w)
    for m, n in np.ndindex(5, 7):
        assert y[m, n] == F32(F32(F32(sums[m, n]) * s_x[m, 0]) * s_w[n])


def test_rms_norm() -> None:
    x = wide(np.random.default_rng(0), (9, 300), -20, 20)
    y = ar.rms_normalize(x, 1e-5)
    exact = x.astype(np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    # pairwise float32 sum of 300 squares, root, reciprocal, product: a few units of 2^-24 each
    assert y.dtype == F32 and np.allclose(y, exact, rtol=20 * 2.0**-24, atol=0)
    assert not ar.rms_normalize(np.zeros((1, 4), F32), 1e-5).any()


def test_rope_tables_are_cast_once() -> None:
    inv_freq = np.array([1.0, 0.1, 1 / 3])
    cos, sin = ar.rope_tables(np.array([0, 1, 99_999]), inv_freq, 1.25)
    assert cos.dtype == sin.dtype == F32 and cos.shape == (3, 3)
    for row, position in enumerate((0, 1, 99_999)):
        for i in range(3):
            assert cos[row, i] == F32(math.cos(position * inv_freq[i]) * 1.25)
            assert sin[row, i] == F32(math.sin(position * inv_freq[i]) * 1.25)


def test_rope_pairs_channels_half_a_head_apart() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)).astype(F32)
    cos, sin = ar.rope_tables(np.array([5, 6]), 0.5 ** np.arange(4), 1.0)
    y = ar.apply_rope(x, cos, sin)
    assert y.dtype == F32
    for m, h, i in np.ndindex(2, 3, 4):
        a, b, c, s = x[m, h, i], x[m, h, i + 4], cos[m, i], sin[m, i]
        assert y[m, h, i] == F32(F32(a * c) - F32(b * s))
        assert y[m, h, i + 4] == F32(F32(b * c) + F32(a * s))


def test_silu() -> None:
    x = np.concatenate([np.linspace(-30, 30, 1001), [-1e4, 1e4, -88.8, -110.0]]).astype(F32)
    y = ar.silu(x)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64).clip(-700)))
    assert y.dtype == F32 and np.isfinite(y).all()
    assert np.allclose(y, exact, rtol=8 * 2.0**-24, atol=2.0**-120)
