"""Self-distillation losses with their gradients, a chunk of tokens at a time. Knows nothing of optimizers or texts.

KL is KL(teacher ‖ student). CAKLD (BitDistiller, arXiv 2402.10631) is β·KL(S ‖ T) + (1 − β)·KL(T ‖ S), with β the
teacher's mean top probability. Beside either, residual streams may be matched. Gradients by the student's logits are
written out, so that only a few (M, V) float32 arrays exist at a time, whatever the batch.

Shape suffixes: B sequences, T positions, M tokens of a chunk, C hidden_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpconv.hadamard import hadamard_transform
from rcpconv.layers import QuantTable
from rcpconv.model import Decoder

UNKNOWN = -100
"""Target of a token whose successor is not in the batch."""

CPU_CHUNK, CUDA_CHUNK = 1 << 20, 1 << 27
"""Logits in memory at a time."""
LOW_MEMORY_SHARE = 8
"""By so much fewer with low_memory."""
LEAST_ROWS = 512
"""Tokens in memory at a time on CUDA, at least: the head's table is read, and its gradient added to, for each chunk."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Which loss. beta: CAKLD's weight of KL(S ‖ T); mix_share: the cross-entropy's weight in "mix"; in 0..1.

    teacher_temperature: of the teacher's predictions alone; above 1, the student learns less sure ones.
    """

    kind: str
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    beta: float = 0.5
    mix_share: float = 0.5

    def __call__(self, student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL(T ‖ S), gradient (M, V) of the loss by the student's logits); the first two summed over tokens.

        KL terms are between the softened distributions, times temperature² (Hinton et al., arXiv 1503.02531).
        target: ids of the next tokens or UNKNOWN, for "mix" alone.
        """
        t = self.temperature
        log_s = F.log_softmax(student_MV / t, dim=-1)
        log_t = F.log_softmax(teacher_MV / (t * self.teacher_temperature), dim=-1)
        p_s, p_t = log_s.exp(), log_t.exp()
        ratio = log_s.sub_(log_t)
        kl = -(p_t * ratio).sum() * t**2
        if self.kind == "cakld":
            reverse_M1 = (p_s * ratio).sum(dim=-1, keepdim=True)
            loss = self.beta * t**2 * reverse_M1.sum() + (1 - self.beta) * kl
            weight = ratio.sub_(reverse_M1).mul_(self.beta).add_(1 - self.beta)
            return loss, kl, p_s.mul_(weight).sub_(p_t, alpha=1 - self.beta).mul_(t)
        gradient = (p_s - p_t).mul_(t)
        if self.kind == "kl":
            return kl, kl, gradient
        assert self.kind == "mix", self.kind
        cross, cross_gradient = cross_entropy(student_MV, target_M)
        return torch.lerp(kl, cross, self.mix_share), kl, torch.lerp(gradient, cross_gradient, self.mix_share)


def cross_entropy(logits_MV: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the tokens with a known target, and its gradient (M, V)."""
    known_M1 = (target_M != UNKNOWN)[:, None]
    label_M1 = torch.where(known_M1, target_M[:, None], 0)
    log_q = F.log_softmax(logits_MV, dim=-1)
    loss = -torch.where(known_M1, log_q.gather(1, label_M1), 0.0).sum()
    gradient = log_q.exp().scatter_add(1, label_M1, logits_MV.new_full(label_M1.shape, -1.0))
    return loss, gradient * known_M1


def chunk_logits(device_type: str, vocab_size: int, low_memory: bool = False) -> int:
    """How many logits are in memory at a time, of each of the two models."""
    if device_type != "cuda":
        return CPU_CHUNK
    return max(CUDA_CHUNK // LOW_MEMORY_SHARE if low_memory else CUDA_CHUNK, LEAST_ROWS * vocab_size)


def chunk_rows(count: int, vocab_size: int, device: torch.device, low_memory: bool = False) -> int:
    """How many of so many tokens' logits are computed at a time: chunks of one size, where that divides them."""
    most = max(1, chunk_logits(device.type, vocab_size, low_memory) // vocab_size)
    return math.ceil(count / math.ceil(count / most))


Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How far the student's residual stream is from the teacher's, as a second loss."""

    weight: float
    signs: Tensor | None
    """Of R1 (C,), which turned the student's stream; None where it is not turned."""
    learned_CC: Tensor | None = None
    """What turned it after that, if anything did."""

    @torch.no_grad()
    def turned(self, stream_BTC: Tensor) -> Tensor:
        """The teacher's stream as the student's should be."""
        if self.signs is not None:
            stream_BTC = hadamard_transform(self.signs * stream_BTC, normalized=True)
        return stream_BTC if self.learned_CC is None else stream_BTC @ self.learned_CC

    def __call__(self, student: list[Tensor], taught: list[Tensor]) -> Tensor:
        """`weight` times the squared distance as a share of the teacher's square, a mean over tokens and layers."""
        shares = [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in zip(student, taught, strict=True)]
        return self.weight * torch.stack(shares).mean()


def distill(
    student: Decoder,
    teacher: Decoder,
    tokens_BT: Tensor,
    loss: Loss,
    weight: float,
    matching: Matching | None = None,
    low_memory: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run both models on a batch and add `weight` times the mean loss's gradient to the student's parameters.

    The head runs chunk by chunk, forward and backward, on its quantized table, which is made once. Returns the batch's
    mean loss and mean KL(T ‖ S), on the device. low_memory: fewer logits at a time.
    """
    if matching is None:
        with torch.no_grad():
            taught_MC = teacher.hidden(tokens_BT).flatten(0, 1)
        hidden_MC, distance = student.hidden(tokens_BT).flatten(0, 1), None
    else:
        with torch.no_grad():
            taught_BTC, taught = teacher.hidden_and_streams(tokens_BT)
            taught_MC, taught = taught_BTC.flatten(0, 1), list(map(matching.turned, taught))
        hidden_BTC, streams = student.hidden_and_streams(tokens_BT)
        hidden_MC, distance = hidden_BTC.flatten(0, 1), weight * matching(streams, taught)
    assert isinstance(student.head, QuantTable)
    table, scale = student.head.quantized()
    table_leaf = table.detach().requires_grad_()
    gradient_MC = torch.empty_like(hidden_MC)
    target_M = F.pad(tokens_BT[:, 1:], (0, 1), value=UNKNOWN).flatten()
    count = len(target_M)
    loss_sum = kl_sum = torch.zeros((), device=tokens_BT.device)
    rows = chunk_rows(count, student.architecture.vocab_size, tokens_BT.device, low_memory)
    for part in (slice(start, start + rows) for start in range(0, count, rows)):
        hidden_leaf = hidden_MC.detach()[part].requires_grad_()
        logits_MV = student.head(hidden_leaf, (table_leaf, scale))
        with torch.no_grad():
            part_loss, part_kl, gradient_MV = loss(logits_MV.detach(), teacher.logits(taught_MC[part]), target_M[part])
            loss_sum, kl_sum = loss_sum + part_loss, kl_sum + part_kl
            gradient_MV *= weight / count
        logits_MV.backward(gradient_MV)
        assert hidden_leaf.grad is not None
        gradient_MC[part] = hidden_leaf.grad
    if distance is None:
        torch.autograd.backward([hidden_MC, table], [gradient_MC, table_leaf.grad])
        return loss_sum / count, kl_sum / count
    torch.autograd.backward([hidden_MC, table, distance], [gradient_MC, table_leaf.grad, None])
    return loss_sum / count + distance.detach() / weight, kl_sum / count


@torch.no_grad()
def teacher_confidence(teacher: Decoder, batches: Iterable[Tensor]) -> float:
    """The mean probability that the teacher gives to its likeliest token: CAKLD's beta."""
    total, count = 0.0, 0
    for tokens_BT in batches:
        hidden_MC = teacher.hidden(tokens_BT).flatten(0, 1)
        rows = chunk_rows(len(hidden_MC), teacher.architecture.vocab_size, tokens_BT.device)
        for part_MC in hidden_MC.split(rows):
            total += float(teacher.logits(part_MC).softmax(dim=-1).amax(dim=-1).double().sum())
        count += tokens_BT.numel()
    return total / count
