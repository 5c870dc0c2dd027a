"""Learnable Direct Partitioning with learnable clipping (RCP, arXiv 2502.15779, section 3.3). Reconstructed.

The paper's code is not public; this follows its equations as far as they are given. Per group of weights:
clip range lo = σ(β)·min(W, 0), hi = σ(γ)·max(W, 0); partition Δ1 = σ(s1)σ(s2), Δ2 = σ(s1)(1 − σ(s2)), Δ3 = 1 − σ(s1);
levels lo + (hi − lo)·{0, Δ1, Δ1 + Δ2, 1}; a weight takes the nearest level (thresholds half-way between neighbours).
Gradients: straight through for the steps inside the clip range, exact for the levels.

Knows nothing of layers. Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rcpconv.quantizers.base import WeightCodes, WeightQuantizer, from_groups, group_mask, row_scale, to_groups
from rcpconv.quantizers.functional import round_ste
from rcpformat import spec

SMALLEST_SPAN = 1e-8
"""hi - lo never falls below this, so that constant and zero groups have a partition too."""
RATIO_LIMITS = (0.02, 0.998)
"""Clip and partition ratios are kept inside at the start: outside, a sigmoid has next to no gradient."""
LLOYD_MAX_STEPS = 25
GAUSSIAN_LEVELS = (-1.510, -0.4528, 0.4528, 1.510)
"""Lloyd-Max levels of a unit Gaussian for 2 bits (Max, 1960)."""

_CODE_BITS = 3
_INSIDE = 4


class _SelectLevels(torch.autograd.Function):
    """out = levels[code], with code the partition that the weight falls in.

    Gradients: for the levels exact (each gets the sum over its weights); for the weight straight through where it
    lies in [lo, hi], divided by the row scale, since the output is in units of it.
    """

    @staticmethod
    def forward(ctx: Any, weight_NGg: Tensor, levels_NG4: Tensor, real_NG4: Tensor, scale_N: Tensor) -> Tensor:
        code = assign(weight_NGg, real_NG4)
        inside = (weight_NGg >= real_NG4[..., :1]) & (weight_NGg <= real_NG4[..., 3:])
        ctx.save_for_backward(code + inside.to(torch.uint8) * _INSIDE, scale_N)
        return torch.gather(levels_NG4, 2, code.long())

    @staticmethod
    def backward(ctx: Any, grad_NGg: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale_N = ctx.saved_tensors
        code = packed & _CODE_BITS
        grad_weight = torch.where(packed >= _INSIDE, grad_NGg, 0.0) / scale_N[:, None, None]
        grad_levels = torch.stack([torch.where(code == c, grad_NGg, 0.0).sum(-1) for c in range(4)], dim=-1)
        return grad_weight, grad_levels, None, None


def assign(weight_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
    """The code (uint8) of the level nearest to each weight; the lower one at a tie. levels: float, not decreasing."""
    middle_NG3 = (levels_NG4[..., 1:] + levels_NG4[..., :-1]) * 0.5
    code = (weight_NGg > middle_NG3[..., 0:1]).to(torch.uint8)
    code += weight_NGg > middle_NG3[..., 1:2]
    code += weight_NGg > middle_NG3[..., 2:3]
    return code


def lloyd_max(weight_NGg: Tensor, mask_Gg: Tensor, importance_Gg: Tensor | None = None) -> Tensor:
    """Levels (N, G, 4) that minimise the (importance-weighted) squared error of each group, by Lloyd's iteration.

    importance: weight of each input channel, such as the diagonal of the input second moment; None = all equal.
    """
    counts = mask_Gg.to(weight_NGg.dtype)
    if importance_Gg is not None:
        counts = counts * importance_Gg
    total = counts.sum(-1, keepdim=True).clamp(min=1e-30)
    mean = (weight_NGg * counts).sum(-1, keepdim=True) / total
    deviation = (((weight_NGg - mean) ** 2 * counts).sum(-1, keepdim=True) / total).sqrt()
    levels = mean + deviation * torch.tensor(GAUSSIAN_LEVELS, dtype=weight_NGg.dtype, device=weight_NGg.device)
    for _ in range(LLOYD_MAX_STEPS):
        code = assign(weight_NGg, levels)
        for c in range(4):
            chosen = torch.where(code == c, counts, 0.0)
            mass = chosen.sum(-1)
            centre = (weight_NGg * chosen).sum(-1) / mass.clamp(min=1e-30)
            levels[..., c] = torch.where(mass > 0, centre, levels[..., c])
        levels = levels.sort(dim=-1).values
    return levels


def _logit(ratio: Tensor) -> Tensor:
    return torch.logit(ratio.clamp(*RATIO_LIMITS)).float()


class LDPQuantizer(WeightQuantizer):
    """Clip (β, γ) and partition (s1, s2) of every group, as float32 parameters of shape (N, G)."""

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__()
        shape = (rows, spec.ceil_div(columns, group_size))
        self.group_size = group_size
        self.beta = nn.Parameter(torch.zeros(shape))
        self.gamma = nn.Parameter(torch.zeros(shape))
        self.s1 = nn.Parameter(torch.full(shape, 0.6931472))
        self.s2 = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Start from the Lloyd-Max levels of each group; the outer ones are kept on either side of zero."""
        grouped = to_groups(weight_NK.float(), self.group_size)
        mask = group_mask(weight_NK.shape[1], self.group_size, weight_NK.device)
        importance = None if importance_K is None else to_groups(importance_K.float()[None], self.group_size)[0]
        levels = lloyd_max(grouped, mask, importance)
        low, high = self._extremes(grouped)
        lo, hi = levels[..., 0].clamp(max=0), levels[..., 3].clamp(min=0)
        self.beta.copy_(_logit(lo / low.clamp(max=-SMALLEST_SPAN)))
        self.gamma.copy_(_logit(hi / high.clamp(min=SMALLEST_SPAN)))
        span = (hi - lo).clamp(min=SMALLEST_SPAN)
        first = ((levels[..., 1] - lo) / span).clamp(0, 1)
        second = ((levels[..., 2] - levels[..., 1]) / span).clamp(0, 1)
        self.s1.copy_(_logit(first + second))
        self.s2.copy_(_logit(first / (first + second).clamp(min=1e-6)))

    @staticmethod
    def _extremes(grouped_NGg: Tensor) -> tuple[Tensor, Tensor]:
        return grouped_NGg.amin(-1).clamp(max=0), grouped_NGg.amax(-1).clamp(min=0)

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """(N, G, 4) float levels before rounding, not decreasing."""
        low, high = self._extremes(grouped_NGg.detach())
        lo, hi = torch.sigmoid(self.beta) * low, torch.sigmoid(self.gamma) * high
        span = (hi - lo).clamp(min=SMALLEST_SPAN)
        outer, inner = torch.sigmoid(self.s1), torch.sigmoid(self.s2)
        return torch.stack([lo, lo + span * (outer * inner), lo + span * outer, lo + span], dim=-1)

    def _rounded(self, grouped_NGg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        real_NG4 = self.levels(grouped_NGg)
        scale_N = row_scale(real_NG4)
        rounded = round_ste(real_NG4 / scale_N[:, None, None]).clamp(-spec.LEVEL_LIMIT, spec.LEVEL_LIMIT)
        return rounded, real_NG4, scale_N

    def forward(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """See WeightQuantizer.forward."""
        grouped = to_groups(weight_NK, self.group_size)
        rounded, real_NG4, scale_N = self._rounded(grouped)
        integers: Tensor = _SelectLevels.apply(grouped, rounded, real_NG4.detach(), scale_N)  # type: ignore[no-untyped-call]
        return from_groups(integers, weight_NK.shape[1]), scale_N

    @torch.no_grad()
    def bake(self, weight_NK: Tensor) -> WeightCodes:
        """See WeightQuantizer.bake."""
        grouped = to_groups(weight_NK, self.group_size)
        rounded, real_NG4, scale_N = self._rounded(grouped)
        return WeightCodes(
            codes_NK=from_groups(assign(grouped, real_NG4), weight_NK.shape[1]).contiguous(),
            levels_NG4=rounded.to(torch.int8),
            scale_N=scale_N,
            group_size=self.group_size,
        )
