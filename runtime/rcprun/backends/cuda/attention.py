"""Attention over the quantized KV cache on the GPU, of one token of each of a few sequences. Launches attention.cu.

Shape suffixes: M query tokens, H query heads, C channels (H heads of D), D head_dim.
"""

from __future__ import annotations

import math

import cupy
import numpy as np

from rcpformat.spec import ceil_div
from rcprun.backends.cuda.kvcache import KVCache, vector_bytes
from rcprun.backends.cuda.launch import check, kernel, multiprocessors

MAX_HEAD_DIM = 512
_NO_WINDOW = 2**31 - 1
_COLUMNS = 4
"""Query heads of one block."""
_MAX_SPLITS = 128
_BLOCKS_PER_MULTIPROCESSOR = 2
_FEWEST_SPLITS = 4
"""Also where there are blocks enough: sequences differ in length."""


class Decode:
    """Attention of one token of each of up to `rows` sequences, with the workspace that it needs. One stream at a time.

    The launches do not depend on positions or slots, so that they can be captured in a graph.
    """

    def __init__(self, cache: KVCache, heads: int, rows: int) -> None:
        self._cache, self._heads, self._rows = cache, heads, rows
        self._groups = _head_groups(cache, heads)
        self._splits = _splits(cache, self._groups * rows)
        self._arrived = cupy.zeros(rows * self._groups, dtype=np.uint32)
        columns = rows * self._groups * self._splits * _COLUMNS
        self._partial = cupy.empty((columns, _padded(cache)), dtype=np.float32)
        self._partial_scale = cupy.empty((columns, 2), dtype=np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._arrived.nbytes + self._partial.nbytes + self._partial_scale.nbytes)

    def __call__(
        self,
        q_MC: cupy.ndarray,
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        layer: int,
        window: int | None,
        out_MC: cupy.ndarray,
    ) -> None:
        """SPEC.md, "Attention", step 6: out_MC float32 of q_MC float32, from what the cache holds up to each position.

        position_M, slot_M: int32.
        """
        cache, count = self._cache, len(q_MC)
        assert count <= self._rows
        for name, array in (("q", q_MC), ("out", out_MC)):
            check(array, name, np.float32, (count, self._heads * cache.head_dim))
        for name, array in (("position", position_M), ("slot", slot_M)):
            check(array, name, np.int32, (count,))
        kernel("attention", "decode_attention", (("HEAD_DIM", cache.head_dim), ("BITS", cache.bits))).launch(
            (self._splits, self._groups, count),
            32 * (8 if _padded(cache) <= 256 else 4),
            (
                q_MC,
                cache.key_NGTB[layer],
                cache.value_NGTB[layer],
                cache.scale_NGT2[layer],
                position_M,
                slot_M,
                out_MC,
                self._partial,
                self._partial_scale,
                self._arrived,
                *_sizes(cache, self._heads, window),
            ),
            overlap=True,
        )


def decode_workspace_bytes(cache: KVCache, heads: int, rows: int) -> int:
    """What a Decode would hold, without allocating it."""
    groups = rows * _head_groups(cache, heads)
    return 4 * groups * (1 + _splits(cache, groups) * _COLUMNS * (_padded(cache) + 2))


def _sizes(cache: KVCache, heads: int, window: int | None) -> tuple[np.int32 | np.float32, ...]:
    visible = min(window or _NO_WINDOW, _NO_WINDOW)
    scale = np.float32(math.log2(math.e) / math.sqrt(cache.head_dim))
    return (*map(np.int32, (heads, cache.kv_heads, cache.capacity, visible)), scale)


def _padded(cache: KVCache) -> int:
    return vector_bytes(cache.head_dim, cache.bits) * 8 // cache.bits


def _head_groups(cache: KVCache, heads: int) -> int:
    assert cache.head_dim <= MAX_HEAD_DIM and heads % cache.kv_heads == 0
    return cache.kv_heads * ceil_div(heads // cache.kv_heads, _COLUMNS)


def _splits(cache: KVCache, groups: int) -> int:
    """Blocks that share the tokens of one row and group of heads: as many as run at once, and the context can use."""
    useful = ceil_div(cache.capacity, 256)
    return min(_MAX_SPLITS, useful, max(_FEWEST_SPLITS, _BLOCKS_PER_MULTIPROCESSOR * multiprocessors() // groups))
