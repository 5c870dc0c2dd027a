"""Attention over the packed KV cache on the GPU while decoding, against the NumPy backend's.

Shape suffixes: M query tokens, H query heads, G KV heads, T tokens in the cache, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from rcpformat import Architecture
from rcprun.backends.numpy import attention as reference
from rcprun.backends.numpy.kvcache import KEY, VALUE
from rcprun.backends.numpy.kvcache import KVCache as NumpyCache
from tiny_rcp import TINY

pytestmark = pytest.mark.gpu

CLIP = np.array([0.95, 0.95], dtype=np.float32)
EPS = 2.0**-23
LAYER = 1


@dataclass
class Filled:
    """The same tokens in a GPU cache (in several slots) and in a NumPy cache for each slot."""

    architecture: Architecture
    gpu: Any
    numpy: list[NumpyCache]


def fill(heads: int, kv_heads: int, head_dim: int, bits: int, lengths: list[int], seed: int, scale: float) -> Filled:
    """What is not one of the `lengths` tokens of a slot is NaN, infinite or garbage. scale: of keys and values."""
    import cupy

    from rcprun.backends.cuda.kvcache import KVCache
    from rcprun.backends.cuda.rope import Rope

    a = replace(TINY, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    rng = np.random.default_rng(seed)
    gpu = KVCache(a, bits, len(lengths), max(lengths))
    for array in (*gpu.key_NGTB, *gpu.value_NGTB, *gpu.scale_NGT2):
        array[...] = np.iinfo(array.dtype).max
    rope = Rope(a, np.zeros(head_dim // 2), max(lengths), r3=False)  # angle 0: keys go in as they are
    caches = []
    for slot, length in enumerate(lengths):
        qkv = rng.normal(size=(length, heads + 2 * kv_heads, head_dim)).astype(np.float32)
        qkv *= scale * rng.uniform(0.1, 2, (length, heads + 2 * kv_heads, 1)).astype(np.float32)
        q = cupy.empty((length, heads * head_dim), dtype=np.float32)
        position, slots = np.arange(length, dtype=np.int32), np.full(length, slot, dtype=np.int32)
        device = (cupy.asarray(x) for x in (qkv.reshape(length, -1), position, slots))
        rope(*device, gpu, LAYER, CLIP, q)
        cache = NumpyCache(a, bits, length)
        cache.reserve(length)
        cache.write(LAYER, KEY, 0, qkv[:, heads : heads + kv_heads], CLIP[KEY])
        cache.write(LAYER, VALUE, 0, qkv[:, heads + kv_heads :], CLIP[VALUE])
        caches.append(cache)
    return Filled(a, gpu, caches)


def check_close(found: np.ndarray, q_MHD: np.ndarray, cache: NumpyCache, start: int, window: int | None) -> None:
    """found and the reference differ by the roundings of both.

    A score is a sum of D products, and then a few roundings: |q|·|k| / sqrt(D) times (D + 16) half-ulps at the most, on
    each side. An error of s in all scores changes weights by 2s, relatively, and the output is a mean of values with
    these weights: 2s of the largest value, and the roundings of the sums (the GPU adds 16 tokens at a time, truncating;
    NumPy adds with other blocks of its own) and of exp2, 2^-22.
    """
    expected = reference.attend(cache, LAYER, q_MHD, start, window)
    tokens = slice(0, start + len(q_MHD))
    keys, values = (cache.read(LAYER, site, slice(None), tokens) for site in (KEY, VALUE))
    head_dim = q_MHD.shape[-1]
    length = np.linalg.norm(q_MHD, axis=-1).max() * np.linalg.norm(keys, axis=-1).max() / math.sqrt(head_dim)
    score = length * (head_dim + 16) * EPS
    tolerance = np.abs(values).max() * (2 * score + (tokens.stop / 16 + 32) * EPS)
    difference = np.abs(found - expected)
    at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    assert difference[at] <= tolerance, f"worst at {at}: {found[at]!r}, expected {expected[at]!r} ± {tolerance:.3g}"


def decode(
    filled: Filled, q_MHD: np.ndarray, position: list[int], slot: list[int], window: int | None, rows: int, hopper: bool
) -> np.ndarray:
    """Twice, with the same workspace: the same bits."""
    import cupy

    from rcprun.backends.cuda.attention import _EMPTY, Decode, decode_workspace_bytes

    heads = filled.architecture.num_heads
    attend = Decode(filled.gpu, heads, rows, hopper=hopper)
    assert attend.nbytes == decode_workspace_bytes(filled.gpu, heads, rows, hopper=hopper)
    q = cupy.asarray(q_MHD.reshape(len(q_MHD), -1))
    indices = [cupy.asarray(np.array(x, dtype=np.int32)) for x in (position, slot)]
    results = []
    for _ in range(2):
        out = cupy.full(q.shape, np.nan, dtype=np.float32)
        attend(q, *indices, LAYER, window, out)
        results.append(cupy.asnumpy(out).reshape(q_MHD.shape))
    np.testing.assert_array_equal(results[0], results[1])
    assert (cupy.asnumpy(attend._partial) == _EMPTY).all() and not cupy.asnumpy(attend._arrived).any()
    return results[0]


def queries(seed: int, count: int, heads: int, head_dim: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, heads, head_dim)) * rng.uniform(0.1, 3, (count, heads, 1))).astype(np.float32)


SHAPES = [
    (2, 2, 32),
    (8, 2, 64),
    (3, 1, 80),
    (6, 2, 96),
    (4, 4, 128),
    (8, 1, 128),
    (4, 1, 256),
    (5, 1, 90),
    (1, 1, 2),
    (2, 1, 512),
]


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_decode(heads: int, kv_heads: int, head_dim: int, bits: int, hopper: bool) -> None:
    lengths = [1001, 1, 66, 512]
    filled = fill(heads, kv_heads, head_dim, bits, lengths, seed=head_dim, scale=1.0)
    for window in (None, 1, 40, 700):
        position, slot = [1000, 0, 63, 64, 65, 0, 511, 999], [0, 1, 2, 2, 2, 0, 3, 0]
        q_MHD = queries(7, len(position), heads, head_dim)
        found = decode(filled, q_MHD, position, slot, window, rows=8, hopper=hopper)
        for m, (p, s) in enumerate(zip(position, slot, strict=True)):
            check_close(found[m : m + 1], q_MHD[m : m + 1], filled.numpy[s], p, window)


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 4, 128), (3, 1, 80)])
def test_decode_far(heads: int, kv_heads: int, head_dim: int, hopper: bool) -> None:
    """Many teams of blocks, and one row at a time."""
    filled = fill(heads, kv_heads, head_dim, 4, [5001], seed=1, scale=1.0)
    q_HD = queries(8, 1, heads, head_dim)
    for position in (5000, 4096, 255, 256):
        for window in (None, 4096):
            found = decode(filled, q_HD, [position], [0], window, rows=1, hopper=hopper)
            check_close(found, q_HD, filled.numpy[0], position, window)


FUSED_SHAPES = [(8, 2, 64), (5, 1, 32), (3, 1, 80), (4, 4, 128), (4, 1, 256), (5, 1, 90), (2, 1, 512)]


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("bits", "norm", "r3"), [(4, False, True), (8, True, False)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), FUSED_SHAPES)
def test_fused(heads: int, kv_heads: int, head_dim: int, bits: int, norm: bool, r3: bool, hopper: bool) -> None:
    """Rope, then attention, to the last bit: the cache and what comes out. Other tokens are in the new ones' places."""
    import cupy

    from rcprun.backends.cuda.attention import Decode
    from rcprun.backends.cuda.rope import Rope

    lengths = [1001, 1, 65, 513]
    filled = fill(heads, kv_heads, head_dim, bits, lengths, seed=head_dim, scale=1.0)
    gpu, rng = filled.gpu, np.random.default_rng(11)
    rope = Rope(filled.architecture, 10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim), max(lengths), r3=r3)
    gains = tuple(cupy.asarray(rng.uniform(0.5, 2, head_dim).astype(np.float32)) for _ in range(2)) if norm else None
    attend = Decode(gpu, heads, len(lengths), hopper=hopper)
    for rows, position in (([0, 1, 2, 3], [1000, 0, 64, 511]), ([2, 0], [63, 512]), ([3], [31])):
        qkv_MC = rng.normal(size=(len(rows), (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        qkv = cupy.asarray(qkv_MC)
        indices = [cupy.asarray(np.array(x, dtype=np.int32)) for x in (position, rows)]
        q = cupy.empty((len(rows), heads * head_dim), dtype=np.float32)
        for window in (None, 33):
            caches = [array[LAYER] for array in (gpu.key_NGTB, gpu.value_NGTB, gpu.scale_NGT2)]
            expected = cupy.full(q.shape, np.nan, dtype=np.float32)
            rope(qkv, *indices, gpu, LAYER, CLIP, q, gains)
            attend(q, *indices, LAYER, window, expected)
            expected_caches = [cupy.asnumpy(array) for array in caches]

            other = cupy.asarray(rng.normal(size=qkv_MC.shape).astype(np.float32) * 1e3)
            rope(other, *indices, gpu, LAYER, CLIP, q, gains)
            assert any((cupy.asnumpy(array) != e).any() for array, e in zip(caches, expected_caches, strict=True))
            found = cupy.full(q.shape, np.nan, dtype=np.float32)
            attend.fused(qkv, *indices, LAYER, window, found, rope, CLIP, gains)
            np.testing.assert_array_equal(cupy.asnumpy(found), cupy.asnumpy(expected))
            for array, e in zip(caches, expected_caches, strict=True):
                np.testing.assert_array_equal(cupy.asnumpy(array), e)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0, 2e4])
def test_tiny_and_huge_vectors(scale: float) -> None:
    """Steps from the smallest to the largest half, scores that leave one token all the weight."""
    filled = fill(4, 2, 64, 4, [300], seed=3, scale=scale)
    for length in (1e-30, 1e-3, 1.0, 100.0):
        q_MHD = queries(4, 1, 4, 64) * np.float32(length)
        found = decode(filled, q_MHD, [299], [0], None, rows=1, hopper=True)
        check_close(found, q_MHD, filled.numpy[0], 299, None)


def test_bytes_are_known_before() -> None:
    from rcprun.backends.cuda.kvcache import KVCache, bytes_needed

    for head_dim, bits, context in ((80, 4, 33), (128, 8, 64), (2, 4, 1)):
        a = replace(TINY, num_layers=3, head_dim=head_dim)
        assert KVCache(a, bits, 2, context).nbytes == bytes_needed(a, bits, 2, context)
