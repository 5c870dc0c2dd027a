"""RoPE, Hadamard and the way into the KV cache on the GPU, against rcpformat.arithmetic.

Shape suffixes: M tokens, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcpformat import Architecture, arithmetic
from rcpformat.hadamard import hadamard_transform
from tiny_rcp import TINY

pytestmark = pytest.mark.gpu

CONTEXT, SLOTS, LAYER = 70, 3, 1
CLIP = np.array([0.95, 0.9], dtype=np.float32)
EPS = 2.0**-23


def architecture(heads: int, kv_heads: int, head_dim: int) -> Architecture:
    return replace(TINY, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)


def inv_freq(head_dim: int) -> np.ndarray:
    return 10000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)


def run(
    a: Architecture, bits: int, qkv: np.ndarray, position: np.ndarray, slot: np.ndarray, *, r3: bool, gain: Any = None
) -> tuple[np.ndarray, Any]:
    """The queries (M, H, D), and the cache, whose memory was garbage before."""
    import cupy

    from rcprun.backends.cuda.kvcache import KVCache
    from rcprun.backends.cuda.rope import Rope

    cache = KVCache(a, bits, SLOTS, CONTEXT)
    for array in (*cache.key_NGTB, *cache.value_NGTB, *cache.scale_NGT2):
        array[...] = np.iinfo(array.dtype).max
    q = cupy.full((len(qkv), a.attention_size), np.nan, dtype=np.float32)
    gains = None if gain is None else tuple(map(cupy.asarray, gain))
    indices = (cupy.asarray(x.astype(np.int32)) for x in (position, slot))
    Rope(a, inv_freq(a.head_dim), CONTEXT, r3=r3)(cupy.asarray(qkv), *indices, cache, LAYER, CLIP, q, gains)
    return cupy.asnumpy(q).reshape(len(qkv), a.num_heads, a.head_dim), cache


def stored(cache: Any, site: int, slot: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (M, G, D), low and step (M, G, 1) of keys (site 0) or values (site 1)."""
    import cupy

    packed = cupy.asnumpy((cache.key_NGTB, cache.value_NGTB)[site][LAYER]).view(np.uint16)
    if site == 1:  # 16 bits of two tokens in turn
        shape = packed.shape
        pairs = packed.reshape(*shape[:2], shape[2] // 2, shape[3], 2)
        packed = np.ascontiguousarray(pairs.swapaxes(-1, -2)).reshape(shape)
    vectors = np.ascontiguousarray(packed[slot, :, position]).view(np.uint8)
    codes = arithmetic.unpack_nibbles(vectors) if cache.bits == 4 else vectors
    scale = cupy.asnumpy(cache.scale_NGT2[LAYER])[slot, :, position, site, None]
    low, step = ((scale >> shift).astype(np.uint16).view(np.float16) for shift in (0, 16))
    return codes[..., : cache.head_dim], low, step


def check_stored(cache: Any, site: int, slot: np.ndarray, position: np.ndarray, x_MGD: np.ndarray) -> None:
    expected = arithmetic.quantize_kv(x_MGD, CLIP[site], cache.bits)
    codes, low, step = stored(cache, site, slot, position)
    np.testing.assert_array_equal(low, expected.low)
    np.testing.assert_array_equal(step, expected.step)
    np.testing.assert_array_equal(codes, expected.codes)


def rows(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots, no pair twice."""
    place = rng.permutation(SLOTS * CONTEXT)[:count]
    return place % CONTEXT, place // CONTEXT


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(2, 2, 32), (8, 4, 64), (3, 1, 80), (6, 2, 96), (32, 8, 128), (8, 1, 256), (1, 1, 2), (2, 1, 90), (1, 1, 1024)],
)
def test_without_reductions_everything_is_equal(heads: int, kv_heads: int, head_dim: int, bits: int) -> None:
    a = architecture(heads, kv_heads, head_dim)
    rng = np.random.default_rng(head_dim)
    for count in (1, 5, 67):
        position, slot = rows(rng, count)
        qkv = rng.normal(size=(count, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        qkv[:, -head_dim:] *= 1e4  # values that clip at the largest half
        q_MHD, k_MGD, v_MGD = np.split(qkv.reshape(count, -1, head_dim), [heads, heads + kv_heads], axis=1)
        q, cache = run(a, bits, qkv, position, slot, r3=False)
        tables = arithmetic.rope_tables(position, inv_freq(head_dim), a.rope_attention_factor)
        np.testing.assert_array_equal(q, arithmetic.apply_rope(q_MHD, *tables))
        check_stored(cache, 0, slot, position, arithmetic.apply_rope(k_MGD, *tables))
        check_stored(cache, 1, slot, position, v_MGD)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("head_dim", [2, 32, 64, 80, 90, 96, 128, 172, 256])
def test_norm_and_hadamard(head_dim: int, norm: bool, bits: int) -> None:
    """Heads of k are those of q, so that the floats that were quantized are known to the last bit."""
    a = architecture(2, 2, head_dim)
    rng = np.random.default_rng(head_dim)
    position, slot = rows(rng, 33)
    x_MHD = rng.normal(size=(33, 2, head_dim)).astype(np.float32)
    qkv = np.concatenate([x_MHD, x_MHD, rng.normal(size=x_MHD.shape).astype(np.float32)], axis=1).reshape(33, -1)
    gain = rng.uniform(0.5, 2, head_dim).astype(np.float32) if norm else None
    q, cache = run(a, bits, qkv, position, slot, r3=True, gain=None if gain is None else (gain, gain))
    check_stored(cache, 0, slot, position, q)
    check_stored(cache, 1, slot, position, qkv.reshape(33, 6, head_dim)[:, 4:])

    if gain is not None:
        x_MHD = arithmetic.rms_normalize(x_MHD, a.rms_norm_eps) * gain
    tables = arithmetic.rope_tables(position, inv_freq(head_dim), a.rope_attention_factor)
    expected = hadamard_transform(arithmetic.apply_rope(x_MHD, *tables), normalized=True)
    # A sum of head_dim numbers of length |x| rounds head_dim times at the most; the norm before it, a few times more.
    tolerance = (head_dim + 8) * EPS * np.linalg.norm(x_MHD, axis=-1, keepdims=True)
    assert (np.abs(q - expected) <= tolerance).all(), np.abs(q - expected).max()


def test_vectors_at_the_edges_of_the_format() -> None:
    """Zeros, constants, one sign, the largest and the smallest numbers."""
    a = architecture(1, 1, 64)
    rng = np.random.default_rng(1)
    values = [np.zeros(64), np.full(64, 3.7), np.full(64, -1e30), rng.uniform(5, 6, 64), rng.uniform(-6, -5, 64)]
    values += [rng.normal(size=64) * scale for scale in (1e-40, 1e-9, 1e-4, 6e4, 1e30)]
    x_MD = np.array(values, dtype=np.float32)
    position, slot = rows(rng, len(x_MD))
    for bits in (4, 8):
        _, cache = run(a, bits, np.tile(x_MD, (1, 3)), position, slot, r3=False)
        check_stored(cache, 1, slot, position, x_MD[:, None])


def test_nan_stays_nan() -> None:
    a = architecture(1, 1, 64)
    qkv = np.random.default_rng(3).normal(size=(1, 3 * 64)).astype(np.float32)
    qkv[0, [5, 64 + 9, 128 + 63]] = np.nan
    place = np.zeros(1, dtype=np.int64)
    q, cache = run(a, 4, qkv, place, place, r3=True)
    assert np.isnan(q).all()
    for site in (0, 1):
        assert all(np.isnan(scale).all() for scale in stored(cache, site, place, place)[1:])


def run_from_sums(
    a: Architecture, bits: int, sums: Any, position: np.ndarray, slot: np.ndarray, *, r3: bool = True, gain: Any = None
) -> tuple[np.ndarray, Any]:
    """As run. sums: with scales and biases."""
    import cupy

    from rcprun.backends.cuda.kvcache import KVCache
    from rcprun.backends.cuda.rope import Rope

    cache = KVCache(a, bits, SLOTS, CONTEXT)
    for array in (*cache.key_NGTB, *cache.value_NGTB, *cache.scale_NGT2):
        array[...] = np.iinfo(array.dtype).max
    q = cupy.full((len(position), a.attention_size), np.nan, dtype=np.float32)
    gains = None if gain is None else tuple(map(cupy.asarray, gain))
    device = [cupy.asarray(each) if each is not None else None for each in sums]
    indices = (cupy.asarray(x.astype(np.int32)) for x in (position, slot))
    rope = Rope(a, inv_freq(a.head_dim), CONTEXT, r3=r3)
    rope.from_sums(*device, *indices, cache, LAYER, CLIP, q, gains)
    return cupy.asnumpy(q).reshape(-1, a.num_heads, a.head_dim), cache


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 4, 64), (3, 1, 80), (4, 4, 128), (6, 2, 256), (3, 1, 32), (1, 1, 512)]
)
def test_from_sums(heads: int, kv_heads: int, head_dim: int, biased: bool, bits: int) -> None:
    """The same bits as from the floats that sums become, each operation rounded."""
    a = architecture(heads, kv_heads, head_dim)
    rng, count, width = np.random.default_rng(head_dim), 23, (heads + 2 * kv_heads) * head_dim
    position, slot = rows(rng, count)
    sums = rng.integers(-(10**6), 10**6, (count, -(-width // 16) * 16), dtype=np.int32)
    x_scale, scale = (rng.uniform(1e-3, 1e-2, n).astype(np.float32) for n in (count, sums.shape[1]))
    bias = rng.normal(size=sums.shape[1]).astype(np.float32) if biased else None
    qkv = (sums.astype(np.float32) * x_scale[:, None] * scale + (0 if bias is None else bias))[:, :width]
    expected, cache = run(a, bits, np.ascontiguousarray(qkv), position, slot, r3=True)
    q, found = run_from_sums(a, bits, (sums, x_scale, scale, bias), position, slot)
    np.testing.assert_array_equal(q, expected)
    for name in ("key_NGTB", "value_NGTB", "scale_NGT2"):
        np.testing.assert_array_equal(getattr(found, name)[LAYER].get(), getattr(cache, name)[LAYER].get())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_norm_from_sums(head_dim: int, bits: int) -> None:
    """Heads of k are those of q, as in test_norm_and_hadamard, and sums become themselves."""
    a = architecture(3, 3, head_dim)
    rng = np.random.default_rng(head_dim)
    position, slot = rows(rng, 33)
    x_MHD = rng.integers(-(10**4), 10**4, (33, 3, head_dim), dtype=np.int32)
    sums = np.concatenate([x_MHD] * 3, axis=1).reshape(33, -1)
    one = np.ones(sums.shape[1], dtype=np.float32)
    gain = rng.uniform(0.5, 2, head_dim).astype(np.float32)
    q, cache = run_from_sums(a, bits, (sums, one[:33], one, None), position, slot, gain=(gain, gain))
    check_stored(cache, 0, slot, position, q)
    check_stored(cache, 1, slot, position, x_MHD.astype(np.float32))

    normalized = arithmetic.rms_normalize(x_MHD.astype(np.float32), a.rms_norm_eps) * gain
    tables = arithmetic.rope_tables(position, inv_freq(head_dim), a.rope_attention_factor)
    expected = hadamard_transform(arithmetic.apply_rope(normalized, *tables), normalized=True)
    tolerance = (head_dim + 8) * EPS * np.linalg.norm(normalized, axis=-1, keepdims=True)
    assert (np.abs(q - expected) <= tolerance).all(), np.abs(q - expected).max()


def test_other_places_stay_and_runs_repeat() -> None:
    import cupy

    a = architecture(4, 2, 128)
    rng = np.random.default_rng(2)
    position, slot = rows(rng, 20)
    qkv = rng.normal(size=(20, 8 * 128)).astype(np.float32)
    results = [run(a, 4, qkv, position, slot, r3=True) for _ in range(2)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    written = np.zeros((SLOTS, results[0][1].capacity), dtype=bool)
    written[slot, position] = True
    for name in ("key_NGTB", "value_NGTB", "scale_NGT2"):
        first, second = (cupy.asnumpy(getattr(cache, name)[LAYER]) for _, cache in results)
        np.testing.assert_array_equal(first, second)
        garbage = np.iinfo(first.dtype).max
        assert all((cupy.asnumpy(array) == garbage).all() for array in getattr(results[0][1], name)[:LAYER])
        if name == "scale_NGT2":
            assert (first.swapaxes(1, 2)[~written] == garbage).all()
        else:  # one layout serves both sites here: 16 bits of a token are its own
            units = first.view(np.uint16)
            if name == "value_NGTB":
                pairs = units.reshape(*units.shape[:2], units.shape[2] // 2, units.shape[3], 2)
                units = pairs.swapaxes(-1, -2).reshape(units.shape)
            assert (units.swapaxes(1, 2)[~written] == 0xFFFF).all()
