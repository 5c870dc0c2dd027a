"""Chooses next tokens on the GPU, as rcprun.sampling does on the CPU. Launches kernels/sample.cu and sample_all.cu.

The draws have a random stream of their own: a seed gives other tokens than on the CPU, from the same distribution.
Where logits tie at the top_k-th place, the smaller ids are kept. Knows nothing of models or text.

Shape suffixes: M rows (sequences), V vocabulary, R places of the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import cupy
import numpy as np

from rcprun.backends.cuda.launch import NO_HOPPER, check, has_hopper, kernel
from rcprun.sampling import REPEAT_WINDOW, SamplingOptions

FEW = 128
"""The largest top_k of the fast way to draw; sample.cu has it as a constant."""
_THREADS, _MOST_BLOCKS = 512, 8
"""Of sample.cu, for a row."""
_STATIC_BYTES = 32 << 10
"""Of shared memory that sample_few has besides what grows with the vocabulary, at most."""
_ALL_THREADS = 1024
_ALL_CHUNK = 4 * _ALL_THREADS
"""Of sample_all.cu: threads, and logits, of a block."""
_FIELDS = 3 + 8 * 256 + 4096 + 3 * 4097
"""64-bit words of a row's workspace, besides three for each token of the vocabulary; sample.cuh checks it."""
_VOCABULARY_LIMIT = 1 << 20
_LARGEST_TEMPERATURE = 1e30
"""Beyond it nothing changes, and infinity would divide infinite differences."""
FAILED = -1
"""The token of a row whose logits are not finite."""


@dataclass(frozen=True, kw_only=True)
class SamplerState:
    """Everything that sampling reads and writes between launches, on the GPU; a CUDA graph may replay the launches.

    numbers float32 (M, 4): temperature, top_p, min_p, repeat_penalty. top_k int32 (M,). random uint32 (M, 4): the seed,
    then the launches since it was set, low words first. token int32 (M,): the latest choice; position int32 (M,): its
    place in its sequence. Both are what a decode step reads. history int32 (M, R): token i of a sequence, prompt
    included, at i % R. length int32 (M,): tokens of the sequence.
    """

    numbers: cupy.ndarray
    top_k: cupy.ndarray
    random: cupy.ndarray
    token: cupy.ndarray
    position: cupy.ndarray
    history: cupy.ndarray
    length: cupy.ndarray
    workspace: cupy.ndarray

    @classmethod
    def create(cls, rows: int, vocabulary: int, *, ring: int) -> Self:
        """State of `rows` greedy sequences without tokens. ring: R, at least REPEAT_WINDOW."""
        assert ring >= REPEAT_WINDOW and vocabulary < _VOCABULARY_LIMIT
        numbers = np.tile(np.array([0, 1, 0, 1], dtype=np.float32), (rows, 1))
        return cls(
            numbers=cupy.asarray(numbers),
            top_k=cupy.zeros(rows, dtype=np.int32),
            random=cupy.zeros((rows, 4), dtype=np.uint32),
            token=cupy.zeros(rows, dtype=np.int32),
            position=cupy.zeros(rows, dtype=np.int32),
            history=cupy.zeros((rows, ring), dtype=np.int32),
            length=cupy.zeros(rows, dtype=np.int32),
            workspace=cupy.zeros((rows, _FIELDS + 3 * vocabulary), dtype=np.uint64),
        )

    def start(self, row: int, options: SamplingOptions, seed: int, tokens: Sequence[int]) -> None:
        """Make a row continue these tokens, with these options and the first draw of the seed."""
        ring = self.history.shape[1]
        history = np.zeros(ring, dtype=np.int32)
        for place in range(max(0, len(tokens) - ring), len(tokens)):
            history[place % ring] = tokens[place]
        temperature = min(options.temperature, _LARGEST_TEMPERATURE)
        numbers = [temperature, options.top_p, options.min_p, options.repeat_penalty]
        self.numbers[row].set(np.array(numbers, dtype=np.float32))
        self.top_k[row : row + 1].set(np.array([min(options.top_k, _VOCABULARY_LIMIT)], dtype=np.int32))
        self.random[row].set(np.array([seed & 0xFFFFFFFF, seed >> 32, 0, 0], dtype=np.uint32))
        self.position[row : row + 1].set(np.array([len(tokens) - 1], dtype=np.int32))
        self.history[row].set(history)
        self.length[row : row + 1].set(np.array([len(tokens)], dtype=np.int32))


def draws_from_few(options: SamplingOptions) -> bool:
    """Whether `sample` may be told `few` for a row with these options."""
    return options.temperature == 0 or 0 < options.top_k <= FEW


def sample(
    logits_MV: cupy.ndarray, state: SamplerState, *, greedy: bool, few: bool = False, hopper: bool = True
) -> None:
    """Choose a token for each row of float32 logits, and advance the state.

    greedy: every row's temperature is 0. few: each row's options satisfy draws_from_few. Either is faster, and a row of
    which it is not true gets the token FAILED or, if `greedy`, its likeliest. A row whose logits are not finite gets
    FAILED. hopper: False for the way of older GPUs, which they take by themselves.
    """
    check(logits_MV, "logits", np.float32, (None, None))
    rows, vocabulary = logits_MV.shape
    check(state.numbers, "numbers", np.float32, (rows, 4))
    check(state.top_k, "top_k", np.int32, (rows,))
    check(state.random, "random", np.uint32, (rows, 4))
    check(state.token, "token", np.int32, (rows,))
    check(state.position, "position", np.int32, (rows,))
    check(state.history, "history", np.int32, (rows, None))
    check(state.length, "length", np.int32, (rows,))
    check(state.workspace, "workspace", np.uint64, (rows, _FIELDS + 3 * vocabulary))
    arguments = [
        *(logits_MV, state.numbers, state.top_k, state.random, state.token, state.position, state.history),
        *(state.length, state.workspace, np.int32(vocabulary), np.int32(state.history.shape[1])),
    ]
    device = cupy.cuda.Device()
    quads = -(-vocabulary // (4 * _THREADS * _MOST_BLOCKS))
    shared = 0 if greedy else 16 * _THREADS * quads
    if greedy or (few and shared + _STATIC_BYTES <= int(device.attributes["MaxSharedMemoryPerBlockOptin"])):
        blocks = -(-vocabulary // (4 * _THREADS * quads))
        cluster = blocks if hopper and has_hopper() else 1
        defines = (("RCP_FIELDS", _FIELDS), ("RCP_QUADS", quads), *(() if hopper else ((NO_HOPPER, 1),)))
        kernel("sample", "sample_greedy" if greedy else "sample_few", defines).launch(
            (blocks, rows, 1), _THREADS, arguments, shared=shared, cluster=cluster, overlap=True
        )
        return
    defines = (("RCP_CHUNK", _ALL_CHUNK), ("RCP_FIELDS", _FIELDS))
    for name in ("sample_top", "sample_histogram", "sample_draw"):
        grid = (-(-vocabulary // _ALL_CHUNK), rows, 1)
        kernel("sample_all", name, defines).launch(grid, _ALL_THREADS, arguments, overlap=True)
