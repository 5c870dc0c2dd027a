"""A whole model on the GPU, one sequence at a time: few tokens by matrix-vector kernels, many by matrix products.

A step of one token is a CUDA graph, captured once: token and position lie in GPU memory, so that replaying it is all
that a step takes.

Shape suffixes: M tokens of a pass, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat import spec
from rcpformat.architecture import Architecture
from rcpformat.reader import RcpFile
from rcprun.backends import MemoryUse
from rcprun.backends.cuda import attention, gemm, linear, norm
from rcprun.backends.cuda.bandwidth import read_bandwidth
from rcprun.backends.cuda.embed import embed
from rcprun.backends.cuda.head import head_half, head_int8
from rcprun.backends.cuda.kvcache import KVCache
from rcprun.backends.cuda.kvcache import bytes_needed as cache_bytes
from rcprun.backends.cuda.prefill_attention import prefill_attention
from rcprun.backends.cuda.rope import Rope
from rcprun.backends.cuda.sample import FAILED, SamplerState, sample
from rcprun.backends.cuda.weights import Layer, Weights
from rcprun.errors import OutOfMemory
from rcprun.sampling import SamplingOptions, not_finite

PREFILL_TOKENS = 2048
"""Tokens that go through all layers at a time, at most: each pass expands all weights."""
_STRIP_BYTES = 24 << 20
"""Of wide intermediate results, which are made and used up a strip of tokens at a time: so much stays in the GPU's
cache."""
_ROUND_STRIP = 64
_OF_A_STRIP = "qkv", "z", "z_rotated"
_LOGITS_BYTES = 64 << 20
_HEAD_CLIP = np.float32(1)
_LOGITS, _GREEDY, _DRAWN = "logits", "greedy", "drawn"
"""What a step ends with."""
_AHEAD = 4
"""Places for tokens on their way to the host."""
_RING = 4096
"""Generated tokens that the GPU remembers."""


class Buffers:
    """What passes of up to `tokens` tokens write between kernels. The padding of codes is zero and stays it."""

    def __init__(self, architecture: Architecture, tokens: int) -> None:
        a = architecture
        heads = a.num_heads * a.head_dim
        floats = {
            "x": a.hidden_size,
            "h": a.hidden_size,
            "unrotated": a.hidden_size,
            "qkv": heads + 2 * a.num_kv_heads * a.head_dim,
            "q": heads,
            "attended": heads,
            "z": a.intermediate_size,
            "z_rotated": a.intermediate_size,
        }
        self.strip = min(tokens, _strip_tokens(a))
        rows = {name: self.strip if name in _OF_A_STRIP else tokens for name in floats}
        self._floats = {name: cupy.empty((rows[name], width), np.float32) for name, width in floats.items()}
        widths = {a.hidden_size, heads, a.intermediate_size}
        self._codes = {width: cupy.zeros((tokens, linear.padded(width)), np.int8) for width in widths}
        self.head_codes = cupy.zeros((tokens, spec.ceil_div(a.hidden_size, 128) * 128), np.int8)
        self.scale = cupy.empty(tokens, np.float32)
        self.token = cupy.zeros(tokens, np.int32)
        self.position = cupy.zeros(tokens, np.int32)
        self.slot = cupy.zeros(tokens, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(a.nbytes) for a in (*self._floats.values(), *self._codes.values(), self.head_codes))

    def floats(self, name: str, count: int) -> Any:
        """The first rows of one of the float32 buffers."""
        return self._floats[name][:count]

    def codes(self, width: int, count: int) -> tuple[Any, Any]:
        """The first rows of the codes of inputs of this width, and their scales."""
        return self._codes[width][:count], self.scale[:count]


class CudaBackend:
    """A model in GPU memory; see rcprun.backends.Backend."""

    name = "cuda"
    max_batch = 1

    def __init__(self, file: RcpFile, context: int) -> None:
        self.context = context
        self._architecture, self._quantization = file.architecture, file.quantization
        _require_memory(file, context)
        self._eps = np.float32(file.architecture.rms_norm_eps)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            self._weights = Weights(file)
            self._build(file)
            self._stream.synchronize()
        self._length = 0
        self._graphs: dict[str, Any] = {}
        self._pinned = cupy.cuda.alloc_pinned_memory(4 * _AHEAD)
        self._tokens = np.frombuffer(self._pinned, np.int32, _AHEAD)

    def _build(self, file: RcpFile) -> None:
        a, q = self._architecture, self._quantization
        self._cache = KVCache(a, q.kv_bits, 1, self.context)
        self._rope = Rope(a, file.tensor(spec.INV_FREQ), self.context, r3=q.r3)
        self._attend_one = attention.Decode(self._cache, a.num_heads, 1)
        self._attend_few = attention.Decode(self._cache, a.num_heads, linear.MAX_TOKENS)
        self._few = Buffers(a, linear.MAX_TOKENS)
        self._many: tuple[Buffers, gemm.Gemm] | None = None
        self._logits_MV = cupy.empty((1, a.vocab_size), np.float32)
        self._sampler = SamplerState.create(1, a.vocab_size, ring=_RING)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; the logits (V,) after the last."""
        with self._stream:
            if len(tokens) == 1:
                self._sampler.token.set(np.array(tokens, np.int32))
                self._sampler.position.set(np.array([self._length], np.int32))
                self._step(_LOGITS)
                self._length += 1
            else:
                for x_MD, buffers in self._passes(tokens):
                    last_1D, rows = x_MD[-1:], buffers
                self._head(last_1D, self._logits_MV, rows)
            logits_V: NDArray[np.float32] = self._logits_MV[0].get()
        return logits_V

    def forward_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Append tokens; the logits after each, as blocks (M, V)."""
        rows = max(1, _LOGITS_BYTES // (4 * self._architecture.vocab_size))
        with self._stream:
            for x_MD, buffers in self._passes(tokens):
                for row in range(0, len(x_MD), rows):
                    block_MD = x_MD[row : row + rows]
                    logits_MV = cupy.empty((len(block_MD), self._architecture.vocab_size), np.float32)
                    self._head(block_MD, logits_MV, buffers)
                    yield logits_MV.get()

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self._length
        self._length = length

    def memory(self) -> MemoryUse:
        """Bytes held, without the buffers between kernels."""
        return MemoryUse(weights=self._weights.nbytes, kv_cache=self._cache.nbytes)

    def generate(
        self, options: SamplingOptions, seed: int, history: Sequence[int], count: int
    ) -> Generator[int, None, None]:
        """See rcprun.backends.SamplingBackend. The GPU is a step ahead of the token that comes out."""
        greedy, start = options.temperature == 0, self._length
        assert len(history) == start and start + count <= self.context + 1
        with self._stream:
            self._sampler.start(0, options, seed, history)
            sample(self._logits_MV, self._sampler, greedy=greedy)
            coming = [self._copy_token(0)]
        for produced in range(count):
            if produced + 1 < count:
                with self._stream:
                    self._step(_GREEDY if greedy else _DRAWN)
                    coming.append(self._copy_token(produced + 1))
            coming.pop(0).synchronize()
            token = int(self._tokens[produced % _AHEAD])
            if token == FAILED:
                raise not_finite()
            self._length = start + produced
            yield token

    def _copy_token(self, place: int) -> Any:
        """Ask for the sampler's token to be copied to the host; the event after which it is there."""
        to = self._pinned.ptr + 4 * (place % _AHEAD)
        token = self._sampler.token
        cupy.cuda.runtime.memcpyAsync(to, token.data.ptr, 4, cupy.cuda.runtime.memcpyDeviceToHost, self._stream.ptr)
        event = cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event

    def decode_greedy(self, count: int, batch: int = 1) -> list[int]:
        """Append the likeliest token, `count` times, without the host in between; the tokens. After forward only."""
        assert batch == 1 and self._length + count <= self.context and count <= _RING
        start = self._length
        with self._stream:
            self._sampler.start(0, SamplingOptions(temperature=0.0), 0, [])
            self._sampler.position.set(np.array([start - 1], np.int32))
            sample(self._logits_MV, self._sampler, greedy=True)
            for _ in range(count):
                self._step(_GREEDY)
            tokens: list[int] = self._sampler.history[0, :count].get().tolist()
        self._length = start + count
        return tokens

    def read_bandwidth(self) -> float:
        """Bytes a second that the GPU was measured to read."""
        with self._stream:
            return read_bandwidth()

    def describe(self) -> str:
        """The GPU and its highest clocks."""
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        name = properties["name"].decode()
        return f"{name}, {properties['clockRate'] / 1e6:.2f} GHz" if properties.get("clockRate") else name

    # ---- passes; on self._stream

    def _step(self, kind: str) -> None:
        """One token: from the sampler's token and position to logits, and to the next ones unless kind is _LOGITS."""
        graph = self._graphs.get(kind)
        if graph is not None:
            graph.launch(self._stream)
            return
        self._one_token(kind)  # this step itself; it loads the kernels, which a capture may not do
        self._stream.synchronize()
        self._stream.begin_capture()
        self._one_token(kind)
        self._graphs[kind] = self._stream.end_capture()

    def _one_token(self, kind: str) -> None:
        few, state = self._few, self._sampler
        x_MD = few.floats("x", 1)
        embed(state.token, self._weights.embed_VD, self._weights.embed_scale_V, x_MD)
        for index, layer in enumerate(self._weights.layers):
            self._layer_of_few(index, layer, x_MD, state.position, few.slot[:1])
        self._head(x_MD, self._logits_MV, few)
        if kind != _LOGITS:
            sample(self._logits_MV, state, greedy=kind == _GREEDY)

    def _passes(self, tokens: Sequence[int]) -> Iterator[tuple[Any, Buffers]]:
        """Residuals (M, D) after the last layer, block by block; each block is in the cache when it comes out."""
        assert 0 < len(tokens) <= self.context - self._length
        size = linear.MAX_TOKENS if len(tokens) <= linear.MAX_TOKENS else PREFILL_TOKENS
        for begin in range(0, len(tokens), size):
            yield self._pass(np.asarray(tokens[begin : begin + size], np.int32))

    def _pass(self, token_M: NDArray[np.int32]) -> tuple[Any, Buffers]:
        count, start = len(token_M), self._length
        few = count <= linear.MAX_TOKENS
        buffers = self._few if few else self._for_many()[0]
        buffers.token[:count].set(token_M)
        position_M, slot_M = buffers.position[:count], buffers.slot[:count]
        position_M.set(np.arange(start, start + count, dtype=np.int32))
        x_MD = buffers.floats("x", count)
        embed(buffers.token[:count], self._weights.embed_VD, self._weights.embed_scale_V, x_MD)
        for index, layer in enumerate(self._weights.layers):
            if few:
                self._layer_of_few(index, layer, x_MD, position_M, slot_M)
            else:
                self._layer_of_many(index, layer, x_MD, position_M, slot_M, start)
        self._length = start + count
        return x_MD, buffers

    def _layer_of_few(self, index: int, layer: Layer, x_MD: Any, position_M: Any, slot_M: Any) -> None:
        """A layer for up to MAX_TOKENS tokens; x_MD in place."""
        few, count, bits = self._few, len(x_MD), self._quantization.a_bits
        qkv, q, attended, z = (few.floats(name, count) for name in ("qkv", "q", "attended", "z"))
        clip = layer.act_clip
        self._linear_of_few(layer.qkv, x_MD, qkv, clip[0], linear.NORMALIZE, linear.STORE)
        self._rope(qkv, position_M, slot_M, self._cache, index, layer.kv_clip, q, layer.qk_gain)
        attend = self._attend_one if count == 1 else self._attend_few
        attend(q, position_M, slot_M, index, layer.window, attended)
        self._linear_of_few(layer.o, attended, x_MD, clip[1], linear.QUANTIZE, linear.ADD)
        self._linear_of_few(layer.gate_up, x_MD, z, clip[2], linear.NORMALIZE, linear.SWIGLU)
        codes, scale = self._rotate_mlp(z, layer, few)
        linear.linear(layer.down, codes, x_MD, prologue=linear.CODES, epilogue=linear.ADD, a_bits=bits, x_scale=scale)

    def _linear_of_few(
        self, weights: linear.UnitLinear, x: Any, out: Any, clip: np.float32, prologue: int, epilogue: int
    ) -> None:
        """A linear layer of floats. Of one token each block quantizes the input; of several a kernel does it before."""
        bits, eps = self._quantization.a_bits, self._eps
        if len(x) == 1:
            linear.linear(
                weights,
                x,
                out,
                prologue=prologue,
                epilogue=epilogue,
                a_bits=bits,
                clip=clip,
                eps=float(eps),
                overlap=prologue == linear.NORMALIZE,  # after the linear layer that wrote the residual
            )
            return
        codes, scale = self._few.codes(x.shape[1], len(x))
        if prologue == linear.NORMALIZE:
            norm.norm_quantize(x, codes, scale, eps=eps, clip=clip, bits=bits)
        else:
            norm.quantize(x, codes, scale, clip=clip, bits=bits)
        linear.linear(weights, codes, out, prologue=linear.CODES, epilogue=epilogue, a_bits=bits, x_scale=scale)

    def _layer_of_many(self, index: int, layer: Layer, x_MD: Any, position_M: Any, slot_M: Any, start: int) -> None:
        """A layer for many tokens at positions from start on; x_MD in place."""
        (many, product), count, bits = self._for_many(), len(x_MD), self._quantization.a_bits
        q, attended = many.floats("q", count), many.floats("attended", count)
        strips = [slice(first, min(first + many.strip, count)) for first in range(0, count, many.strip)]
        clip = layer.act_clip
        codes, scale = many.codes(x_MD.shape[1], count)
        heads = many.codes(q.shape[1], count)
        norm.norm_quantize(x_MD, codes, scale, eps=self._eps, clip=clip[0], bits=bits)
        product.multiply(layer.qkv, codes)
        for strip in strips:
            qkv, place = many.floats("qkv", strip.stop - strip.start), (position_M[strip], slot_M[strip])
            product.rescale(layer.qkv, strip.start, scale[strip], qkv, epilogue=linear.STORE)
            self._rope(qkv, *place, self._cache, index, layer.kv_clip, q[strip], layer.qk_gain)
        prefill_attention(q, self._cache, index, 0, start, layer.window, attended)
        norm.quantize(attended, *heads, clip=clip[1], bits=bits)
        product(layer.o, *heads, x_MD, epilogue=linear.ADD)
        norm.norm_quantize(x_MD, codes, scale, eps=self._eps, clip=clip[2], bits=bits)
        product.multiply(layer.gate_up, codes)
        for strip in strips:
            z = many.floats("z", strip.stop - strip.start)
            product.rescale(layer.gate_up, strip.start, scale[strip], z, epilogue=linear.SWIGLU)
            self._rotate_mlp(z, layer, many, strip.start)
        product(layer.down, *many.codes(self._architecture.intermediate_size, count), x_MD, epilogue=linear.ADD)

    def _rotate_mlp(self, z: Any, layer: Layer, buffers: Buffers, first: int = 0) -> tuple[Any, Any]:
        """Codes and scales of down_proj's input, of tokens from the first on."""
        count, r4 = len(z), self._weights.r4
        codes, scale = (array[first:] for array in buffers.codes(z.shape[1], first + count))
        workspace = buffers.floats("z_rotated", count) if r4.needs_workspace(count) else None
        r4.quantize(z, codes, scale, clip=layer.act_clip[3], bits=self._quantization.a_bits, workspace_MN=workspace)
        return codes, scale

    def _head(self, x_MD: Any, logits_MV: Any, buffers: Buffers) -> None:
        """Logits of residuals after the last layer, which may be a part of the pass's."""
        w, count = self._weights, len(x_MD)
        h, codes, scale = buffers.floats("h", count), buffers.head_codes[:count], buffers.scale[:count]
        quantized = self._quantization.head_bits == 8
        if w.gain_D is None and quantized:
            norm.norm_quantize(x_MD, codes, scale, eps=self._eps, clip=_HEAD_CLIP, bits=8)
        else:
            norm.normalize(x_MD, h, eps=self._eps)
        if w.gain_D is not None:
            plain = buffers.floats("unrotated", count)
            w.unrotate.apply(h, plain)
            if quantized:
                workspace = h if w.rotate.needs_workspace(count) else None
                w.rotate.quantize(
                    plain, codes, scale, clip=_HEAD_CLIP, bits=8, factor_N=w.gain_D, workspace_MN=workspace
                )
            else:
                w.rotate.apply(plain, h, factor_N=w.gain_D)
        if quantized:
            head_int8(codes, scale, w.head_VD, w.head_scale_V, logits_MV)
        else:
            head_half(h, w.head_VD, logits_MV)

    def _for_many(self) -> tuple[Buffers, gemm.Gemm]:
        """What passes of many tokens need; allocated by the first of them."""
        if self._many is None:
            linears = [each for layer in self._weights.layers for each in layer.linears]
            tokens = min(PREFILL_TOKENS, self.context)
            self._many = Buffers(self._architecture, tokens), gemm.Gemm(linears, tokens)
        return self._many


def _require_memory(file: RcpFile, context: int) -> None:
    """Raises OutOfMemory where weights, KV cache and buffers do not fit into the GPU's free memory."""
    a, q = file.architecture, file.quantization
    weights = sum(entry.nbytes for entry in file.header_tensors.values())
    cache = cache_bytes(a, q.kv_bits, 1, context)
    working = _working_bytes(a, min(PREFILL_TOKENS, context))
    free = int(cupy.cuda.runtime.memGetInfo()[0])
    needed = weights + cache + working
    if needed > free:
        fits = max(0, int(context * (free - weights - working) / max(1, cache)))
        remedy = f"use -c {fits}" if fits >= 512 else "free some of it, or use --backend numpy"
        raise OutOfMemory(
            f"GPU memory: needs {needed / 2**30:.1f} GiB ({weights / 2**30:.1f} of weights, {cache / 2**30:.1f} of KV "
            f"cache for {context} tokens), {free / 2**30:.1f} GiB are free: {remedy}"
        )


def _working_bytes(a: Architecture, tokens: int) -> int:
    """Of the buffers between kernels: those of a prefill of so many tokens at a time."""
    heads, qkv = a.num_heads * a.head_dim, (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    floats = tokens * (3 * a.hidden_size + 2 * heads) + min(tokens, _strip_tokens(a)) * (qkv + 2 * a.intermediate_size)
    codes = tokens * (2 * a.hidden_size + heads + a.intermediate_size)
    shapes = [(qkv, a.hidden_size), (a.hidden_size, heads), (2 * a.intermediate_size, a.hidden_size)]
    products = gemm.bytes_needed([*shapes, (a.hidden_size, a.intermediate_size)], tokens)
    return 4 * floats + codes + products + (64 << 20)


def _strip_tokens(a: Architecture) -> int:
    widest = max((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, a.intermediate_size)
    return max(1, _STRIP_BYTES // (4 * widest * _ROUND_STRIP)) * _ROUND_STRIP
