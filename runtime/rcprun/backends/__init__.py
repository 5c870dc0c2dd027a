"""What every backend offers, and the choice of one. Knows nothing of any backend's inside."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rcpformat.reader import RcpFile
from rcprun.errors import BackendUnavailable
from rcprun.sampling import SamplingOptions

BACKENDS = ("auto", "numpy", "cuda")


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes that a backend holds."""

    weights: int
    kv_cache: int


class Backend(Protocol):
    """One model, ready to run, with one sequence in its KV cache.

    The caller checks token ids and lengths: 0 <= id < vocab_size, and length + len(tokens) <= context.
    """

    name: str
    context: int
    """Tokens that the KV cache can hold."""

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append one token or more to the sequence; the logits (V,) after the last of them."""

    def forward_all(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Append tokens; the logits after each of them, in order, as blocks (M, V) of bounded size."""

    def truncate(self, length: int) -> None:
        """Forget all tokens of the sequence but the first `length`."""

    def memory(self) -> MemoryUse:
        """Bytes held now."""


@runtime_checkable
class SamplingBackend(Protocol):
    """What a backend may have besides: it samples by itself, where the logits are."""

    def generate(
        self, options: SamplingOptions, seed: int, history: Sequence[int], count: int
    ) -> Generator[int, None, None]:
        """Up to `count` tokens after those of `forward`, which was called last; its logits give the first of them.

        history: all tokens of the sequence, which options.repeat_penalty looks at. Reproducible for a seed, but not the
        draws of another backend. Whenever a token comes out, all tokens before it count as appended, and it does not.
        Raises BadModelFile for logits that are not finite.
        """


@runtime_checkable
class ParallelBackend(Protocol):
    """What a backend may have besides: several sequences at a time, each a stream with a place of its own.

    A stream's tokens do not depend on what other streams do, or whether they do anything. While streams run, the one
    sequence of Backend must not be used; afterwards it is empty.
    """

    streams: int
    """Sequences at a time."""

    def begin(self, stream: int, prompt: Sequence[int], options: SamplingOptions, seed: int, count: int) -> None:
        """Compute a prompt, and let the stream, which must not be running, go on with up to `count` tokens.

        stream: from 0 to streams - 1. The tokens are reproducible for a seed, but not the draws of another backend.
        """

    def advance(self) -> list[tuple[int, int]]:
        """Each running stream's number and its next token; of a stream that has had `count` tokens, none.

        Raises BadModelFile for logits that are not finite.
        """

    def end(self, stream: int) -> None:
        """No more tokens of this stream are wanted; another sequence may take its place."""


def create(name: str, file: RcpFile, context: int, streams: int = 1) -> Backend:
    """A backend by its name, one of BACKENDS; "auto" takes the GPU where there is one that can run it.

    streams: sequences at a time, each of `context` tokens, where it is a ParallelBackend; others have one.
    Raises BackendUnavailable, BadRequest or OutOfMemory.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name != "numpy":
        from rcprun.backends import cuda

        if name == "cuda" or cuda.why_unavailable() is None:
            return cuda.create(file, context, streams)
    from rcprun.backends.numpy import NumpyBackend

    return NumpyBackend(file, context)
