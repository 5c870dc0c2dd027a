"""Learnable Direct Partitioning with learnable clipping (RCP, arXiv 2502.15779, section 3.3). Reconstructed.

The paper's repository holds no code; this follows its equations as far as they are given. Per group of weights:
clip range lo = σ(β)·min(W, 0), hi = σ(γ)·max(W, 0); partition Δ1 = σ(s1)σ(s2), Δ2 = σ(s1)(1 − σ(s2)), Δ3 = 1 − σ(s1);
a weight falls into one of four parts of the range, with thresholds at Δ1/2, Δ1 + Δ2/2 and Δ1 + Δ2 + Δ3/2 of it.
`ldp` reads it back as lo + (hi − lo)·{0, Δ1, Δ1 + Δ2, 1}, non-uniform dequantization (NUDQ); `ldp-udq` as
lo + (hi − lo)·{0, ⅓, ⅔, 1}, uniform dequantization (UDQ). `lc` is the paper's ablation: a learned clip, equal steps,
nothing else.

Start: from the levels with the least squared error (Lloyd-Max), which is ours.
Knows nothing of layers. Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rcpconv.quantizers.base import SMALLEST_SPAN, WeightQuantizer, channel_weights, extremes, to_groups
from rcpconv.quantizers.levels import EvenLevels, NearestLevel, fit_even_levels, lloyd_max
from rcpformat import spec

RATIO_LIMITS = (0.02, 0.998)
"""Clip and partition ratios are kept inside at the start: outside, a sigmoid has next to no gradient."""
SMALLEST_PART = 1e-6
"""Of the clip range: a part that UDQ divides by is no smaller."""
EVEN_S1 = math.log(2)
"""With s2 = 0, the partition into equal steps."""


def logit(ratio: Tensor) -> Tensor:
    """Inverse of the sigmoid, float32, of a ratio that is kept in RATIO_LIMITS."""
    return torch.logit(ratio.clamp(*RATIO_LIMITS)).float()


class ClipRange(WeightQuantizer):
    """Clips (β, γ) of every group, as float32 parameters of shape (N, G)."""

    start_low: Tensor
    start_high: Tensor

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__(rows, columns, group_size)
        shape = (rows, spec.ceil_div(columns, group_size))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.gamma = nn.Parameter(torch.zeros(shape))

    def clip_range(self, grouped_NGg: Tensor) -> tuple[Tensor, Tensor]:
        """(N, G) each: lo, and hi - lo."""
        if self.learning.fixed_range:
            low, high = self.start_low, self.start_high
        else:
            low, high = extremes(grouped_NGg.detach())
        lo, hi = torch.sigmoid(self.beta) * low, torch.sigmoid(self.gamma) * high
        return lo, (hi - lo).clamp(min=SMALLEST_SPAN)

    def start_clip(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> tuple[Tensor, Tensor]:
        """Set the clips to the outer levels, kept on either side of zero. (N, G) each: lo, and hi - lo, as wanted."""
        low, high = extremes(grouped_NGg)
        if self.learning.fixed_range:
            self.register_buffer("start_low", low)
            self.register_buffer("start_high", high)
        lo, hi = levels_NG4[..., 0].clamp(max=0), levels_NG4[..., 3].clamp(min=0)
        self.beta.copy_(logit(lo / low.clamp(max=-SMALLEST_SPAN)))
        self.gamma.copy_(logit(hi / high.clamp(min=SMALLEST_SPAN)))
        return lo, (hi - lo).clamp(min=SMALLEST_SPAN)

    def hold(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> None:
        """See WeightQuantizer."""
        self.start_clip(grouped_NGg, levels_NG4)


class LearnedClipQuantizer(ClipRange, EvenLevels):
    """`lc`: levels lo + (hi − lo)·{0, ⅓, ⅔, 1}. Gradients: see EvenLevels."""

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Start from the evenly spaced levels with the least squared error."""
        grouped = to_groups(weight_NK.float(), self.group_size)
        counts = channel_weights(weight_NK.shape[1], self.group_size, importance_K, weight_NK.device)
        self.start_clip(grouped, fit_even_levels(grouped, counts))

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        lo, span = self.clip_range(grouped_NGg)
        return torch.stack([lo, lo + span / 3, lo + span * (2 / 3), lo + span], dim=-1)


class PartitionedRange(ClipRange):
    """Clips, and partition (s1, s2) of every group, as float32 parameters of shape (N, G); equal parts at first."""

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__(rows, columns, group_size)
        self.s1 = nn.Parameter(torch.full_like(self.beta, EVEN_S1))
        self.s2 = nn.Parameter(torch.zeros_like(self.beta))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Δ1, Δ2, Δ3, (N, G) each."""
        outer, inner = torch.sigmoid(self.s1), torch.sigmoid(self.s2)
        return outer * inner, outer * (1 - inner), 1 - outer


class LDPQuantizer(PartitionedRange, NearestLevel):
    """`ldp`, with non-uniform dequantization: thresholds half-way between the levels. Gradients: see NearestLevel."""

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Start from the Lloyd-Max levels of each group; the outer ones are kept on either side of zero."""
        grouped = to_groups(weight_NK.float(), self.group_size)
        counts = channel_weights(weight_NK.shape[1], self.group_size, importance_K, weight_NK.device)
        levels = lloyd_max(grouped, counts)
        lo, span = self.start_clip(grouped, levels)
        first = ((levels[..., 1] - lo) / span).clamp(0, 1)
        second = ((levels[..., 2] - levels[..., 1]) / span).clamp(0, 1)
        self.s1.copy_(logit(first + second))
        self.s2.copy_(logit(first / (first + second).clamp(min=1e-6)))

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        lo, span = self.clip_range(grouped_NGg)
        first, second, _ = self.parts()
        return torch.stack([lo, lo + span * first, lo + span * (first + second), lo + span], dim=-1)


class LDPUniformQuantizer(PartitionedRange, LearnedClipQuantizer):
    """`ldp-udq`, with uniform dequantization: the partition decides where a weight goes, the levels have equal steps.

    Three ramps over Δ1, Δ2, Δ3 add up to a weight's position, so that rounding it gives the thresholds above. Gradients
    are those of the ramps (the generalized straight-through estimator of N2UQ, arXiv 2111.14826): the partition learns
    through them alone. Starts as `lc` does, with equal parts.
    """

    def position(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
        """See EvenLevels."""
        lo = levels_NG4[..., :1]
        share_NGg = (grouped_NGg - lo) / (levels_NG4[..., 3:] - lo)
        position_NGg, start_NG1 = torch.zeros_like(share_NGg), torch.zeros_like(lo)
        for part in self.parts():
            width_NG1 = part[..., None].clamp(min=SMALLEST_PART)
            position_NGg = position_NGg + ((share_NGg - start_NG1) / width_NG1).clamp(0, 1)
            start_NG1 = start_NG1 + width_NG1
        return position_NGg
