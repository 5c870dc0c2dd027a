"""A whole model on the GPU, for up to 8 sequences: their state, steps as graphs, sampling, and measurements.

Each sequence, or stream, has a slot of the KV cache and a row of everything that decoding reads and writes. A step is
one token of each of the first rows, and a CUDA graph, captured once for each number of rows: tokens and positions lie
in GPU memory, so that replaying it is all that a step takes. Rows whose stream has nothing to do go along, unread.

Sampled tokens of a stream do not depend on the other streams: kernels compute rows independently, and a backend of n
streams always steps n rows. They may depend on n, as sums of floats have another order for one row than for several.

Shape suffixes: M rows or tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from rcpformat.reader import RcpFile
from rcprun.backends import MemoryUse
from rcprun.backends.cuda import device, linear
from rcprun.backends.cuda.bandwidth import read_bandwidth
from rcprun.backends.cuda.buffers import Buffers
from rcprun.backends.cuda.network import Network, Operation, run
from rcprun.backends.cuda.plan import RING, plan_memory
from rcprun.backends.cuda.sample import FAILED, SamplerState, draws_from_few, sample
from rcprun.errors import BadRequest
from rcprun.sampling import SamplingOptions, not_finite

_LOGITS_BYTES = 64 << 20
LOGITS, GREEDY, FEW, DRAWN = KINDS = ("logits", "greedy", "few", "drawn")
"""What a step ends with: logits, the likeliest token of each row, draws from a few tokens, or from all. Each can do
what those before it can."""
_IDLE_STEPS = 256
"""Steps that the row of an idle stream goes on for before it starts over, so that its attention stays cheap."""
_IDLE = SamplingOptions(temperature=0.0)


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
        plan = plan_memory(file, context, streams)
        free, size = map(int, cupy.cuda.runtime.memGetInfo())
        plan.require(free)
        self.memory_report = plan.describe(free, size)
        """What is asked for of the GPU's memory, in one line."""
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            self._network = Network(file, context, streams)
            self._logits_MV = cupy.empty((streams, file.architecture.vocab_size), np.float32)
            self._sampler = SamplerState.create(streams, file.architecture.vocab_size, ring=RING)
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
        rows = max(1, _LOGITS_BYTES // (4 * self._logits_MV.shape[1]))
        with self._stream:
            for x_MD, buffers in self._passes(tokens):
                for row in range(0, len(x_MD), rows):
                    block_MD = x_MD[row : row + rows]
                    logits_MV = cupy.empty((len(block_MD), self._logits_MV.shape[1]), np.float32)
                    run(self._network.head(block_MD, logits_MV, buffers))
                    yield logits_MV.get()

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self._length
        self._length = length

    def memory(self) -> MemoryUse:
        """Bytes held, without the buffers between kernels."""
        return MemoryUse(weights=self._network.weights.nbytes, kv_cache=self._network.cache.nbytes)

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
        cache, kind = self._network.cache, cupy.cuda.runtime.memcpyDeviceToDevice
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
        assert self._length + count <= self.context and count <= RING
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
            cache = self._network.cache
            for array in (*cache.key_NGTB, *cache.value_NGTB, *cache.scale_NGT2):
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
            run(self.operations(kind, rows))

    def _capture(self, operations: Iterable[Operation]) -> Any:
        """A CUDA graph of all that they launch, which is launched once before: a capture may not load kernels."""
        chosen = list(operations)
        with self._stream:
            run(chosen)
            self._stream.synchronize()
            self._stream.begin_capture()
            run(chosen)
            return self._stream.end_capture()

    def operations(self, kind: str, rows: int) -> Iterator[Operation]:
        """A step's operations, in order: one token of each of the first rows."""
        state = self._sampler_rows(slice(rows))
        yield from self._network.step(state.token, state.position, self._logits_MV[:rows])
        if kind != LOGITS:
            yield Operation("sample", partial(self._sample, kind, slice(rows)))

    def _prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence of self._slot; its row of the logits is what comes after the last."""
        for x_MD, buffers in self._passes(tokens):
            last_1D, rows = x_MD[-1:], buffers
        run(self._network.head(last_1D, self._logits_MV[self._slot : self._slot + 1], rows))

    def _passes(self, tokens: Sequence[int]) -> Iterator[tuple[Any, Buffers]]:
        """Append tokens to the sequence of self._slot; see Network.passes."""
        assert 0 < len(tokens) <= self.context - self._length
        for x_MD, buffers in self._network.passes(tokens, self._slot, self._length):
            self._length += len(x_MD)
            yield x_MD, buffers


def kind_for(options: SamplingOptions) -> str:
    """The least that a step must end with to choose by these options."""
    if options.temperature == 0:
        return GREEDY
    return FEW if draws_from_few(options) else DRAWN
