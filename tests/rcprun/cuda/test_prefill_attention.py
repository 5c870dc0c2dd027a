"""Attention of many tokens over the packed KV cache on the GPU, against the NumPy backend's.

Shape suffixes: M query tokens, H query heads, D head_dim.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.rcprun.cuda.test_attention import LAYER, SHAPES, Filled, check_close, fill, queries

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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_prefill(heads: int, kv_heads: int, head_dim: int, bits: int) -> None:
    """Some tokens, and all at once; from the first on and after others; all visible, or a window of them."""
    filled = fill(heads, kv_heads, head_dim, bits, [7, 333], seed=head_dim, scale=1.0)
    for start, count in ((0, 1), (0, 333), (65, 100), (300, 33)):
        q_MHD = queries(9, count, heads, head_dim)
        for window in (None, 1, 50):
            found = attend(filled, q_MHD, start, window)
            check_close(found, q_MHD, filled.numpy[SLOT], start, window)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 128), (8, 2, 64)])
def test_far(heads: int, kv_heads: int, head_dim: int) -> None:
    """Many tiles, and a window over several of them."""
    filled = fill(heads, kv_heads, head_dim, 4, [1, 2500], seed=1, scale=1.0)
    for start, count in ((0, 2500), (2300, 200)):
        q_MHD = queries(8, count, heads, head_dim)
        for window in (None, 1000):
            found = attend(filled, q_MHD, start, window)
            check_close(found, q_MHD, filled.numpy[SLOT], start, window)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0, 2e4])
def test_tiny_and_huge_vectors(scale: float) -> None:
    """Steps from the smallest to the largest half, scores that leave one token all the weight."""
    filled = fill(4, 2, 64, 4, [1, 150], seed=3, scale=scale)
    for length in (1e-30, 1e-3, 1.0, 100.0):
        q_MHD = queries(4, 140, 4, 64) * np.float32(length)
        check_close(attend(filled, q_MHD, 10, None), q_MHD, filled.numpy[SLOT], 10, None)
