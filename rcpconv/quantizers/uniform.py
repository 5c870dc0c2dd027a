"""Asymmetric min-max levels with an integer zero point: BitDistiller's (arXiv 2402.10631, section 3.1), and plain RTN.

Per group: step s = (max W − min W) / 3, zero point z = clip(−round(min W / s), 0, 3), levels s·(k − z) for k = 0..3,
Ŵ = s·(clip(round(W / s) + z, 0, 3) − z). Nothing is learned but the weights: every forward pass takes s and z from
them, and gradients follow the formula with both roundings taken for the identity, through min and max too.

`uniform`: as BitDistiller, the weights are first clipped, where that lowers their error. Reconstructed: the search
minimises the (importance-weighted) squared error of weights over the paper's grid, not that of layer outputs.
`rtn`: no clipping and no training. Departure in both: min and max are kept on either side of zero, since the zero point
cannot follow a group that lies on one side.

The levels of a row's largest group are mostly −2, −1, 0, 1 or −1, 0, 1, 2 times its step, and half of 127 lies between
two integers, so the scale is _UNEVEN larger than the largest level asks for. Otherwise how a device rounds a quotient
would decide that group's levels, and compiled layers would train with others than the file has.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rcpconv.quantizers.base import (
    SMALLEST_SPAN,
    channel_weights,
    extremes,
    from_groups,
    row_scale,
    to_groups,
    widened,
)
from rcpconv.quantizers.functional import round_ste
from rcpconv.quantizers.levels import LAST, EvenLevels

CLIP_GRID = tuple(1 - i / 20 for i in range(11))
"""Shares of minimum and of maximum that the clip search tries, each with each."""
_UNEVEN = 2.0**-10
"""With it, a third, half and two thirds of the largest level are all at least 0.06 from where rounding changes."""


def min_max_levels(low_NG: Tensor, high_NG: Tensor) -> Tensor:
    """(N, G, 4) levels of a range with low ≤ 0 ≤ high."""
    step_NG1 = ((high_NG - low_NG).clamp(min=SMALLEST_SPAN) / LAST)[..., None]
    zero_NG1 = (-round_ste(low_NG[..., None] / step_NG1)).clamp(0, LAST)
    return step_NG1 * (torch.arange(LAST + 1, device=low_NG.device) - zero_NG1)


def rounded_finely(weight_NK: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Round to the nearest of 2**bits even levels between each group's extremes: what no file holds, for training.

    As WeightQuantizer.forward: integer-valued weights (N, K), whose gradient passes straight through, and the row scale
    (N,), which the levels are rounded to multiples of.
    """
    weight_NK = widened(weight_NK)
    with torch.no_grad():
        grouped_NGg = to_groups(weight_NK, group_size)
        low_NG, high_NG = extremes(grouped_NGg)
        step_NG1 = ((high_NG - low_NG).clamp(min=SMALLEST_SPAN) / (2**bits - 1))[..., None]
        level_NGg = low_NG[..., None] + step_NG1 * ((grouped_NGg - low_NG[..., None]) / step_NG1).round()
        scale_N = row_scale(level_NGg)
        level_NK = from_groups(level_NGg, weight_NK.shape[1])
    return round_ste((weight_NK + (level_NK - weight_NK).detach()) / scale_N[:, None]), scale_N


class RoundToNearestQuantizer(EvenLevels):
    """`rtn`: levels from each group's minimum and maximum."""

    REACH = 0.5

    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """There is nothing to set."""

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        return min_max_levels(*extremes(grouped_NGg))

    def scale(self, levels_NG4: Tensor) -> Tensor:
        """See WeightQuantizer."""
        return super().scale(levels_NG4) * (1 + _UNEVEN)


class BitDistillerQuantizer(RoundToNearestQuantizer):
    """`uniform`: the same, of weights that were clipped before training."""

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Clip the weight in place, each group to the shares of its minimum and maximum with the least error."""
        grouped = to_groups(weight_NK, self.group_size)
        counts = channel_weights(weight_NK.shape[1], self.group_size, importance_K, weight_NK.device)
        low, high = extremes(grouped)
        best_low, best_high, least = low, high, torch.full_like(low, torch.inf)
        for share_low, share_high in itertools.product(CLIP_GRID, CLIP_GRID):
            levels = min_max_levels(share_low * low, share_high * high)
            found = torch.gather(levels, 2, self.codes(grouped, levels).long())
            error = ((found - grouped) ** 2 * counts).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best_low = torch.where(better, share_low * low, best_low)
            best_high = torch.where(better, share_high * high, best_high)
        clipped = grouped.clamp(best_low[..., None], best_high[..., None])
        weight_NK.copy_(from_groups(clipped, weight_NK.shape[1]))
