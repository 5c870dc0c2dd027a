"""Generates tokens: the loop around a backend. Knows nothing of files, text encoding of prompts or the terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rcpformat.architecture import Architecture
from rcpformat.errors import brief
from rcprun.backends import Backend, ParallelBackend, SamplingBackend
from rcprun.errors import BadRequest, ContextOverflow
from rcprun.sampling import Sampler
from rcprun.tokenizer import StopStrings, TextStream, Tokenizer

StopReason = Literal["eos", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Piece:
    """One generated token, and the text that could be shown after it: often its own, sometimes none, or more."""

    token: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Timings:
    """How long a generation took."""

    prefill_tokens: int
    """Tokens of the prompt that were computed; less than the prompt where a chat's cache held its beginning."""
    prefill_seconds: float
    decode_tokens: int
    """Tokens computed one by one: all generated ones but the first, which the prefill gives."""
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens per second; 0 when there were none."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second; 0 when there were none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What was generated."""

    text: str
    """Without special tokens, and cut before a stop string."""
    tokens: list[int]
    """Every generated id, the one that ended the generation included."""
    prompt_tokens: int
    stop_reason: StopReason
    """eos: an end-of-sequence id; stop: a stop string; length: max_tokens; context: it is full; interrupted: Ctrl-C
    or an iteration that was left early."""
    seed: int
    timings: Timings


def check_tokens(tokens: Sequence[int], architecture: Architecture, context: int) -> list[int]:
    """The tokens as plain ints. Raises BadRequest when there are none or an id is out of range, ContextOverflow."""
    vocab_size, longest = architecture.vocab_size, architecture.max_position_embeddings
    if not isinstance(tokens, Sequence | np.ndarray):
        raise BadRequest(f"expected a list of token ids, found {brief(tokens)}")
    if len(tokens) == 0:
        raise BadRequest("the prompt is empty; give some text")
    out = []
    for place, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise BadRequest(f"token {place}: expected an id from 0 to {vocab_size - 1}, found {brief(token)}")
        out.append(int(token))
    if len(out) > context:
        of_model = context >= longest
        remedy = (
            "the model's longest; shorten them" if of_model else f"of at most {longest}; shorten them, or --context"
        )
        raise ContextOverflow(f"{len(out)} tokens do not fit into the context of {context}, {remedy}")
    return out


class Generation:
    """A running generation: iterate for its pieces, then (or at any time) read its `result`.

    Ctrl-C while iterating leaves the result consistent and is raised again.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        cached: int = 0,
        sampler: Sampler,
        max_tokens: int | None,
        stop: Sequence[str],
    ) -> None:
        """prompt: checked ids, of which the backend's cache holds exactly the first `cached`, fewer than all."""
        if max_tokens is not None and max_tokens < 1:
            raise BadRequest(f"max_tokens: expected 1 or more, found {max_tokens}")
        self._backend = backend
        self._sampler = sampler
        self._history = list(prompt)
        self._prompt_tokens = len(prompt)
        self._cached = cached
        self._max_tokens = max_tokens
        room = backend.context - len(prompt) + 1  # the last token generated needs no place in the cache
        self._limit = room if max_tokens is None else min(max_tokens, room)
        self._eos = frozenset(tokenizer.info.eos_ids)
        self._text = TextStream(tokenizer, prompt)
        self._stop = StopStrings(stop)
        self._shown: list[str] = []
        self._reason: StopReason = "interrupted"
        self._ended = False
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation here."""
        self._pieces.close()

    @property
    def ended(self) -> bool:
        """Whether the last token has come."""
        return self._ended

    @property
    def tokens(self) -> list[int]:
        """The prompt and all that was generated so far."""
        return list(self._history)

    @property
    def result(self) -> GenerationResult:
        """The generation so far; final once the iteration has ended."""
        generated = self._history[self._prompt_tokens :]
        return GenerationResult(
            text="".join(self._shown),
            tokens=generated,
            prompt_tokens=self._prompt_tokens,
            stop_reason=self._reason,
            seed=self._sampler.seed,
            timings=Timings(
                prefill_tokens=self._prompt_tokens - self._cached,
                prefill_seconds=self._prefill_seconds,
                decode_tokens=max(0, len(generated) - 1),
                decode_seconds=self._decode_seconds,
            ),
        )

    def begin(self, backend: ParallelBackend, stream: int) -> None:
        """Compute the prompt as a stream of a backend, whose tokens are to be pushed."""
        backend.begin(stream, self._history, self._sampler.options, self._sampler.seed, self._limit)

    def push(self, token: int, began: float) -> Piece:
        """Take the next token, which was waited for since `began` (time.perf_counter)."""
        self._history.append(token)
        produced = len(self._history) - self._prompt_tokens
        text, reason = self._text_after(token, produced)
        self._shown.append(text)
        seconds = time.perf_counter() - began
        if produced == 1:
            self._prefill_seconds = seconds
        else:
            self._decode_seconds += seconds
        if reason:
            self._reason, self._ended = reason, True
        return Piece(token, text)

    def _run(self) -> Generator[Piece, None, None]:
        tokens = self._sampled()
        while not self._ended:
            began = time.perf_counter()
            yield self.push(next(tokens), began)

    def _sampled(self) -> Generator[int, None, None]:
        """Token after token. Nothing is computed before it is asked for, but by a backend that samples by itself."""
        logits = self._backend.forward(self._history[self._cached :])
        if isinstance(self._backend, SamplingBackend):
            yield from self._backend.generate(self._sampler.options, self._sampler.seed, self._history, self._limit)
            return
        while True:
            token = self._sampler.sample(logits, self._history)
            yield token
            logits = self._backend.forward([token])

    def _text_after(self, token: int, produced: int) -> tuple[str, StopReason | None]:
        """What can be shown after this token, and why it is the last one, if it is."""
        text = ""
        if token not in self._eos:
            text, found = self._stop.push(self._text.push(token))
            if found:
                return text, "stop"
            if produced < self._limit:
                return text, None
        rest, found = self._stop.push(self._text.flush())
        text += rest + self._stop.flush()
        if token in self._eos:
            return text, "eos"
        if found:
            return text, "stop"
        return text, "length" if produced == self._max_tokens else "context"


class GenerationGroup:
    """Generations of one model, as many at a time as its backend can do: where one ends, the next takes its place.

    Iterate for (number of the generation, piece), then (or at any time) read `results`. Pieces of a generation come in
    order. A backend of one sequence runs them one after the other. Ctrl-C while iterating leaves the results
    consistent and is raised again.
    """

    def __init__(self, backend: Backend, generations: Sequence[Generation]) -> None:
        """generations: of this backend, none begun."""
        self.generations = generations
        self._backend = backend
        if isinstance(backend, ParallelBackend) and backend.streams > 1:
            self._pieces = self._together(backend)
        else:
            self._pieces = self._one_by_one()

    def __iter__(self) -> Iterator[tuple[int, Piece]]:
        return self._pieces

    def __next__(self) -> tuple[int, Piece]:
        return next(self._pieces)

    def close(self) -> None:
        """End all generations here."""
        self._pieces.close()

    @property
    def results(self) -> list[GenerationResult]:
        """Of all generations, in order."""
        return [generation.result for generation in self.generations]

    def _one_by_one(self) -> Generator[tuple[int, Piece], None, None]:
        for number, generation in enumerate(self.generations):
            self._backend.truncate(0)
            try:
                for piece in generation:
                    yield number, piece
            finally:
                generation.close()

    def _together(self, backend: ParallelBackend) -> Generator[tuple[int, Piece], None, None]:
        waiting = deque(range(len(self.generations)))
        free = deque(range(backend.streams))
        running: dict[int, int] = {}
        since: dict[int, float] = {}
        try:
            while waiting or running:
                while waiting and free:
                    stream, number = free.popleft(), waiting.popleft()
                    running[stream], since[stream] = number, time.perf_counter()
                    self.generations[number].begin(backend, stream)
                for stream, token in backend.advance():
                    number = running[stream]
                    generation = self.generations[number]
                    piece = generation.push(token, since[stream])
                    since[stream] = time.perf_counter()
                    if generation.ended:
                        backend.end(stream)
                        free.append(stream)
                        del running[stream]
                    yield number, piece
        finally:
            for stream in running:
                backend.end(stream)
