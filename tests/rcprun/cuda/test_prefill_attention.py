"""Attention of many tokens over the packed KV cache on the GPU, against the NumPy backend's.

Shape suffixes: M query tokens, H query heads, D head_dim.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcprun.backends.numpy import attention as reference
from rcprun.backends.numpy.kvcache import KEY, VALUE
from tests.rcprun.cuda.test_attention import EPS, LAYER, SHAPES, Filled, fill, queries

pytestmark = pytest.mark.gpu

SLOT = 1


def attend(filled: Filled, q_MHD: np.ndarray, start: int, window: int | None) -> np.ndarray:
    """Twice: the same bits."""
    import cupy

    from rcprun.backends.cuda.prefill_attention import prefill_attention

    q = cupy.asarray(q_MHD.reshape(len(q_MHD), -1))
    results = []
    for _ in range(2):
        out = cupy.full(q.shape, np.nan, dtype=np.float32)
        prefill_attention(q, filled.gpu, LAYER, SLOT, start, window, out)
        results.append(cupy.asnumpy(out).reshape(q_MHD.shape))
    np.testing.assert_array_equal(results[0], results[1])
    return results[0]


def check_close(found: np.ndarray, q_MHD: np.ndarray, filled: Filled, start: int, window: int | None) -> None:
    """found and the reference differ by the roundings of both.

    A vector is mid + step · c', of which each part is at most as large as the vectors are, or 2^(bits - 1) times the
    least step, 2^-14. A score is a sum of D products, and then a few roundings: |q|·|k| / sqrt(D) times (D + 16)
    half-ulps at the most, on each side. An error of s in all scores changes weights by 2s, relatively, and the output
    is a mean of values with these weights: 2s of the largest value, and the roundings of the sums (the GPU adds 16
    tokens at a time, truncating, hi and lo in turn; NumPy adds with other blocks of its own), of log2 of steps and of
    exp2, 2^-22.
    """
    cache, head_dim = filled.numpy[SLOT], q_MHD.shape[-1]
    expected = reference.attend(cache, LAYER, q_MHD, start, window)
    tokens = slice(0, start + len(q_MHD))
    keys, values = (cache.read(LAYER, site, slice(None), tokens) for site in (KEY, VALUE))
    least = 2.0 ** (filled.gpu.bits - 15)
    key_length = np.linalg.norm(keys, axis=-1).max() + least * math.sqrt(head_dim)
    score = np.linalg.norm(q_MHD, axis=-1).max() * key_length / math.sqrt(head_dim) * (head_dim + 16) * EPS
    tolerance = (np.abs(values).max() + least) * (2 * score + (tokens.stop / 8 + 32) * EPS)
    difference = np.abs(found - expected)
    at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    assert difference[at] <= tolerance, f"worst at {at}: {found[at]!r}, expected {expected[at]!r} ± {tolerance:.3g}"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_prefill(heads: int, kv_heads: int, head_dim: int, bits: int) -> None:
    """Some tokens, and all at once; from the first on and after others; all visible, or a window of them."""
    filled = fill(heads, kv_heads, head_dim, bits, [7, 333], seed=head_dim, scale=1.0)
    for start, count in ((0, 1), (0, 333), (65, 100), (300, 33)):
        q_MHD = queries(9, count, heads, head_dim)
        for window in (None, 1, 50):
            found = attend(filled, q_MHD, start, window)
            check_close(found, q_MHD, filled, start, window)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 128), (8, 2, 64)])
def test_far(heads: int, kv_heads: int, head_dim: int) -> None:
    """Many tiles, and a window over several of them."""
    filled = fill(heads, kv_heads, head_dim, 4, [1, 1500], seed=1, scale=1.0)
    for start, count in ((1000, 500), (1400, 100)):
        q_MHD = queries(8, count, heads, head_dim)
        for window in (None, 700):
            found = attend(filled, q_MHD, start, window)
            check_close(found, q_MHD, filled, start, window)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0, 2e4])
def test_tiny_and_huge_vectors(scale: float) -> None:
    """Steps from the smallest to the largest half, scores that leave one token all the weight."""
    filled = fill(4, 2, 64, 4, [1, 150], seed=3, scale=scale)
    for length in (1e-30, 1e-3, 1.0, 100.0):
        q_MHD = queries(4, 140, 4, 64) * np.float32(length)
        check_close(attend(filled, q_MHD, 10, None), q_MHD, filled, 10, None)


@pytest.mark.parametrize("block", [(2, 32), (1, 16)])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (160, 8)])
def test_blocks_for_less_shared_memory(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, bits: int, block: tuple[int, int]
) -> None:
    from rcprun.backends.cuda import prefill_attention as module

    monkeypatch.setattr(module, "_BLOCKS", (block, block))
    module._block.cache_clear()
    try:
        filled = fill(4, 2, head_dim, bits, [1, 90], seed=5, scale=1.0)
        q_MHD = queries(6, 70, 4, head_dim)
        check_close(attend(filled, q_MHD, 20, None), q_MHD, filled, 20, None)
    finally:
        module._block.cache_clear()


def test_the_smallest_block_fits_everywhere() -> None:
    """99 KiB is what an RTX 40 gives a block."""
    from rcprun.backends.cuda.kvcache import vector_bytes
    from rcprun.backends.cuda.prefill_attention import _BLOCKS, MAX_HEAD_DIM, shared_bytes

    for head_dim in range(2, MAX_HEAD_DIM + 1, 2):
        for bits in (4, 8):
            padded = vector_bytes(head_dim, bits) * 8 // bits
            assert shared_bytes(padded, bits, *_BLOCKS[-1], parts=-(-padded // 256)) <= 99 << 10
