"""How good a quantized model is on windows of tokens: perplexity, and how far its predictions are from the teacher's.

Several windows at a time, unlike rcpconv.evaluate: a comparison measures often. Knows nothing of runs or texts.

Shape suffixes: W windows, T positions, M scored positions, C hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpconv.model import Decoder

_BATCH_TOKENS = 1 << 14
_LOGIT_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Score:
    """Means over all scored positions: all but the first of each window."""

    perplexity: float
    tokens: int
    kl: float | None = None
    """KL(teacher ‖ model), nats a token."""
    top1: float | None = None
    """Share of positions at which teacher and model find the same token likeliest."""

    @property
    def finite(self) -> bool:
        """Whether there is anything to compare."""
        return math.isfinite(self.perplexity)


@contextmanager
def _exactly(decoder: Decoder) -> Iterator[None]:
    """Within, the decoder computes as it is evaluated: in float32, not compiled, and every layer once."""
    options = decoder.options
    before = options.half
    options.half = False
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        options.half = before


def score(decoder: Decoder, windows: Sequence[Sequence[int]], teacher: Decoder | None = None) -> Score:
    """Measure a decoder, in training or not, on the device that it is on. windows: all of one length.

    teacher: the original model in float32, on the same device; without one there is no KL and no agreement.
    """
    device = decoder.inv_freq.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, KL, agreement
    count = 0
    with _exactly(decoder):
        for tokens_WT in torch.tensor(windows, device=device).split(max(1, _BATCH_TOKENS // len(windows[0]))):
            target_M = tokens_WT[:, 1:].flatten()
            hidden_MC = _scored(decoder, tokens_WT)
            taught_MC = None if teacher is None else _scored(teacher, tokens_WT)
            rows = max(1, _LOGIT_ELEMENTS // decoder.architecture.vocab_size)
            for part in (slice(start, start + rows) for start in range(0, len(target_M), rows)):
                logits_MV = decoder.logits(hidden_MC[part])
                sums[0] += F.cross_entropy(logits_MV, target_M[part], reduction="none").double().sum()
                if teacher is not None and taught_MC is not None:
                    sums[1:] += _differences(teacher.logits(taught_MC[part]), logits_MV)
            count += len(target_M)
    cross_entropy, kl, same = (sums / count).tolist()
    perplexity = math.exp(cross_entropy) if cross_entropy < 700 else math.inf
    if teacher is None:
        return Score(perplexity=perplexity, tokens=count)
    return Score(perplexity=perplexity, tokens=count, kl=kl, top1=same)


def _scored(decoder: Decoder, tokens_WT: Tensor) -> Tensor:
    """(M, C): what the head takes, at all positions but the last."""
    return decoder.hidden(tokens_WT)[:, :-1].flatten(0, 1)


def _differences(teacher_MV: Tensor, model_MV: Tensor) -> Tensor:
    """(2,) float64 sums: KL(teacher ‖ model), and where both find the same token likeliest."""
    log_p, log_q = F.log_softmax(teacher_MV, dim=-1), F.log_softmax(model_MV, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum()
    return torch.stack([kl, (teacher_MV.argmax(-1) == model_MV.argmax(-1)).double().sum()])
