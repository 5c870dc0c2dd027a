"""Attention over the quantized KV cache on the GPU, of one token of each of a few sequences. Launches attention.cu.

Shape suffixes: M query tokens, H query heads, C channels (H heads of D), D head_dim.
"""

from __future__ import annotations

import math

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat.spec import ceil_div
from rcprun.backends.cuda.kvcache import KVCache, vector_bytes
from rcprun.backends.cuda.launch import NO_HOPPER, check, has_hopper, kernel, multiprocessors
from rcprun.backends.cuda.rope import Rope

MAX_HEAD_DIM = 512
_NO_WINDOW = 2**31 - 1
_COLUMNS = 4
"""Query heads of one block."""
_MAX_TEAMS = 128
_BLOCKS_PER_MULTIPROCESSOR = 2
_MAX_CLUSTER = 4
_PART_BYTES = 32
"""Of four channels of a team: attention.cu's Part."""
_EMPTY = 2**32 - 1
"""Each word of a part that is not there yet."""
_EARLY_BYTES = 24 * 1024
"""Of the cache, that a block asks for while the kernel before still runs: enough to keep memory busy; more would only
delay what that kernel reads."""
_OTHER_SHARED = 48 * 1024
"""Bytes of shared memory that decoding needs at most besides the ring of tiles."""


class Decode:
    """Attention of one token of each of up to `rows` sequences, with the workspace that it needs. One stream at a time.

    The launches do not depend on positions or slots, so that they can be captured in a graph.
    """

    def __init__(self, cache: KVCache, heads: int, rows: int, *, hopper: bool = True) -> None:
        """hopper: False for the way of older GPUs, which they take by themselves."""
        self._cache, self._heads, self._rows = cache, heads, rows
        self._hopper, self._clusters = hopper, hopper and has_hopper()
        parts, arrived = _workspace(cache, heads, rows, self._clusters)
        self._partial = cupy.full((parts, _PART_BYTES // 4), _EMPTY, dtype=np.uint32)
        self._arrived = cupy.zeros(arrived, dtype=np.uint32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._partial.nbytes + self._arrived.nbytes)

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
        check(q_MC, "q", np.float32, (len(q_MC), self._heads * self._cache.head_dim))
        constants = (None, None, None, None, None)
        defines = (("FUSED", 0), ("PALEY", 0), ("HADAMARD", 1))
        self._launch(q_MC, position_M, slot_M, layer, window, out_MC, defines, constants, (np.float32(0),) * 4)

    def fused(
        self,
        qkv_MC: cupy.ndarray,
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        layer: int,
        window: int | None,
        out_MC: cupy.ndarray,
        rope: Rope,
        kv_clip: NDArray[np.float32],
        qk_gain: tuple[cupy.ndarray, cupy.ndarray] | None = None,
    ) -> None:
        """The same, and rope(qkv_MC, ...) before it, in one launch: steps 2 to 6. No two rows of one slot."""
        cache = self._cache
        check(qkv_MC, "qkv", np.float32, (len(qkv_MC), (self._heads + 2 * cache.kv_heads) * cache.head_dim))
        constants = (*rope.gains(qk_gain), rope.cos_T2, rope.sin_T2, rope.paley)
        scalars = (rope.eps, rope.norm, *map(np.float32, kv_clip))
        defines = (("FUSED", 1), *rope.hadamard)
        self._launch(qkv_MC, position_M, slot_M, layer, window, out_MC, defines, constants, scalars)

    def _launch(
        self,
        x_MC: cupy.ndarray,
        position_M: cupy.ndarray,
        slot_M: cupy.ndarray,
        layer: int,
        window: int | None,
        out_MC: cupy.ndarray,
        defines: tuple[tuple[str, int], ...],
        constants: tuple[cupy.ndarray | None, ...],
        scalars: tuple[np.float32, ...],
    ) -> None:
        cache, count = self._cache, len(x_MC)
        assert count <= self._rows
        check(out_MC, "out", np.float32, (count, self._heads * cache.head_dim))
        for name, array in (("position", position_M), ("slot", slot_M)):
            check(array, name, np.int32, (count,))
        groups = _head_groups(cache, self._heads)
        cluster, teams = _blocks(cache, groups * count, self._clusters)
        warps, stages, tile_bytes = _ring(cache)
        defines += (("HEAD_DIM", cache.head_dim), ("BITS", cache.bits))
        defines += (("WARPS", warps), ("STAGES", stages), ("EARLY", _EARLY_BYTES // tile_bytes), ("CLUSTER", cluster))
        defines += () if self._hopper else ((NO_HOPPER, 1),)
        kernel("attention", "decode_attention", defines).launch(
            (cluster, groups, teams * count),
            32 * warps,
            (
                x_MC,
                *constants,
                cache.key_NGTB[layer],
                cache.value_NGTB[layer],
                cache.scale_NGT2[layer],
                position_M,
                slot_M,
                out_MC,
                self._partial,
                self._arrived,
                *_sizes(cache, self._heads // cache.kv_heads, window),
                np.int32(teams),
                _score_scale(cache),
                *scalars,
            ),
            shared=warps * stages * tile_bytes,
            cluster=cluster,
            overlap=True,
        )


def decode_workspace_bytes(cache: KVCache, heads: int, rows: int, *, hopper: bool = True) -> int:
    """What a Decode would hold, without allocating it."""
    parts, arrived = _workspace(cache, heads, rows, hopper and has_hopper())
    return _PART_BYTES * parts + 4 * arrived


def _workspace(cache: KVCache, heads: int, rows: int, clusters: bool) -> tuple[int, int]:
    """Parts of teams' sums, and words that count teams: enough for any number of rows up to `rows`."""
    groups = [count * _head_groups(cache, heads) for count in range(1, rows + 1)]
    blocks = [(g, *_blocks(cache, g, clusters)) for g in groups]
    quads = min(heads // cache.kv_heads, _COLUMNS) * _padded(cache) // 4
    parts = max(g * teams for g, _, teams in blocks) * quads
    return parts, max(g * cluster for g, cluster, _ in blocks)


def _sizes(cache: KVCache, first: int, window: int | None) -> tuple[np.int32, ...]:
    """first: query heads, all or of a KV head."""
    return tuple(map(np.int32, (first, cache.kv_heads, cache.capacity, min(window or _NO_WINDOW, _NO_WINDOW))))


def _score_scale(cache: KVCache) -> np.float32:
    return np.float32(math.log2(math.e) / math.sqrt(cache.head_dim))


def _padded(cache: KVCache) -> int:
    return vector_bytes(cache.head_dim, cache.bits) * 8 // cache.bits


def _head_groups(cache: KVCache, heads: int) -> int:
    assert cache.head_dim <= MAX_HEAD_DIM and heads % cache.kv_heads == 0
    return cache.kv_heads * ceil_div(heads // cache.kv_heads, _COLUMNS)


def _blocks(cache: KVCache, groups: int, clusters: bool) -> tuple[int, int]:
    """Blocks to a cluster, and clusters, that share the tokens of a row and group of heads: as many as run at once, and
    the context can use. More would only begin late, also where they find nothing to do."""
    at_once = _BLOCKS_PER_MULTIPROCESSOR * multiprocessors() // groups
    cluster = min(_MAX_CLUSTER, 1 << max(1, at_once).bit_length() - 1) if clusters else 1
    useful = ceil_div(cache.capacity, 256 * cluster)
    return cluster, min(_MAX_TEAMS, useful, max(1, at_once // cluster))


def _ring(cache: KVCache) -> tuple[int, int, int]:
    """Warps of a block while decoding, tiles that each has in shared memory, and bytes of one. Tiles: attention.cu."""
    vector = vector_bytes(cache.head_dim, cache.bits)
    tile = (2 * vector + 8) * (32 if vector <= 64 else 16)
    warps = 8 if tile < 5000 else 4 if tile < 10000 else 2
    limit = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]) - _OTHER_SHARED
    stages = 3 if warps > 2 and 3 * warps * tile <= limit else 2
    return warps, stages, tile
