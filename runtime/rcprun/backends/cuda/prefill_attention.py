"""Attention of many tokens of one sequence over the quantized KV cache on the GPU. Launches prefill_attention.cu.

Shape suffixes: M query tokens, C channels (H heads of D).
"""

from __future__ import annotations

import math
from functools import cache as cached

import cupy
import numpy as np

from rcpformat.spec import ceil_div
from rcprun.backends.cuda.kvcache import KVCache, vector_bytes
from rcprun.backends.cuda.launch import check, kernel

MAX_HEAD_DIM = 512
_NO_WINDOW = 2**31 - 1
_PART_CHANNELS = 256
"""Of a block's output, at most."""
_REGISTER_CHANNELS = 96
"""Queries of up to so many channels stay in registers, longer ones in shared memory."""
_FIRST_BLOCK_CHANNELS = 128
_WARP_QUERIES = 16
_BLOCKS = (4, 64), (4, 32), (2, 32), (2, 16), (1, 16)
"""Warps and tokens of a tile, the best first; the first for vectors of up to _FIRST_BLOCK_CHANNELS only."""


def prefill_attention(
    q_MC: cupy.ndarray, cache: KVCache, layer: int, slot: int, start: int, window: int | None, out_MC: cupy.ndarray
) -> None:
    """SPEC.md, "Attention", step 6: out_MC float32 of q_MC float32, the queries of M tokens of one slot at positions
    start, start + 1, …, all in the cache already; causal."""
    count, channels = q_MC.shape
    heads = channels // cache.head_dim
    for name, array in (("q", q_MC), ("out", out_MC)):
        check(array, name, np.float32, (count, heads * cache.head_dim))
    warps, tokens, parts, shared = _block(cache.head_dim, cache.bits)
    defines = (
        *(("HEAD_DIM", cache.head_dim), ("BITS", cache.bits)),
        *(("BLOCK_WARPS", warps), ("TILE_TOKENS", tokens), ("PARTS", parts)),
    )
    visible = min(window or _NO_WINDOW, _NO_WINDOW)
    kernel("prefill_attention", "prefill_attention", defines).launch(
        (cache.kv_heads, ceil_div(count * (heads // cache.kv_heads), _WARP_QUERIES * warps), parts),
        32 * warps,
        (
            q_MC,
            cache.key_NGTB[layer],
            cache.value_NGTB[layer],
            cache.scale_NGT2[layer],
            out_MC,
            *map(np.int32, (count, start, slot, heads, cache.kv_heads, cache.capacity, visible)),
            np.float32(math.log2(math.e) / math.sqrt(cache.head_dim)),
        ),
        shared=shared,
        overlap=True,
    )


@cached
def _block(head_dim: int, bits: int) -> tuple[int, int, int, int]:
    """Warps, tokens of a tile, parts of the output and bytes of shared memory, such that they are there."""
    assert head_dim <= MAX_HEAD_DIM
    most = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])
    padded = vector_bytes(head_dim, bits) * 8 // bits
    for warps, tokens in _BLOCKS[padded > _FIRST_BLOCK_CHANNELS :]:
        parts = ceil_div(padded, _PART_CHANNELS)
        shared = shared_bytes(padded, bits, warps, tokens, parts)
        if shared <= most:
            break
    assert shared <= most, f"head_dim {head_dim}: {shared} bytes of shared memory, {most} are there"
    return warps, tokens, parts, shared


def shared_bytes(padded: int, bits: int, warps: int, tokens: int, parts: int) -> int:
    """The size of Memory in prefill_attention.cu, for vectors of so many channels."""
    group = 8 * 16 // bits  # channels
    groups = padded // group
    out_groups = ceil_div(groups, parts)
    tile = tokens * (2 * group * (groups + out_groups) + 24)
    turns = ceil_div(tokens * groups, 32 * warps) + 2 * ceil_div(tokens // 2 * out_groups, 32 * warps)
    queries = 4 * padded * _WARP_QUERIES * warps if padded > _REGISTER_CHANNELS else 0
    return 2 * tile + 16 * 32 * warps * turns + queries
