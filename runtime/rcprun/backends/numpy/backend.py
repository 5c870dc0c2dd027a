"""A whole model in NumPy. Tokens go through all layers in blocks, so that memory is bounded for any length of prompt.

Shape suffixes: M tokens of a block, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rcpformat import arithmetic
from rcpformat.arithmetic import Float32Array
from rcpformat.reader import RcpFile
from rcpformat.spec import EMBED, INV_FREQ
from rcprun.backends import MemoryUse
from rcprun.backends.numpy.kvcache import KVCache
from rcprun.backends.numpy.layers import DecoderLayer, Head

BLOCK_TOKENS = 256
"""Tokens that go through all layers at a time."""
_LOGITS_BYTES = 64 << 20
"""Largest block of logits, where a single row is not larger."""
_OVERFLOWS_QUIETLY = np.errstate(all="ignore")
"""Whoever uses the logits refuses those that are not finite, with a message of its own."""


class NumpyBackend:
    """A model in host memory, linear layers and int8 tables as int8; see rcprun.backends.Backend."""

    name = "numpy"

    def __init__(self, file: RcpFile, context: int) -> None:
        self.context = context
        self._architecture = a = file.architecture
        self._layers = [DecoderLayer(file, index) for index in range(a.num_layers)]
        self._head = Head(file)
        self._embedding: NDArray[np.int8] | NDArray[np.float16] = file.tensor(f"{EMBED}.weight")
        self._embedding_scale = file.tensor(f"{EMBED}.scale") if file.quantization.embed_bits == 8 else None
        self._inv_freq = file.tensor(INV_FREQ).copy()
        self._cache = KVCache(a, file.quantization.kv_bits, context)
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def forward(self, tokens: Sequence[int]) -> Float32Array:
        """Append tokens; the logits (V,) after the last."""
        for x_MD in self._blocks(tokens):
            last_1D = x_MD[-1:]
        last_V: Float32Array = self._logits(last_1D)[0]
        return last_V

    def forward_all(self, tokens: Sequence[int]) -> Iterator[Float32Array]:
        """Append tokens; the logits after each, as blocks (M, V)."""
        rows = max(1, _LOGITS_BYTES // (4 * self._architecture.vocab_size))
        for x_MD in self._blocks(tokens):
            for row in range(0, len(x_MD), rows):
                yield self._logits(x_MD[row : row + rows])

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self._length
        self._length = length

    def memory(self) -> MemoryUse:
        """Bytes held. The embedding is not among them: its rows are read from the mapped file."""
        weights = self._head.nbytes + sum(layer.nbytes for layer in self._layers)
        return MemoryUse(weights=weights, kv_cache=self._cache.nbytes)

    def _blocks(self, tokens: Sequence[int]) -> Iterator[Float32Array]:
        """Residuals (M, D) after the last layer, block by block; each block is in the cache when it comes out."""
        assert 0 < len(tokens) <= self.context - self._length
        self._cache.reserve(self._length + len(tokens))
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            token_M = np.asarray(tokens[begin : begin + BLOCK_TOKENS], dtype=np.int64)
            yield self._block(token_M)

    @_OVERFLOWS_QUIETLY
    def _block(self, token_M: NDArray[np.int64]) -> Float32Array:
        x_MD = self._embed(token_M)
        start = self._length
        positions = np.arange(start, start + len(token_M))
        rope = arithmetic.rope_tables(positions, self._inv_freq, self._architecture.rope_attention_factor)
        for layer in self._layers:
            x_MD = layer(x_MD, rope, self._cache, start)
        self._length = start + len(token_M)
        return x_MD

    def _embed(self, token_M: NDArray[np.int64]) -> Float32Array:
        x_MD = self._embedding[token_M].astype(np.float32)
        return x_MD if self._embedding_scale is None else x_MD * self._embedding_scale[token_M][:, None]

    @_OVERFLOWS_QUIETLY
    def _logits(self, x_MD: Float32Array) -> Float32Array:
        return self._head(arithmetic.rms_normalize(x_MD, self._architecture.rms_norm_eps))
