"""The quantized KV cache on the GPU: packed codes and their scales, for several sequences. Knows nothing of attention.

A vector is ceil(D / 8S) * 8S codes, S = 16 / bits of them to 16 bits, lowest bits first. Keys lie one after another.
Values lie in pairs of tokens, 16 bits of the even token and 16 of the odd one in turn, as tensor cores take them.

Shape suffixes: N slots, G KV heads, T capacity in tokens, D head_dim, B bytes of a vector.
"""

from __future__ import annotations

import cupy
import numpy as np

from rcpformat.architecture import Architecture
from rcpformat.spec import ceil_div

_TILE_TOKENS = 32
"""Attention reads whole tiles, also of tokens that are not there yet."""
_SCALE_BYTES = 4


class KVCache:
    """Keys and values of all layers for `slots` sequences of up to `context` tokens: rope writes, attention reads.

    key_NGTB, value_NGTB: one uint8 array per layer. scale_NGT2: one uint32 array per layer, low and step as float16 in
    the lower and the upper half, of the key and the value.
    """

    def __init__(self, architecture: Architecture, bits: int, slots: int, context: int) -> None:
        self.bits = bits
        self.slots = slots
        self.context = context
        self.capacity = _capacity(context)
        self.kv_heads = architecture.num_kv_heads
        self.head_dim = architecture.head_dim
        layers, vectors = architecture.num_layers, (slots, self.kv_heads, self.capacity)
        codes = cupy.empty((2, layers, *vectors, vector_bytes(self.head_dim, bits)), dtype=np.uint8)
        scales = cupy.empty((layers, *vectors, 2), dtype=np.uint32)
        self.key_NGTB, self.value_NGTB = list(codes[0]), list(codes[1])
        self.scale_NGT2 = list(scales)
        self._bytes = codes.nbytes + scales.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._bytes)


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one key or value, its padding included."""
    return ceil_div(head_dim * bits // 8, 16) * 16


def bytes_needed(architecture: Architecture, bits: int, slots: int, context: int) -> int:
    """What a KVCache would hold, without allocating it."""
    vectors = 2 * architecture.num_layers * slots * architecture.num_kv_heads * _capacity(context)
    return vectors * (vector_bytes(architecture.head_dim, bits) + _SCALE_BYTES)


def _capacity(context: int) -> int:
    return ceil_div(context, _TILE_TOKENS) * _TILE_TOKENS
