"""Attention of a block of queries over the quantized KV cache. Knows nothing of layers.

Keys and values are read back as numbers before the dot products. Distributing the products over low and step would save
two passes, but low · Σq and step · (q·code) nearly cancel, which costs digits: 1% fewer equal top-1 predictions.

Shape suffixes: M queries, H heads, G KV heads, R query heads per KV head (H = G · R), T visible tokens, D head_dim.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rcpformat.arithmetic import Float32Array
from rcprun.backends.numpy.kvcache import KEY, VALUE, KVCache

_SCRATCH_BYTES = 64 << 20
"""Largest temporary array, where a single KV head or query does not need more."""


def attend(cache: KVCache, layer: int, q_MHD: Float32Array, start: int, window: int | None) -> Float32Array:
    """SPEC.md, "Attention", steps 5 and 6: (M, H, D) of the queries at positions start, start + 1, …

    The cache holds the keys and values of those positions already.
    """
    count, heads, width = q_MHD.shape
    kv_heads = cache.kv_heads
    first = 0 if window is None else max(0, start - window + 1)
    tokens = slice(first, start + count)
    visible = tokens.stop - tokens.start
    position_M, position_T = np.arange(start, tokens.stop), np.arange(first, tokens.stop)
    q_GRMD = q_MHD.reshape(count, kv_heads, heads // kv_heads, width).transpose(1, 2, 0, 3)
    out_GRMD = np.empty(q_GRMD.shape, dtype=np.float32)
    groups_at_once = max(1, _SCRATCH_BYTES // (4 * visible * width))
    queries_at_once = max(1, _SCRATCH_BYTES // (4 * visible * heads))
    for group in range(0, kv_heads, groups_at_once):
        groups = slice(group, group + groups_at_once)
        keys = cache.read(layer, KEY, groups, tokens)
        values = cache.read(layer, VALUE, groups, tokens)
        for query in range(0, count, queries_at_once):
            queries = slice(query, query + queries_at_once)
            hidden = _hidden(position_M[queries], position_T, window) if count > 1 else None
            out_GRMD[groups, :, queries] = _attend(q_GRMD[groups, :, queries], keys, values, hidden)
    return out_GRMD.transpose(2, 0, 1, 3).reshape(count, heads, width)


def _attend(
    q_GRMD: Float32Array, key_GTD: Float32Array, value_GTD: Float32Array, hidden_MT: NDArray[np.bool_] | None
) -> Float32Array:
    shape = q_GRMD.shape
    q_GQD = q_GRMD.reshape(shape[0], -1, shape[3])  # Q = R · M
    scores_GQT = q_GQD @ key_GTD.transpose(0, 2, 1)
    scores_GQT /= np.float32(math.sqrt(shape[3]))
    if hidden_MT is not None:
        np.copyto(scores_GQT.reshape(*shape[:3], -1), -np.inf, where=hidden_MT)
    scores_GQT -= scores_GQT.max(axis=-1, keepdims=True)
    weight_GQT = np.exp(scores_GQT, out=scores_GQT)
    weight_GQT /= weight_GQT.sum(axis=-1, keepdims=True)
    out_GQD: Float32Array = weight_GQT @ value_GTD
    return out_GQD.reshape(shape)


def _hidden(query_M: NDArray[np.int64], key_T: NDArray[np.int64], window: int | None) -> NDArray[np.bool_]:
    """(M, T): which keys a query may not see, by their positions."""
    hidden_MT: NDArray[np.bool_] = key_T > query_M[:, None]
    if window is not None:
        hidden_MT |= key_T <= query_M[:, None] - window
    return hidden_MT
