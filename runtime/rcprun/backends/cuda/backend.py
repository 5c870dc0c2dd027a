"""A whole model on the GPU, for up to 8 sequences: few tokens by matrix-vector kernels, many by matrix products.

Each sequence, or stream, has a slot of the KV cache and a row of everything that decoding reads and writes. A step is
one token of each of the first rows, and a CUDA graph, captured once for each number of rows: tokens and positions lie
in GPU memory, so that replaying it is all that a step takes. Rows whose stream has nothing to do go along, unread.

Sampled tokens of a stream do not depend on the other streams: kernels compute rows independently, and a backend of n
streams always steps n rows. They may depend on n, as sums of floats have another order for one row than for several.

Shape suffixes: M tokens of a pass, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat import spec
from rcpformat.architecture import Architecture
from rcpformat.reader import RcpFile
from rcprun.backends import MemoryUse
from rcprun.backends.cuda import attention, device, gemm, linear, norm
from rcprun.backends.cuda.bandwidth import read_bandwidth
from rcprun.backends.cuda.embed import embed
from rcprun.backends.cuda.head import head_half, head_int8
from rcprun.backends.cuda.kvcache import KVCache
from rcprun.backends.cuda.kvcache import bytes_needed as cache_bytes
from rcprun.backends.cuda.memory import MemoryPlan
from rcprun.backends.cuda.prefill_attention import prefill_attention
from rcprun.backends.cuda.rope import Rope
from rcprun.backends.cuda.sample import FAILED, SamplerState, draws_from_few, sample
from rcprun.backends.cuda.weights import Layer, Weights
from rcprun.errors import BadRequest
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
LOGITS, GREEDY, FEW, DRAWN = KINDS = ("logits", "greedy", "few", "drawn")
"""What a step ends with: logits, the likeliest token of each row, draws from a few tokens, or from all. Each can do
what those before it can."""
_RING = 4096
"""Generated tokens that the GPU remembers."""
_OVERLAPPING = frozenset({"qkv", "gate_up"})
"""Linear layers of one token that start while the kernel before them runs, which is a linear layer too. After others it
costs more than it brings: what they still read waits behind weights."""
_IDLE_STEPS = 256
"""Steps that the row of an idle stream goes on for before it starts over, so that its attention stays cheap."""
_IDLE = SamplingOptions(temperature=0.0)
_HISTOGRAM_BYTES = 1 << 17
"""Of a row's sampling, beside what grows with the vocabulary."""
_CUDA_BYTES = 96 << 20
"""For modules, graphs, cuBLAS's workspace and the memory pool's rounding."""


class Operation(NamedTuple):
    """A part of a step: what launches its kernels, and the bytes of weights that they read."""

    name: str
    launch: Callable[[], object]
    weight_bytes: int = 0


class Buffers:
    """What passes of up to `tokens` tokens write between kernels. The padding of codes is zero and stays it."""

    def __init__(self, architecture: Architecture, tokens: int) -> None:
        a = architecture
        rows = _float_rows(a, tokens)
        self.strip = rows["z"]
        """Tokens of a strip."""
        widths = _float_widths(a)
        self._floats = {name: cupy.empty((rows[name], width), np.float32) for name, width in widths.items()}
        self._codes = {width: cupy.zeros((tokens, linear.padded(width)), np.int8) for width in _code_widths(a)}
        self.head_codes = cupy.zeros((tokens, spec.ceil_div(a.hidden_size, 128) * 128), np.int8)
        self.scale = cupy.empty(tokens, np.float32)
        self.token = cupy.zeros(tokens, np.int32)
        self.position = cupy.zeros(tokens, np.int32)
        self.slot = cupy.zeros(tokens, np.int32)

    @staticmethod
    def bytes_needed(architecture: Architecture, tokens: int) -> int:
        """What Buffers would hold, without allocating it."""
        a = architecture
        codes = sum(map(linear.padded, _code_widths(a))) + spec.ceil_div(a.hidden_size, 128) * 128
        rows = _float_rows(a, tokens)
        floats = sum(rows[name] * width for name, width in _float_widths(a).items())
        return 4 * floats + tokens * (codes + 16)

    def floats(self, name: str, count: int) -> Any:
        """The first rows of one of the float32 buffers."""
        return self._floats[name][:count]

    def codes(self, width: int, count: int) -> tuple[Any, Any]:
        """The first rows of the codes of inputs of this width, and their scales."""
        return self._codes[width][:count], self.scale[:count]


@dataclass
class _Running:
    """A stream whose tokens are wanted."""

    left: int
    """Steps still to be launched for it."""
    kind: str


class CudaBackend:
    """A model in GPU memory; see rcprun.backends.Backend, SamplingBackend and ParallelBackend.

    graphs: False launches the kernels of a step one by one, for tools that cannot look into a graph.
    """

    name = "cuda"
    graphs = True

    def __init__(self, file: RcpFile, context: int, streams: int = 1) -> None:
        """streams: sequences at a time, up to 8, of `context` tokens each. Raises BadRequest or OutOfMemory."""
        if not 1 <= streams <= linear.MAX_TOKENS:
            raise BadRequest(f"parallel: the cuda backend takes 1 to {linear.MAX_TOKENS} sequences, found {streams}")
        self.context, self.streams = context, streams
        self._architecture, self._quantization = file.architecture, file.quantization
        plan = plan_memory(file, context, streams)
        free, size = map(int, cupy.cuda.runtime.memGetInfo())
        plan.require(free)
        self.memory_report = plan.describe(free, size)
        """What is asked for of the GPU's memory, in one line."""
        self._eps = np.float32(file.architecture.rms_norm_eps)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            self._weights = Weights(file)
            self._build(file)
            self._stream.synchronize()
        self._slot = 0
        """The stream whose sequence passes append to."""
        self._length = 0
        self._graphs: dict[tuple[str, int], Any] = {}
        self._running: dict[int, _Running] = {}
        self._idle_steps = [0] * streams
        """Steps that the row of an idle stream may still go on for."""
        self._places = 2 * streams + 2
        self._pinned = cupy.cuda.alloc_pinned_memory(4 * self._places * streams)
        self._token_PM = np.frombuffer(self._pinned, np.int32, self._places * streams).reshape(self._places, streams)
        self._coming: deque[tuple[Any, int, Mapping[int, _Running]]] = deque()
        """Tokens on their way to the host: an event after which they are there, their place, and whose they are."""
        self._copies = 0

    def _build(self, file: RcpFile) -> None:
        a, q = self._architecture, self._quantization
        self._cache = KVCache(a, q.kv_bits, self.streams, self.context)
        self._rope = Rope(a, file.tensor(spec.INV_FREQ), self.context, r3=q.r3)
        self._attend = attention.Decode(self._cache, a.num_heads, linear.MAX_TOKENS)
        self._few = Buffers(a, linear.MAX_TOKENS)
        self._many: tuple[Buffers, gemm.Gemm] | None = None
        self._slot_M = cupy.asarray(np.arange(self.streams, dtype=np.int32))
        self._logits_MV = cupy.empty((self.streams, a.vocab_size), np.float32)
        self._sampler = SamplerState.create(self.streams, a.vocab_size, ring=_RING)

    @property
    def max_batch(self) -> int:
        """Copies of the sequence that decode_greedy can go on with at a time."""
        return self.streams

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; the logits (V,) after the last."""
        with self._stream:
            if len(tokens) == 1:
                self._sampler.token[:1].set(np.array(tokens, np.int32))
                self._sampler.position[:1].set(np.array([self._length], np.int32))
                self._step(LOGITS, 1)
                self._length += 1
            else:
                self._prefill(tokens)
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
                    _run(self._head_operations(block_MD, logits_MV, buffers))
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
        start = self._length
        assert len(history) == start
        try:
            with self._stream:
                self._admit(0, options, seed, history, count)
            for produced in range(count):
                ((_, token),) = self.advance()
                self._length = start + produced
                yield token
        finally:
            self.end(0)

    # ---- several streams

    def begin(self, stream: int, prompt: Sequence[int], options: SamplingOptions, seed: int, count: int) -> None:
        """See rcprun.backends.ParallelBackend."""
        assert 0 <= stream < self.streams and stream not in self._running
        self._slot, self._length = stream, 0
        try:
            with self._stream:
                self._prefill(prompt)
                self._admit(stream, options, seed, prompt, count)
        finally:
            self._slot, self._length = 0, 0  # nothing of the first stream may be taken up again: idle rows write too

    def end(self, stream: int) -> None:
        """See rcprun.backends.ParallelBackend."""
        self._running.pop(stream, None)

    def advance(self) -> list[tuple[int, int]]:
        """See rcprun.backends.ParallelBackend. The GPU is a step ahead of the tokens that come out."""
        wanted = {stream: running for stream, running in self._running.items() if running.left}
        if wanted:
            with self._stream:
                self._keep_idle_rows_in_bounds(wanted)
                self._step(max((running.kind for running in wanted.values()), key=KINDS.index), self.streams)
                for running in wanted.values():
                    running.left -= 1
                self._copy_tokens(wanted)
        tokens = []
        while len(self._coming) > bool(wanted):
            event, place, owners = self._coming.popleft()
            event.synchronize()
            for stream, running in owners.items():
                if self._running.get(stream) is running:
                    tokens.append((stream, int(self._token_PM[place, stream])))
        if any(token == FAILED for _, token in tokens):
            raise not_finite()
        return tokens

    def _admit(self, stream: int, options: SamplingOptions, seed: int, history: Sequence[int], count: int) -> None:
        """Choose a stream's first token from its logits, and let it take part in the next count - 1 steps."""
        assert count >= 1 and len(history) + count <= self.context + 1
        if not self._running:  # rows may be anywhere by now, and tokens on their way are of nobody
            self._idle_steps = [0] * self.streams
            self._coming.clear()
        kind = kind_for(options)
        self._sampler.start(stream, options, seed, history)
        self._sample(kind, slice(stream, stream + 1))
        self._running[stream] = running = _Running(count - 1, kind)
        self._idle_steps[stream] = 0
        self._copy_tokens({stream: running})

    def _keep_idle_rows_in_bounds(self, wanted: Mapping[int, _Running]) -> None:
        for row in range(self.streams):
            if row in wanted:
                continue
            if self._idle_steps[row] == 0:
                self._sampler.start(row, _IDLE, 0, [0])
                self._sampler.token[row : row + 1].set(np.zeros(1, np.int32))
                self._idle_steps[row] = min(_IDLE_STEPS, self.context)
            self._idle_steps[row] -= 1

    def _copy_tokens(self, owners: Mapping[int, _Running]) -> None:
        """Ask for all rows' tokens to be copied to the host; of interest are those of their owners."""
        assert len(self._coming) < self._places
        place = self._copies % self._places
        self._copies += 1
        tokens, kind = self._sampler.token, cupy.cuda.runtime.memcpyDeviceToHost
        to = self._pinned.ptr + place * tokens.nbytes
        cupy.cuda.runtime.memcpyAsync(to, tokens.data.ptr, tokens.nbytes, kind, self._stream.ptr)
        event = cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        self._coming.append((event, place, dict(owners)))

    def _sample(self, kind: str, rows: slice) -> None:
        """Choose the next tokens of some rows from their logits."""
        sample(self._logits_MV[rows], self._sampler_rows(rows), greedy=kind == GREEDY, few=kind == FEW)

    def _sampler_rows(self, rows: slice) -> SamplerState:
        """Some rows of the sampler, in place."""
        return SamplerState(**{field.name: getattr(self._sampler, field.name)[rows] for field in fields(SamplerState)})

    # ---- for measurements

    def fork(self, batch: int) -> None:
        """Make the streams up to `batch` copies of the first one, its logits included. After forward only."""
        assert 1 <= batch <= self.streams
        cache, kind = self._cache, cupy.cuda.runtime.memcpyDeviceToDevice
        for array in (*cache.key_NGTB, *cache.value_NGTB, *cache.scale_NGT2, self._logits_MV):
            for row in range(1, batch):
                cupy.cuda.runtime.memcpyAsync(
                    array[row].data.ptr, array[0].data.ptr, array[0].nbytes, kind, self._stream.ptr
                )
        self._stream.synchronize()

    def decode_greedy(self, count: int, batch: int = 1) -> list[int]:
        """Append the likeliest token, `count` times, without the host in between; the tokens of each stream in turn.

        After forward only, and after fork where batch is not 1.
        """
        assert self._length + count <= self.context and count <= _RING
        with self._stream:
            self._rewind(batch, self._length - 1, _IDLE)
            self._sample(GREEDY, slice(batch))
            for _ in range(count):
                self._step(GREEDY, batch)
            tokens: list[int] = self._sampler.history[:batch, :count].get().ravel().tolist()
        self._length += count
        return tokens

    def timed(
        self, operations: Iterable[Operation], batch: int, options: SamplingOptions, turns: int, runs: int
    ) -> list[float]:
        """Seconds that some operations of a step of `batch` rows take as a graph, launched `turns` times in each run.

        The rows continue the first stream's sequence, in each run anew; after fork where batch is not 1. They go on by
        a token for each operation that samples.
        """
        with self._stream:
            self._rewind(batch, self._length, options)
            graph, seconds = self._capture(operations), []
            for _ in range(runs):
                self._rewind(batch, self._length, options)
                start, end = cupy.cuda.Event(), cupy.cuda.Event()
                start.record(self._stream)
                for _ in range(turns):
                    graph.launch(self._stream)
                end.record(self._stream)
                end.synchronize()
                seconds.append(float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / turns)
        return seconds

    def _rewind(self, batch: int, position: int, options: SamplingOptions) -> None:
        """Set the first rows to a position, to sample with options."""
        for row in range(batch):
            self._sampler.start(row, options, 0, [])
        self._sampler.position[:batch].set(np.full(batch, position, np.int32))

    def clear_cache(self) -> None:
        """Zero the KV cache: attention reads tokens that are not there yet, and passes over them."""
        with self._stream:
            for array in (*self._cache.key_NGTB, *self._cache.value_NGTB, *self._cache.scale_NGT2):
                array.fill(0)

    def read_bandwidth(self) -> float:
        """Bytes a second that the GPU was measured to read."""
        with self._stream:
            return read_bandwidth()

    def describe(self) -> str:
        """The GPU and its highest clock."""
        return device.describe()

    def clocks(self) -> device.Clocks | None:
        """What the GPU runs at now, where it says."""
        return device.clocks()

    # ---- passes; on self._stream

    def _step(self, kind: str, rows: int) -> None:
        """One token of each of the first rows: from the sampler's token and position to logits, and to the next ones
        unless kind is LOGITS."""
        graph = self._graphs.get((kind, rows))
        if graph is not None:
            graph.launch(self._stream)
        elif self.graphs:
            self._graphs[kind, rows] = self._capture(self.operations(kind, rows))  # which does this step itself
        else:
            _run(self.operations(kind, rows))

    def _capture(self, operations: Iterable[Operation]) -> Any:
        """A CUDA graph of all that they launch, which is launched once before: a capture may not load kernels."""
        chosen = list(operations)
        with self._stream:
            _run(chosen)
            self._stream.synchronize()
            self._stream.begin_capture()
            _run(chosen)
            return self._stream.end_capture()

    def operations(self, kind: str, rows: int) -> Iterator[Operation]:
        """A step's operations, in order: one token of each of the first rows."""
        few, weights, a = self._few, self._weights, self._architecture
        state = self._sampler_rows(slice(rows))
        x_MD = few.floats("x", rows)
        row_bytes = rows * a.hidden_size * weights.embed_VD.itemsize
        yield Operation("embed", partial(embed, state.token, weights.embed_VD, weights.embed_scale_V, x_MD), row_bytes)
        for index, layer in enumerate(weights.layers):
            yield from self._layer_of_few(index, layer, x_MD, state.position, self._slot_M[:rows], apart=True)
        yield from self._head_operations(x_MD, self._logits_MV[:rows], few)
        if kind != LOGITS:
            yield Operation("sample", partial(self._sample, kind, slice(rows)))

    def _prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence of self._slot; its row of the logits is what comes after the last."""
        for x_MD, buffers in self._passes(tokens):
            last_1D, rows = x_MD[-1:], buffers
        _run(self._head_operations(last_1D, self._logits_MV[self._slot : self._slot + 1], rows))

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
        slot_M.set(np.full(count, self._slot, np.int32))
        x_MD = buffers.floats("x", count)
        embed(buffers.token[:count], self._weights.embed_VD, self._weights.embed_scale_V, x_MD)
        for index, layer in enumerate(self._weights.layers):
            if few:
                _run(self._layer_of_few(index, layer, x_MD, position_M, slot_M, apart=False))
            else:
                self._layer_of_many(index, layer, x_MD, position_M, slot_M, start)
        self._length = start + count
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
            launch = partial(self._linear_of_few, weights, x, out, clip, prologue, epilogue, name in _OVERLAPPING)
            return Operation(name, launch, weights.nbytes)

        clip, gain = layer.act_clip, layer.qk_gain
        yield product("qkv", layer.qkv, x_MD, qkv, clip[0], linear.NORMALIZE, linear.STORE)
        places = position_M, slot_M, index, layer.window, attended
        if apart:
            fused = partial(self._attend.fused, qkv, *places, self._rope, layer.kv_clip, gain)
            yield Operation("rope + attention", fused)
        else:
            rope = partial(self._rope, qkv, position_M, slot_M, self._cache, index, layer.kv_clip, q, gain)
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
            overlap=count > 1,
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
        overlap: bool,
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
                overlap=overlap,
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
        prefill_attention(q, self._cache, index, self._slot, start, layer.window, attended)
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

    def _head_operations(self, x_MD: Any, logits_MV: Any, buffers: Buffers) -> Iterator[Operation]:
        """Logits of residuals after the last layer, which may be a part of the pass's."""
        w, count = self._weights, len(x_MD)
        yield Operation("head norm", partial(self._normalize_for_head, x_MD, buffers))
        if w.head_scale_V is None:
            launch = partial(head_half, buffers.floats("h", count), w.head_VD, logits_MV)
            yield Operation("head", launch, int(w.head_VD.nbytes))
        else:
            codes, scale = buffers.head_codes[:count], buffers.scale[:count]
            launch = partial(head_int8, codes, scale, w.head_VD, w.head_scale_V, logits_MV)
            yield Operation("head", launch, int(w.head_VD.nbytes + w.head_scale_V.nbytes))

    def _normalize_for_head(self, x_MD: Any, buffers: Buffers) -> None:
        """From residuals to what the head takes: head_codes and scale, or "h"."""
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

    def _for_many(self) -> tuple[Buffers, gemm.Gemm]:
        """What passes of many tokens need; allocated by the first of them."""
        if self._many is None:
            linears = [each for layer in self._weights.layers for each in layer.linears]
            tokens = min(PREFILL_TOKENS, self.context)
            self._many = Buffers(self._architecture, tokens), gemm.Gemm(linears, tokens)
        return self._many


def kind_for(options: SamplingOptions) -> str:
    """The least that a step must end with to choose by these options."""
    if options.temperature == 0:
        return GREEDY
    return FEW if draws_from_few(options) else DRAWN


def plan_memory(file: RcpFile, context: int, streams: int) -> MemoryPlan:
    """What a CudaBackend will ask for."""
    a, q = file.architecture, file.quantization
    host_only = (spec.INV_FREQ, spec.TOKENIZER)
    sizes = {"bits": q.kv_bits, "kv_heads": a.num_kv_heads, "head_dim": a.head_dim, "capacity": context}
    cache = cast(KVCache, SimpleNamespace(**sizes))
    workspace = attention.decode_workspace_bytes(cache, a.num_heads, linear.MAX_TOKENS)
    sampling = streams * (4 * _RING + _HISTOGRAM_BYTES + (4 + 3 * 8) * a.vocab_size)
    return MemoryPlan(
        weights=sum(entry.nbytes for name, entry in file.header_tensors.items() if name not in host_only),
        kv_cache=cache_bytes(a, q.kv_bits, streams, context),
        tables=2 * context * a.head_dim // 2 * 4,
        buffers=Buffers.bytes_needed(a, linear.MAX_TOKENS)
        + workspace
        + sampling
        + _prefill_bytes(a, min(PREFILL_TOKENS, context))
        + _CUDA_BYTES,
        context=context,
        streams=streams,
    )


def _prefill_bytes(a: Architecture, tokens: int) -> int:
    """Of what passes of many tokens need: buffers, and the largest layer as int8 with its integer sums."""
    heads, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = (
        (heads + 2 * kv, a.hidden_size),
        (a.hidden_size, heads),
        (2 * a.intermediate_size, a.hidden_size),
        (a.hidden_size, a.intermediate_size),
    )
    tiled = [(spec.ceil_div(n, linear.TILE_ROWS) * linear.TILE_ROWS, linear.padded(k)) for n, k in shapes]
    return Buffers.bytes_needed(a, tokens) + gemm.bytes_needed(tiled, tokens)


def _float_rows(a: Architecture, tokens: int) -> dict[str, int]:
    """Of the buffers between kernels that hold floats: wide ones hold a strip."""
    widest = max((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, a.intermediate_size)
    strip = max(1, _STRIP_BYTES // (4 * widest * _ROUND_STRIP)) * _ROUND_STRIP
    return {name: min(tokens, strip) if name in _OF_A_STRIP else tokens for name in _float_widths(a)}


def _float_widths(a: Architecture) -> dict[str, int]:
    """Of the buffers between kernels that hold floats."""
    heads = a.num_heads * a.head_dim
    return {
        "x": a.hidden_size,
        "h": a.hidden_size,
        "unrotated": a.hidden_size,
        "qkv": heads + 2 * a.num_kv_heads * a.head_dim,
        "q": heads,
        "attended": heads,
        "z": a.intermediate_size,
        "z_rotated": a.intermediate_size,
    }


def _code_widths(a: Architecture) -> set[int]:
    """Widths of all inputs of linear layers."""
    return {a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size}


def _run(operations: Iterable[Operation]) -> None:
    for operation in operations:
        operation.launch()
