"""The quantized KV cache: packed codes, float16 low and step, for one sequence. Knows nothing of attention.

A 4-bit byte holds elements i and i + D/2 of a vector (low and high nibble), so that unpacking writes contiguous halves.

Shape suffixes: G KV heads, T cached tokens, M new tokens, D head_dim.
"""

from __future__ import annotations

import numpy as np

from rcpformat.architecture import Architecture
from rcpformat.arithmetic import Float32Array, UInt8Array, quantize_kv

KEY, VALUE = 0, 1
_FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of all layers for up to `context` tokens; grows by doubling, so short texts use little."""

    def __init__(self, architecture: Architecture, bits: int, context: int) -> None:
        self.bits = bits
        self.context = context
        self.capacity = 0
        self.kv_heads = architecture.num_kv_heads
        self._bytes = architecture.head_dim * bits // 8
        self._sites = (architecture.num_layers, 2, architecture.num_kv_heads)
        self._codes = np.empty((*self._sites, 0, self._bytes), dtype=np.uint8)
        self._low = np.empty((*self._sites, 0), dtype=np.float16)
        self._step = np.empty((*self._sites, 0), dtype=np.float16)
        self.reserve(min(context, _FIRST_CAPACITY))

    @property
    def nbytes(self) -> int:
        """Bytes held, at the present capacity."""
        return self._codes.nbytes + self._low.nbytes + self._step.nbytes

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens, at most `context`."""
        if length <= self.capacity:
            return
        old = self.capacity
        capacity = min(self.context, max(length, 2 * old))
        codes = np.empty((*self._sites, capacity, self._bytes), dtype=np.uint8)
        low, step = (np.empty((*self._sites, capacity), dtype=np.float16) for _ in range(2))
        codes[..., :old, :], low[..., :old], step[..., :old] = self._codes, self._low, self._step
        # All at once and last: memory may run out or Ctrl-C come before.
        self._codes, self._low, self._step, self.capacity = codes, low, step, capacity

    def write(self, layer: int, site: int, start: int, x_MGD: Float32Array, clip: np.float32) -> None:
        """Quantize the keys or values (site) of M tokens and store them at positions start, start + 1, …"""
        vectors = quantize_kv(x_MGD, clip, self.bits)
        place = (layer, site, slice(None), slice(start, start + len(x_MGD)))
        packed = vectors.codes
        if self.bits == 4:
            half = packed.shape[-1] // 2
            packed = packed[..., :half] | (packed[..., half:] << np.uint8(4))
        self._codes[place] = packed.swapaxes(0, 1)
        self._low[place] = vectors.low[..., 0].T
        self._step[place] = vectors.step[..., 0].T

    def read(self, layer: int, site: int, heads: slice, tokens: slice) -> Float32Array:
        """The keys or values (site) of some KV heads and positions, read back: (G, T, D)."""
        place = (layer, site, heads, tokens)
        packed: UInt8Array = self._codes[place]
        if self.bits == 4:
            half = packed.shape[-1]
            vectors = np.empty((*packed.shape[:-1], 2 * half), dtype=np.float32)
            vectors[..., :half] = packed & 15
            vectors[..., half:] = packed >> 4
        else:
            vectors = packed.astype(np.float32)
        vectors *= self._step[place].astype(np.float32)[..., None]
        vectors += self._low[place].astype(np.float32)[..., None]
        return vectors
