"""RMSNorm and quantization on the GPU against rcpformat.arithmetic."""

from typing import Any

import numpy as np
import pytest

from rcpformat import arithmetic

pytestmark = pytest.mark.gpu

CHANNELS = [4096, 5120, 2048, 11008, 14336, 53248, 512, 192, 480, 172, 171, 4, 1]
EPS = np.float32(1e-5)
CLIP = np.float32(0.9)
POISON = 77
"""In every byte of the codes before a launch; the padding keeps it."""


def rows(tokens: int, channels: int) -> np.ndarray:
    """Random rows of several magnitudes, one with an outlier, one of zeros, one that quantizes to zeros."""
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(tokens, channels)) * 10.0 ** rng.integers(-3, 4, (tokens, 1))
    x[0, channels // 2] = 1000
    x[1] = 0
    x[2] *= 1e-35
    return x.astype(np.float32)


def empty_codes(tokens: int, channels: int) -> tuple[Any, Any]:
    import cupy

    codes = cupy.full((tokens, -(-channels // 128) * 128), POISON, dtype=np.int8)
    return codes, cupy.full(tokens, np.nan, dtype=np.float32)


def check_codes(codes: Any, scale: Any, x: np.ndarray, bits: int) -> None:
    """The codes and scales are those of x, and the padding is as it was."""
    expected, expected_scale = arithmetic.quantize_activations(x, CLIP, bits)
    np.testing.assert_array_equal(codes.get()[:, : x.shape[1]], expected)
    np.testing.assert_array_equal(scale.get(), expected_scale[:, 0])
    assert (codes.get()[:, x.shape[1] :] == POISON).all()


@pytest.mark.parametrize("channels", CHANNELS)
def test_normalized_rows(channels: int) -> None:
    """A thread adds up to 52 squares and two warps' trees add 10 sums, all positive: up to 62 roundings of 2^-24, of
    which the root takes half; four more operations follow."""
    import cupy

    from rcprun.backends.cuda.norm import normalize

    x = rows(9, channels)
    out = cupy.full(x.shape, np.nan, dtype=np.float32)
    normalize(cupy.asarray(x), out, eps=EPS)
    exact = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True) + float(EPS))
    np.testing.assert_allclose(out.get(), exact, rtol=35 * 2.0**-24, atol=1e-44)
    again = cupy.asarray(x)
    normalize(again, again, eps=EPS)
    np.testing.assert_array_equal(again.get(), out.get())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("channels", CHANNELS)
def test_codes_are_those_of_the_normalized_rows(channels: int, bits: int) -> None:
    import cupy

    from rcprun.backends.cuda.norm import norm_quantize, normalize, quantize

    x = rows(300, channels)
    device, normalized = cupy.asarray(x), cupy.empty(x.shape, dtype=np.float32)
    normalize(device, normalized, eps=EPS)
    codes, scale = empty_codes(*x.shape)
    norm_quantize(device, codes, scale, eps=EPS, clip=CLIP, bits=bits)
    check_codes(codes, scale, normalized.get(), bits)
    codes, scale = empty_codes(*x.shape)
    quantize(device, codes, scale, clip=CLIP, bits=bits)
    check_codes(codes, scale, x, bits)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(poison: float) -> None:
    """NaN, or infinity in `quantize`, in one row's scale, and in that row's only."""
    import cupy

    from rcprun.backends.cuda.norm import norm_quantize, quantize

    x = rows(4, 480)
    x[3, 100] = poison
    codes, scale = empty_codes(*x.shape)
    norm_quantize(cupy.asarray(x), codes, scale, eps=EPS, clip=CLIP, bits=4)
    assert np.isnan(scale.get()).tolist() == [False, False, False, True]
    quantize(cupy.asarray(x), codes, scale, clip=CLIP, bits=4)
    assert np.isfinite(scale.get()).tolist() == [True, True, True, False]
