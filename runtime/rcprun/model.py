"""The Python interface: load a model, then generate, stream, chat or score. Knows nothing of the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypedDict, Unpack

import numpy as np

from rcpformat.errors import FormatError, UnreadableFile, brief
from rcpformat.reader import RcpFile
from rcprun import backends, hub
from rcprun.chat import ChatRenderer, Message, require_template
from rcprun.engine import Generation, GenerationGroup, GenerationResult, Piece, check_tokens
from rcprun.errors import BadModelFile, BadRequest
from rcprun.sampling import Sampler, SamplingOptions
from rcprun.score import SequenceScore, score_sequence
from rcprun.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256


class SamplingKeywords(TypedDict, total=False):
    """The fields of SamplingOptions; None or left out stands for the model's default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None


def load(
    model: str | os.PathLike[str],
    *,
    backend: str = "auto",
    context: int | None = None,
    parallel: int = 1,
    verify: bool = False,
) -> Model:
    """Open a `.rcp` file and make it ready to run.

    model: a path, or a Hub name (user/repo, hf://user/repo, hf://user/repo/file.rcp), downloaded when it is not cached.
    backend: "auto", "numpy" or "cuda". context: tokens that prompt and reply may have together; by default, and at
    most, what the model was trained for. parallel: prompts of generate_many that a GPU computes together, with such a
    context each. verify: check the file's hashes first (seconds a gigabyte).

    Raises RcpRunError: BadModelFile, HubError, BackendUnavailable, BadRequest.
    """
    file = open_file(model, verify=verify)
    trained = file.architecture.max_position_embeddings
    if context is not None and not 1 <= context <= trained:
        raise BadRequest(f"context: expected from 1 to {trained} tokens, as the model was trained; found {context}")
    with _bad_model_files():
        return Model(file, backends.create(backend, file, context or trained, parallel))


def open_file(model: str | os.PathLike[str], *, verify: bool = False) -> RcpFile:
    """The file that `load` would run, open. Raises BadModelFile or HubError."""
    path = hub.resolve(model)
    with _bad_model_files():
        return RcpFile.open(path, verify=verify)


@contextmanager
def _bad_model_files() -> Iterator[None]:
    try:
        yield
    except (UnreadableFile, FormatError) as error:
        raise BadModelFile(str(error)) from error


class Model:
    """A loaded model. It runs one sequence at a time, or one group: what starts a new one ends what ran before it."""

    def __init__(self, file: RcpFile, backend: backends.Backend) -> None:
        self.file = file
        self.backend = backend
        self.tokenizer = Tokenizer(file.tokenizer_json(), file.metadata.tokenizer)
        self._running: Generation | GenerationGroup | None = None

    @property
    def context(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        return self.backend.context

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The checked token ids of a plain prompt. Raises BadRequest or ContextOverflow."""
        if not isinstance(prompt, str | Sequence | np.ndarray):
            raise BadRequest(f"prompt: expected text or a list of token ids, found {brief(prompt)}")
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt) if prompt else []
        return check_tokens(prompt, self.file.architecture, self.context)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingKeywords],
    ) -> Generation:
        """Start a generation: an iterator of `Piece`s (token id, text), with a `result` at the end.

        prompt: text, or token ids that are used as they are. max_tokens: None goes on until the model ends or the
        context is full. stop: strings that end the generation and are not part of its text. sampling: the fields of
        SamplingOptions; the model's own defaults fill in. Raises BadRequest or ContextOverflow.
        """
        return self._start(self.encode(prompt), max_tokens, stop, sampling, reuse_cache=False)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        on_token: Callable[[Piece], None] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> GenerationResult:
        """`stream` to its end, calling on_token with each piece; the text and how it came about."""
        return _exhaust(self.stream(prompt, max_tokens=max_tokens, stop=stop, **sampling), on_token)

    def stream_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingKeywords],
    ) -> GenerationGroup:
        """Start a generation of each prompt: an iterator of (number of the prompt, `Piece`), with `results` at the end.

        As many run together as `load` was told to run in parallel, where the backend can. With a seed, the first prompt
        has that one, the next one the next seed, and so on. Parameters and errors as of `stream`.
        """
        options = SamplingOptions.with_defaults(self.file.metadata.generation, **sampling)
        generations = []
        for number, prompt in enumerate(prompts):
            seed = None if options.seed is None else (options.seed + number) % 2**64
            sampler = Sampler(replace(options, seed=seed))
            generations.append(self._generation(self.encode(prompt), 0, sampler, max_tokens, stop))
        self._end_running()
        self._running = group = GenerationGroup(self.backend, generations)
        return group

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        on_token: Callable[[int, Piece], None] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> list[GenerationResult]:
        """`stream_many` to its end, calling on_token with each prompt's number and piece; a result for each prompt."""
        group = self.stream_many(prompts, max_tokens=max_tokens, stop=stop, **sampling)
        for number, piece in group:
            if on_token is not None:
                on_token(number, piece)
        return group.results

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[Piece], None] | None = None,
        **sampling: Unpack[SamplingKeywords],
    ) -> GenerationResult:
        """The reply to messages ({"role", "content"}), through the model's chat template.

        Raises ChatTemplateError, BadRequest or ContextOverflow.
        """
        prompt = self.encode_chat(messages)
        return _exhaust(self._start(prompt, max_tokens, stop, sampling, reuse_cache=False), on_token)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The checked token ids that the model's chat template makes of messages. Raises as `chat`."""
        info = self.tokenizer.info
        with ChatRenderer(
            info.chat_template,
            bos_token=self.tokenizer.token(info.bos_id),
            eos_token=self.tokenizer.token(info.eos_ids[0] if info.eos_ids else None),
        ) as renderer:
            text = renderer.render(messages)
        return check_tokens(self.tokenizer.encode_raw(text), self.file.architecture, self.context)

    def conversation(self, system: str | None = None) -> Conversation:
        """A chat of several turns that computes only what is new in each. Raises ChatTemplateError without template."""
        require_template(self.tokenizer.info.chat_template)
        return Conversation(self, system)

    def score(self, tokens: Sequence[int]) -> SequenceScore:
        """The log-likelihood of each token but the first, given those before it. Raises BadRequest, ContextOverflow."""
        checked = check_tokens(tokens, self.file.architecture, self.context)
        self._end_running()
        return score_sequence(self.backend, checked)

    def _start(
        self,
        prompt: list[int],
        max_tokens: int | None,
        stop: Sequence[str],
        sampling: SamplingKeywords,
        *,
        reuse_cache: bool,
    ) -> Generation:
        options = SamplingOptions.with_defaults(self.file.metadata.generation, **sampling)
        before = self._running if reuse_cache else None
        held = before.tokens[: self.backend.length] if isinstance(before, Generation) else []
        self._end_running()
        cached = _common_prefix(held, prompt[:-1])
        self.backend.truncate(cached)
        self._running = generation = self._generation(prompt, cached, Sampler(options), max_tokens, stop)
        return generation

    def _generation(
        self, prompt: list[int], cached: int, sampler: Sampler, max_tokens: int | None, stop: Sequence[str]
    ) -> Generation:
        return Generation(
            self.backend,
            self.tokenizer,
            prompt,
            cached=cached,
            sampler=sampler,
            max_tokens=max_tokens,
            stop=[stop] if isinstance(stop, str) else stop,
        )

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


class Conversation:
    """Turns of a chat. The KV cache keeps what the rendered messages have in common from turn to turn."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._reply: Generation | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages so far; a reply counts with what it has so far."""
        reply = [{"role": "assistant", "content": self._reply.result.text.strip()}] if self._reply else []
        return self._system + self._turns + reply

    def send(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingKeywords],
    ) -> Generation:
        """Say something; the reply, still to be iterated. After an error the conversation is as it was before."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._model.encode_chat(messages)
        self._reply = self._model._start(prompt, max_tokens, stop, sampling, reuse_cache=True)
        self._turns = messages[len(self._system) :]
        return self._reply

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns, self._reply = [], None


def _exhaust(generation: Generation, on_token: Callable[[Piece], None] | None) -> GenerationResult:
    for piece in generation:
        if on_token is not None:
            on_token(piece)
    return generation.result


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
