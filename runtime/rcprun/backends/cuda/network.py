"""A model's layers on the GPU: which kernels turn tokens into logits, in which order.

Few tokens go through matrix-vector kernels, many through matrix products. Knows slots of the KV cache, no sequences;
launches on CuPy's current stream.

Shape suffixes: M tokens of a pass, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat import spec
from rcpformat.reader import RcpFile
from rcprun.backends.cuda import attention, gemm, linear, norm
from rcprun.backends.cuda.buffers import Buffers
from rcprun.backends.cuda.embed import embed
from rcprun.backends.cuda.head import head_half, head_int8
from rcprun.backends.cuda.kvcache import KVCache
from rcprun.backends.cuda.prefill_attention import prefill_attention
from rcprun.backends.cuda.rope import Rope
from rcprun.backends.cuda.weights import Layer, Weights

PREFILL_TOKENS = 2048
"""Tokens that go through all layers at a time, at most: each pass expands all weights."""
_HEAD_CLIP = np.float32(1)
_SHARED = {"qkv": 122 << 10, "o": linear.HALF_SHARED, "gate_up": 130 << 10, "down": 96 << 10}
"""Bytes of shared memory of a linear layer's blocks, for one token. Neighbours share a multiprocessor: o has few
weights, so that gate_up, which has most, can take more than half, and down less."""


class Operation(NamedTuple):
    """A part of a step: what launches its kernels, and the bytes of weights that they read."""

    name: str
    launch: Callable[[], object]
    weight_bytes: int = 0


def run(operations: Iterable[Operation]) -> None:
    """Launch all of them."""
    for operation in operations:
        operation.launch()


class Network:
    """The weights, the KV cache of `slots` sequences, and what passes write in between."""

    def __init__(self, file: RcpFile, context: int, slots: int) -> None:
        a = self._architecture = file.architecture
        q = self._quantization = file.quantization
        self._context = context
        self._eps = np.float32(a.rms_norm_eps)
        self.weights = Weights(file)
        self.cache = KVCache(a, q.kv_bits, slots, context)
        self._rope = Rope(a, file.tensor(spec.INV_FREQ), context, r3=q.r3)
        self._attend = attention.Decode(self.cache, a.num_heads, linear.MAX_TOKENS)
        self._few = Buffers(a, linear.MAX_TOKENS)
        self._many: tuple[Buffers, gemm.Gemm] | None = None
        self._slot_M = cupy.asarray(np.arange(slots, dtype=np.int32))

    def step(self, token_M: Any, position_M: Any, logits_MV: Any) -> Iterator[Operation]:
        """One token of each of the first slots, from where tokens and positions lie on the GPU to their logits."""
        w, count = self.weights, len(token_M)
        x_MD = self._few.floats("x", count)
        row_bytes = count * self._architecture.hidden_size * w.embed_VD.itemsize
        yield Operation("embed", partial(embed, token_M, w.embed_VD, w.embed_scale_V, x_MD), row_bytes)
        for index, layer in enumerate(w.layers):
            yield from self._layer_of_few(index, layer, x_MD, position_M, self._slot_M[:count], apart=True)
        yield from self.head(x_MD, logits_MV, self._few)

    def passes(self, tokens: Sequence[int], slot: int, start: int) -> Iterator[tuple[Any, Buffers]]:
        """Tokens at positions from start on: residuals (M, D) after the last layer, and the buffers that hold them.

        Block by block; each block is in the cache when it comes out.
        """
        size = linear.MAX_TOKENS if len(tokens) <= linear.MAX_TOKENS else PREFILL_TOKENS
        for begin in range(0, len(tokens), size):
            yield self._pass(np.asarray(tokens[begin : begin + size], np.int32), slot, start + begin)

    def _pass(self, token_M: NDArray[np.int32], slot: int, start: int) -> tuple[Any, Buffers]:
        count = len(token_M)
        few = count <= linear.MAX_TOKENS
        buffers = self._few if few else self._for_many()[0]
        buffers.token[:count].set(token_M)
        position_M, slot_M = buffers.position[:count], buffers.slot[:count]
        position_M.set(np.arange(start, start + count, dtype=np.int32))
        slot_M.set(np.full(count, slot, np.int32))
        x_MD = buffers.floats("x", count)
        embed(buffers.token[:count], self.weights.embed_VD, self.weights.embed_scale_V, x_MD)
        for index, layer in enumerate(self.weights.layers):
            if few:
                run(self._layer_of_few(index, layer, x_MD, position_M, slot_M, apart=False))
            else:
                self._layer_of_many(index, layer, x_MD, position_M, slot_M, slot, start)
        return x_MD, buffers

    def _layer_of_few(
        self, index: int, layer: Layer, x_MD: Any, position_M: Any, slot_M: Any, *, apart: bool
    ) -> Iterator[Operation]:
        """A layer for up to MAX_TOKENS tokens; x_MD in place. apart: of different sequences, else of one."""
        few, count = self._few, len(x_MD)
        qkv, q, attended, z = (few.floats(name, count) for name in ("qkv", "q", "attended", "z"))

        def product(
            name: str, weights: linear.UnitLinear, x: Any, out: Any, clip: np.float32, prologue: int, epilogue: int
        ) -> Operation:
            launch = partial(self._linear_of_few, weights, x, out, clip, prologue, epilogue, _SHARED[name])
            return Operation(name, launch, weights.nbytes)

        clip, gain = layer.act_clip, layer.qk_gain
        yield product("qkv", layer.qkv, x_MD, qkv, clip[0], linear.NORMALIZE, linear.STORE)
        places = position_M, slot_M, index, layer.window, attended
        if apart:
            fused = partial(self._attend.fused, qkv, *places, self._rope, layer.kv_clip, gain)
            yield Operation("rope + attention", fused)
        else:
            rope = partial(self._rope, qkv, position_M, slot_M, self.cache, index, layer.kv_clip, q, gain)
            yield Operation("rope", rope)
            yield Operation("attention", partial(self._attend, q, *places))
        yield product("o", layer.o, attended, x_MD, clip[1], linear.QUANTIZE, linear.ADD)
        yield product("gate_up", layer.gate_up, x_MD, z, clip[2], linear.NORMALIZE, linear.SWIGLU)
        yield Operation("R4", partial(self._rotate_mlp, z, layer, few))
        codes, scale = few.codes(z.shape[1], count)
        down = partial(
            linear.linear,
            layer.down,
            codes,
            x_MD,
            prologue=linear.CODES,
            epilogue=linear.ADD,
            a_bits=self._quantization.a_bits,
            x_scale=scale,
            shared_limit=_SHARED["down"],
            overlap=True,
        )
        yield Operation("down", down, layer.down.nbytes)

    def _linear_of_few(
        self,
        weights: linear.UnitLinear,
        x: Any,
        out: Any,
        clip: np.float32,
        prologue: int,
        epilogue: int,
        shared_limit: int,
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
                shared_limit=shared_limit,
                overlap=True,
            )
            return
        codes, scale = self._few.codes(x.shape[1], len(x))
        if prologue == linear.NORMALIZE:
            norm.norm_quantize(x, codes, scale, eps=eps, clip=clip, bits=bits)
        else:
            norm.quantize(x, codes, scale, clip=clip, bits=bits)
        linear.linear(
            weights,
            codes,
            out,
            prologue=linear.CODES,
            epilogue=epilogue,
            a_bits=bits,
            x_scale=scale,
            overlap=True,
        )

    def _layer_of_many(
        self, index: int, layer: Layer, x_MD: Any, position_M: Any, slot_M: Any, slot: int, start: int
    ) -> None:
        """A layer for many tokens of a slot, at positions from start on; x_MD in place.

        Each layer but the last leaves the normalized codes that the next one begins with.
        """
        (many, product), count, bits = self._for_many(), len(x_MD), self._quantization.a_bits
        q, attended = many.floats("q", count), many.floats("attended", count)
        clip, r4 = layer.act_clip, self.weights.r4
        codes, scale = many.codes(x_MD.shape[1], count)
        heads, mlp = many.codes(q.shape[1], count), many.codes(self._architecture.intermediate_size, count)
        following = self.weights.layers[index + 1 : index + 2]
        if index == 0:
            norm.norm_quantize(x_MD, codes, scale, eps=self._eps, clip=clip[0], bits=bits)
        sums = product.multiply(layer.qkv, codes)
        self._rope.from_sums(
            *(sums, scale, layer.qkv.scale_R, layer.qkv.bias_R, position_M, slot_M, self.cache, index),
            *(layer.kv_clip, q, layer.qk_gain),
        )
        prefill_attention(q, self.cache, index, slot, start, layer.window, attended)
        norm.quantize(attended, *heads, clip=clip[1], bits=bits)
        self._add_and_normalize(product.multiply(layer.o, heads[0]), layer.o, x_MD, codes, scale, clip[2])
        sums = product.multiply(layer.gate_up, codes)
        if r4.takes_sums:
            r4.quantize_swiglu(sums, layer.gate_up.scale_R, layer.gate_up.bias_R, *mlp, clip=clip[3], bits=bits)
        else:
            for first in range(0, count, many.strip):
                z = many.floats("z", min(many.strip, count - first))
                here = slice(first, first + len(z))
                product.rescale(layer.gate_up, first, scale[here], z, epilogue=linear.SWIGLU)
                self._rotate_mlp(z, layer, many, first)
        sums = product.multiply(layer.down, mlp[0])
        if following:
            self._add_and_normalize(sums, layer.down, x_MD, codes, scale, following[0].act_clip[0])
        else:
            product.rescale(layer.down, 0, scale, x_MD, epilogue=linear.ADD)

    def _add_and_normalize(
        self, sum_MR: Any, weights: linear.UnitLinear, x_MD: Any, codes: Any, scale: Any, clip: np.float32
    ) -> None:
        """A linear layer's output to x_MD, in place, and what the next one takes of it."""
        norm.add_norm_quantize(
            *(sum_MR, weights.scale_R, weights.bias_R, x_MD, codes, scale),
            eps=self._eps,
            clip=clip,
            bits=self._quantization.a_bits,
        )

    def _rotate_mlp(self, z: Any, layer: Layer, buffers: Buffers, first: int = 0) -> tuple[Any, Any]:
        """Codes and scales of down_proj's input, of tokens from the first on."""
        count, r4 = len(z), self.weights.r4
        codes, scale = (array[first:] for array in buffers.codes(z.shape[1], first + count))
        workspace = buffers.floats("z_rotated", count) if r4.needs_workspace(count) else None
        r4.quantize(z, codes, scale, clip=layer.act_clip[3], bits=self._quantization.a_bits, workspace_MN=workspace)
        return codes, scale

    def head(self, x_MD: Any, logits_MV: Any, buffers: Buffers) -> Iterator[Operation]:
        """Logits of residuals after the last layer, which may be a part of the pass's."""
        w, count = self.weights, len(x_MD)
        turn = 0 if w.turn_DD is None else int(w.turn_DD.nbytes)
        yield Operation("head norm", partial(self._normalize_for_head, x_MD, buffers), turn)
        if w.head_scale_V is None:
            launch = partial(head_half, buffers.floats("h", count), w.head_VD, logits_MV)
            yield Operation("head", launch, int(w.head_VD.nbytes))
        else:
            codes, scale = buffers.head_codes[:count], buffers.scale[:count]
            launch = partial(head_int8, codes, scale, w.head_VD, w.head_scale_V, logits_MV)
            yield Operation("head", launch, int(w.head_VD.nbytes + w.head_scale_V.nbytes))

    def _normalize_for_head(self, x_MD: Any, buffers: Buffers) -> None:
        """From residuals to what the head takes: head_codes and scale, or "h"."""
        w, count = self.weights, len(x_MD)
        h, codes, scale = buffers.floats("h", count), buffers.head_codes[:count], buffers.scale[:count]
        quantized = self._quantization.head_bits == 8
        plain = buffers.floats("unrotated", count)
        if w.turn_DD is not None:
            norm.normalize(x_MD, plain, eps=self._eps)
            head_half(plain, w.turn_DD, h)
            if quantized:
                norm.quantize(h, codes, scale, clip=_HEAD_CLIP, bits=8)
        elif w.gain_D is None and quantized:
            norm.norm_quantize(x_MD, codes, scale, eps=self._eps, clip=_HEAD_CLIP, bits=8)
        else:
            norm.normalize(x_MD, h, eps=self._eps)
        if w.gain_D is not None:
            w.unrotate.apply(h, plain)
            if quantized:
                workspace = h if w.rotate.needs_workspace(count) else None
                w.rotate.quantize(
                    plain, codes, scale, clip=_HEAD_CLIP, bits=8, factor_N=w.gain_D, workspace_MN=workspace
                )
            else:
                w.rotate.apply(plain, h, factor_N=w.gain_D)

    def _for_many(self) -> tuple[Buffers, gemm.Gemm]:
        """What passes of many tokens need; allocated by the first of them."""
        if self._many is None:
            linears = [each for layer in self.weights.layers for each in layer.linears]
            tokens = min(PREFILL_TOKENS, self._context)
            self._many = Buffers(self._architecture, tokens), gemm.Gemm(linears, tokens)
        return self._many
