"""The head's logits on the GPU: exact for an int8 table, within float32's rounding for a float16 one."""

from typing import Any

import numpy as np
import pytest

from rcpformat import arithmetic

pytestmark = pytest.mark.gpu

SHAPES = [(3000, 4096), (2111, 2048), (33, 192), (1000, 512), (500, 8192), (40, 1152), (100, 1001), (37, 172), (7, 5)]


def token_counts(width: int) -> tuple[int, ...]:
    """Up to 8 for every shape, and more for two: each eight of tokens is another compilation."""
    return (1, 3, 8, 11, 32, 45) if width in (2048, 1001) else (1, 3, 8)


def padded(codes: np.ndarray) -> Any:
    import cupy

    out = np.zeros((len(codes), -(-codes.shape[1] // 128) * 128), dtype=np.int8)
    out[:, : codes.shape[1]] = codes
    return cupy.asarray(out)


def worst(found: np.ndarray, expected: np.ndarray) -> str:
    difference = np.abs(found.astype(np.float64) - expected)
    at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    return f"worst at {tuple(map(int, at))}: found {found[at]!r}, expected {expected[at]!r}"


@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
def test_int8_is_exact(vocabulary: int, width: int) -> None:
    import cupy

    from rcprun.backends.cuda.head import head_int8

    rng = np.random.default_rng(width)
    table = rng.integers(-127, 128, (vocabulary, width), dtype=np.int8)
    scale = rng.uniform(0.001, 0.01, vocabulary).astype(np.float32)
    device_table, device_scale = cupy.asarray(table), cupy.asarray(scale)
    for tokens in token_counts(width):
        codes = rng.integers(-127, 128, (tokens, width), dtype=np.int8)
        token_scale = rng.uniform(0.001, 0.01, (tokens, 1)).astype(np.float32)
        logits = cupy.full((tokens, vocabulary), np.nan, dtype=np.float32)
        head_int8(padded(codes), cupy.asarray(token_scale[:, 0]), device_table, device_scale, logits)
        sums = np.rint(codes.astype(np.float64) @ table.astype(np.float64).T).astype(np.int64)
        expected = arithmetic.scale_sums(sums, token_scale, scale)
        assert np.array_equal(logits.get(), expected), worst(logits.get(), expected)


def test_int8_at_the_largest_magnitudes() -> None:
    """127 · 127 · 16,384 is beyond float32's exact integers, not beyond int32."""
    import cupy

    from rcprun.backends.cuda.head import head_int8

    width = 16384
    table = cupy.full((20, width), 127, dtype=np.int8)
    codes = cupy.full((2, width), -127, dtype=np.int8)
    logits = cupy.zeros((2, 20), dtype=np.float32)
    ones = cupy.ones(20, dtype=np.float32)
    head_int8(codes, ones[:2], table, ones, logits)
    assert (logits.get() == np.float32(-127 * 127 * width)).all()


@pytest.mark.parametrize(("vocabulary", "width"), SHAPES)
def test_half_is_within_float32_rounding(vocabulary: int, width: int) -> None:
    """Each of K/8 additions loses at most 2^-22 of the sum of magnitudes (the tensor core truncates); then those of
    the warps' sums. Twice that holds the worst case; the usual error is far smaller."""
    import cupy

    from rcprun.backends.cuda.head import head_half

    rng = np.random.default_rng(width)
    table = rng.normal(size=(vocabulary, width)).astype(np.float16)
    device_table = cupy.asarray(table)
    for tokens in token_counts(width):
        h = rng.normal(size=(tokens, width)).astype(np.float32)
        found = []
        for _ in range(2):
            logits = cupy.full((tokens, vocabulary), np.nan, dtype=np.float32)
            head_half(cupy.asarray(h), device_table, logits)
            found.append(logits.get())
        rounded, wide = h.astype(np.float16).astype(np.float64), table.astype(np.float64)
        expected = rounded @ wide.T
        tolerance = (np.abs(rounded) @ np.abs(wide).T) * 2.0**-21 * (width / 8 + 8)
        assert (np.abs(found[0] - expected) <= tolerance).all(), worst(found[0], expected)
        # Rounding errors are not all of one sign: of typical size they are below this.
        assert np.abs(found[0] - expected).max() <= 2.0**-14 * np.sqrt(width), worst(found[0], expected)
        np.testing.assert_array_equal(found[0], found[1])
