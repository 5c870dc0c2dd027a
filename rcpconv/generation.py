"""What models write when left to themselves: how much of it is repetition, and how far a model follows its teacher.

Prompts are cut from a text at even distances. Tokens that end a text are never chosen, so that all continuations are of
one length. Knows nothing of runs, files or tables.

Shape suffixes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rcpconv.cached import CachedDecoder, draw, largest_batch
from rcpconv.errors import EvaluationFailed
from rcpconv.model import Decoder
from rcpformat.architecture import TokenizerInfo

PROMPT_TOKENS = 32
TEMPERATURE = 0.8
"""Of sampled continuations."""
LARGEST_N = 4
GREEDY, SAMPLED, TEXT = "greedy", "sampled", "text itself"
COLLAPSE = 0.1
"""A model has collapsed where its rate of repetition is above the original's by more than this: 10 percentage points.

Over 64 prompts, whose rates differ by about 0.3 in greedy text, this is two standard errors of the difference.
"""
_SEED = 0


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of distinct ones among the n-grams of a text (Li et al., arXiv 1510.03055); 1 where it has none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Length of the longest span that stands in a text twice; the two may overlap."""
    found, beyond = 0, len(tokens)  # a span of every length up to `found` is repeated, of `beyond` none
    while beyond - found > 1:
        length = (found + beyond) // 2
        if distinct(tokens, length) < 1:
            found = length
        else:
            beyond = length
    return found


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """How repetitive texts are: means over the texts."""

    distinct: list[float]
    """distinct-1 to distinct-4."""
    rate: float
    """Share of the 4-grams that came before: 1 − distinct-4 (seq-rep-4 of Welleck et al., arXiv 1908.04319)."""
    longest_repeat: float
    """Tokens."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Repetition:
        """Of at least one text, as token ids."""
        shares = [statistics.fmean(distinct(text, n) for text in texts) for n in range(1, LARGEST_N + 1)]
        longest = statistics.fmean(longest_repeat(text) for text in texts)
        return cls(distinct=shares, rate=1 - shares[-1], longest_repeat=longest)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A model's continuations, in the order of the prompts."""

    greedy: list[list[int]]
    sampled: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and how to continue them."""

    prompts: list[list[int]]
    """All of one length, with BOS where the tokenizer adds one."""
    continuations: list[list[int]]
    """How the text itself goes on."""
    never: tuple[int, ...]
    """Tokens that are not to be chosen."""

    @classmethod
    def cut(cls, text: Sequence[int], info: TokenizerInfo, *, count: int, tokens: int, context: int) -> Task:
        """`count` prompts at even distances in a tokenized text, each to be continued by `tokens` tokens.

        Raises EvaluationFailed where text or context is too short.
        """
        begin = [info.bos_id] if info.add_bos and info.bos_id is not None else []
        length = PROMPT_TOKENS + tokens
        if len(begin) + length > context:
            raise EvaluationFailed(
                f"generation_tokens: expected at most {context - len(begin) - PROMPT_TOKENS}, which fill the model's "
                f"context of {context} after a prompt of {PROMPT_TOKENS}; found {tokens}"
            )
        if len(text) < length + count - 1:
            raise EvaluationFailed(
                f"generations: expected a text of at least {length + count - 1} tokens to take {count} prompts from, "
                f"found {len(text)}; name a longer one, or ask for fewer or shorter generations"
            )
        starts = [i * (len(text) - length) // max(1, count - 1) for i in range(count)]
        return cls(
            prompts=[begin + list(text[start : start + PROMPT_TOKENS]) for start in starts],
            continuations=[list(text[start + PROMPT_TOKENS : start + length]) for start in starts],
            never=info.eos_ids,
        )

    def generations(self, results: Sequence[GenerationResult], reference: str) -> Generations:
        """Results of models on this task, judged against `reference`; before them how the text itself goes on."""
        itself = GenerationResult(name=TEXT, decoding="", repetition=Repetition.of(self.continuations))
        return Generations(
            prompts=len(self.prompts),
            prompt_tokens=PROMPT_TOKENS,
            tokens=self.tokens,
            temperature=TEMPERATURE,
            results=[itself, *results],
            verdict=verdict(results, reference),
        )

    @property
    def tokens(self) -> int:
        """Length of a continuation."""
        return len(self.continuations[0])

    def write(self, decoder: Decoder) -> Written:
        """Continue every prompt, by the likeliest tokens and by chance at TEMPERATURE; the same every time."""
        return Written(greedy=self._continue(decoder, 0), sampled=self._continue(decoder, TEMPERATURE))

    @torch.inference_mode()
    def _continue(self, decoder: Decoder, temperature: float) -> list[list[int]]:
        device = decoder.inv_freq.device
        generator = torch.Generator(device).manual_seed(_SEED)
        given = len(self.prompts[0])
        length = given + self.tokens
        done: list[list[int]] = []
        for prompts_BT in torch.tensor(self.prompts, device=device).split(largest_batch(decoder, length)):
            cached = CachedDecoder(decoder, len(prompts_BT), length)
            texts_BT = torch.cat([prompts_BT, prompts_BT.new_empty(len(prompts_BT), self.tokens)], dim=1)
            for t in range(length - 1):
                logits_BV = self._allowed(cached.step(texts_BT[:, t]))
                if t + 1 >= given:
                    sampled = temperature > 0
                    texts_BT[:, t + 1] = draw(logits_BV / temperature, generator) if sampled else logits_BV.argmax(-1)
            done += texts_BT[:, given:].tolist()
        return done

    @torch.inference_mode()
    def agreement(self, decoder: Decoder, greedy: Sequence[Sequence[int]]) -> float:
        """Share of positions in a teacher's own greedy continuations at which the decoder finds the same token."""
        same = 0
        for prompt, continuation in zip(self.prompts, greedy, strict=True):
            tokens = torch.tensor([*prompt, *continuation], device=decoder.inv_freq.device)
            hidden = decoder.hidden(tokens[None, :-1])[0, len(prompt) - 1 :]
            found = self._allowed(decoder.logits(hidden)).argmax(-1)
            same += int((found == tokens[len(prompt) :]).sum())
        return same / (len(self.prompts) * self.tokens)

    def _allowed(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(self.never, dtype=torch.long, device=logits.device), -torch.inf)


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one model wrote in one way, or how the text itself goes on."""

    name: str
    decoding: str
    """GREEDY, SAMPLED, or nothing for the text itself."""
    repetition: Repetition
    teacher_agreement: float | None = None
    """Share of the teacher's own greedy continuations that the model would choose too; for GREEDY only."""


def verdict(results: Sequence[GenerationResult], reference: str) -> str:
    """Which models collapsed into repetition, decoding by decoding, against the model named `reference`."""
    original = {result.decoding: result.repetition.rate for result in results if result.name == reference}
    judged = [result for result in results if result.decoding in original and result.name != reference]
    if not judged:
        return f"not judged: collapse is repetition above that of {reference}, measured along with another model"
    criterion = f"repetition more than {100 * COLLAPSE:.0f} percentage points above that of {reference}"
    found = [
        f"{result.name}, {result.decoding} ({result.repetition.rate:.1%} against {original[result.decoding]:.1%})"
        for result in judged
        if result.repetition.rate > original[result.decoding] + COLLAPSE
    ]
    return f"collapsed ({criterion}): {'; '.join(found)}" if found else f"no collapse ({criterion})"


@dataclass(frozen=True, kw_only=True)
class Generations:
    """Everything measured on one task."""

    prompts: int
    prompt_tokens: int
    tokens: int
    temperature: float
    results: list[GenerationResult]
    verdict: str
    """See `verdict`."""


def measured(name: str, written: Written, teacher_agreement: float | None = None) -> list[GenerationResult]:
    """A result for each way that a model wrote in."""
    return [
        GenerationResult(
            name=name, decoding=GREEDY, repetition=Repetition.of(written.greedy), teacher_agreement=teacher_agreement
        ),
        GenerationResult(name=name, decoding=SAMPLED, repetition=Repetition.of(written.sampled)),
    ]
