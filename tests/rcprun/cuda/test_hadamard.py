"""Hadamard transforms on the GPU against NumPy's: integers and codes exactly, floats within rounding."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from rcpformat.arithmetic import quantize_activations
from rcpformat.hadamard import hadamard_factor, hadamard_transform

pytestmark = pytest.mark.gpu

WIDTHS = [11008, 13824, 14336, 8192, 1408, 480, 512]
"""Models' widths; the transform is one kernel."""
OTHER_WIDTHS = [13696, 8320, 172, 36, 24, 6, 35, 1, 4080, 28672, 65536]
"""Several blocks to a token (13696, 8320, 172, 6), plain sums (172, 36, 24, 6, 4080), the identity (35, 1), large."""
TOKENS = [1, 2, 7, 8, 33, 300]


@cache
def transform(n: int, **how: bool) -> Any:
    from rcprun.backends.cuda.hadamard import Transform

    return Transform(n, **how)


def apply(n: int, x: np.ndarray, factor: np.ndarray | None = None, **how: bool) -> np.ndarray:
    import cupy

    y = cupy.full(x.shape, np.nan, dtype=np.float32)
    transform(n, **how).apply(cupy.asarray(x), y, factor_N=None if factor is None else cupy.asarray(factor))
    found: np.ndarray = y.get()
    return found


def quantize(
    n: int, x: np.ndarray, clip: float, bits: int, factor: np.ndarray | None = None, **how: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, after a check that the padding is as it was."""
    import cupy

    codes = cupy.full((len(x), -(-n // 128) * 128), 99, dtype=np.int8)
    scale = cupy.full(len(x), np.nan, dtype=np.float32)
    this = transform(n, **how)
    workspace = cupy.full(x.shape, np.nan, dtype=np.float32) if this.needs_workspace(len(x)) else None
    this.quantize(
        cupy.asarray(x),
        codes,
        scale,
        clip=np.float32(clip),
        bits=bits,
        factor_N=None if factor is None else cupy.asarray(factor),
        workspace_MN=workspace,
    )
    found = codes.get()
    assert np.all(found[:, n:] == 99)
    return found[:, :n], scale.get()


def worst(found: np.ndarray, expected: np.ndarray) -> str:
    difference = np.abs(found.astype(np.float64) - expected)
    at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    return f"worst at {tuple(map(int, at))}: found {found[at]!r}, expected {expected[at]!r}"


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(found, expected), worst(found, expected)


def tolerance(n: int) -> float:
    """Of an output, relative to the root mean square of all.

    A rounding is at most 2^-24 of a partial sum; partial sums are not much larger than outputs. P_m's m terms, added
    one after the other, err like the root of m roundings, and at most 16 Sylvester stages and the final product like
    another 5. The largest of 10^7 such errors is below 8 times their size.
    """
    return 8 * (5 + hadamard_factor(n).m ** 0.5) * 2.0**-24


def assert_close(n: int, found: np.ndarray, expected: np.ndarray) -> None:
    limit = tolerance(n) * np.sqrt(np.mean(np.square(expected)))
    assert np.all(np.abs(found - expected) <= limit), f"{worst(found, expected)}, allowed {limit}"


def integers(rng: np.random.Generator, tokens: int, n: int) -> np.ndarray:
    """Small ones everywhere, and rows with 4 of 22 bits each: all sums are below 2^24, some as long as that."""
    limit = 2**23 // n
    x = rng.integers(-limit, limit + 1, (tokens, n))
    for row in x[1::2]:
        row[:] = 0
        row[rng.choice(n, min(n, 4), replace=False)] = rng.integers(-(2**22) + 1, 2**22, min(n, 4)) | 1
    return x


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tokens", [6, 20])
@pytest.mark.parametrize("n", WIDTHS + OTHER_WIDTHS)
def test_integers_are_exact(n: int, tokens: int, transpose: bool) -> None:
    x = integers(np.random.default_rng(n + tokens), tokens, n)
    expected = hadamard_transform(x, transpose=transpose).astype(np.float32)
    found = apply(n, x.astype(np.float32), transpose=transpose)
    assert_equal(found, expected * np.float32(hadamard_factor(n).norm))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("n", WIDTHS)
def test_floats_and_codes(n: int, tokens: int) -> None:
    rng = np.random.default_rng(n * tokens)
    x = rng.normal(size=(tokens, n)).astype(np.float32)
    x[:, rng.integers(n)] *= 50
    y = apply(n, x)
    assert_close(n, y, hadamard_transform(x.astype(np.float64), normalized=True))
    for clip, bits in ((0.9, 4), (1.0, 8)):
        codes, scale = quantize(n, x, clip, bits)
        expected_codes, expected_scale = quantize_activations(y, clip, bits)
        assert_equal(scale, expected_scale[:, 0])
        assert_equal(codes, expected_codes)


@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize("n", OTHER_WIDTHS)
def test_other_widths(n: int, tokens: int) -> None:
    rng = np.random.default_rng(n)
    x, factor = rng.normal(size=(tokens, n)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    y = apply(n, x, factor)
    assert_close(n, y, hadamard_transform((factor * x).astype(np.float64), normalized=True))
    codes, scale = quantize(n, x, 0.95, 4, factor)
    expected_codes, expected_scale = quantize_activations(y, 0.95, 4)
    assert_equal(scale, expected_scale[:, 0])
    assert_equal(codes, expected_codes)


@pytest.mark.parametrize("tokens", [5, 33])
@pytest.mark.parametrize("n", [11008, 14336, 1408])
def test_the_way_of_older_gpus_gives_the_same_bits(n: int, tokens: int) -> None:
    x = np.random.default_rng(n).normal(size=(tokens, n)).astype(np.float32)
    assert_equal(apply(n, x, hopper=False), apply(n, x))
    codes, scale = quantize(n, x, 0.9, 4, hopper=False)
    expected_codes, expected_scale = quantize(n, x, 0.9, 4)
    assert_equal(codes, expected_codes)
    assert_equal(scale, expected_scale)


@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("n", [11008, 8192, 480])
def test_zero_huge_and_tiny_tokens(n: int, tokens: int) -> None:
    x = np.random.default_rng(n).normal(size=(tokens, n)).astype(np.float32)
    size = np.array([0, 1e30, 1e-20, 1e-28, 1e-34], dtype=np.float32)
    x *= size[np.arange(tokens) % len(size), None]
    y = apply(n, x)
    for row in range(tokens):
        if size[row % len(size)] > 1e-25:  # below, the last bits of an input's three terms are subnormal
            assert_close(n, y[row], hadamard_transform(x[row].astype(np.float64), normalized=True))
    codes, scale = quantize(n, x, 0.9, 4)
    expected_codes, expected_scale = quantize_activations(y, 0.9, 4)
    assert_equal(scale, expected_scale[:, 0])
    assert_equal(codes, expected_codes)
    assert not codes[0].any() and scale[0] == 1
    assert not codes[4].any() and scale[4] == 1


@pytest.mark.parametrize("how", [{}, {"rotate": False}], ids=["rotated", "not rotated"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_gets_no_finite_scale(bad: float, how: dict[str, bool]) -> None:
    x = np.ones((2, 8192), dtype=np.float32)
    x[0, 5000] = bad
    _, scale = quantize(8192, x, 0.9, 4, **how)
    assert not np.isfinite(scale[0]) and np.isfinite(scale[1])


@pytest.mark.parametrize("n", [11008, 35])
def test_without_rotation_it_only_quantizes(n: int) -> None:
    rng = np.random.default_rng(n)
    x, factor = rng.normal(size=(33, n)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    codes, scale = quantize(n, x, 1.0, 8, factor, rotate=False)
    expected_codes, expected_scale = quantize_activations(x * factor, 1.0, 8)
    assert_equal(scale, expected_scale[:, 0])
    assert_equal(codes, expected_codes)


@pytest.mark.parametrize("n", [4096, 5120])
def test_rotated_gain_of_a_head(n: int) -> None:
    """rot(gain ∘ unrot(h)) with any signs is had(gain ∘ hadᵀ(h)), to the bit: they come twice, and are ±1."""
    rng = np.random.default_rng(n)
    h = rng.normal(size=(3, n)).astype(np.float32)
    gain, signs = rng.normal(size=n).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    found = apply(n, apply(n, h, transpose=True), gain)
    assert_equal(apply(n, gain * (signs * apply(n, h, transpose=True)), signs), found)
    plain = gain * hadamard_transform(h.astype(np.float64), transpose=True, normalized=True)
    expected = hadamard_transform(plain, normalized=True)
    limit = 2 * tolerance(n) * np.sqrt(np.mean(np.square(expected)))
    assert np.all(np.abs(found - expected) <= limit), worst(found, expected)


@pytest.mark.parametrize("tokens", [8, 300])
def test_twice_the_same_bits(tokens: int) -> None:
    x = np.random.default_rng(tokens).normal(size=(tokens, 11008)).astype(np.float32)
    assert_equal(apply(11008, x), apply(11008, x))
    first, second = (quantize(11008, x, 0.9, 4) for _ in range(2))
    assert_equal(first[0], second[0])
    assert_equal(first[1], second[1])
