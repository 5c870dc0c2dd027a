"""How a weight takes one of its group's four levels, and where the gradients go; levels that fit given weights best.

`NearestLevel` is for levels anywhere, `EvenLevels` for equal steps. Knows nothing of what the levels depend on.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group,
M groups of some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcpconv.quantizers.base import SMALLEST_SPAN, WeightQuantizer
from rcpformat import spec

LAST = spec.LEVELS_PER_GROUP - 1
"""The highest code, and the number of steps from the lowest level to the highest."""
GAUSSIAN_LEVELS = (-1.510, -0.4528, 0.4528, 1.510)
"""Lloyd-Max levels of a unit Gaussian for 2 bits (Max, 1960)."""
LLOYD_MAX_STEPS = 25
_BLOCK_WEIGHTS = 1 << 17
"""On a CPU, levels are sought for so many weights at a time, which stay in its cache."""

_CODE_BITS = 3
_INSIDE = 4


def sums_by_code(values_NGg: Tensor, code_NGg: Tensor) -> Tensor:
    """(N, G, 4): the sum of the values that go with each code."""
    return torch.stack([torch.where(code_NGg == c, values_NGg, 0.0).sum(-1) for c in range(4)], dim=-1)


def sums_by_place(values_NGg: Tensor, weight_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
    """(N, G, 4): the sum of the values, each shared by the two levels that its weight lies between, by nearness.

    A weight beyond the outer levels counts for none.
    """
    inside = (weight_NGg >= levels_NG4[..., :1]) & (weight_NGg <= levels_NG4[..., LAST:])
    sums, above = [], torch.where(inside, values_NGg, 0.0)
    for c in range(LAST):
        low_NG1, high_NG1 = levels_NG4[..., c : c + 1], levels_NG4[..., c + 1 : c + 2]
        share = ((weight_NGg - low_NG1) / (high_NG1 - low_NG1).clamp(min=SMALLEST_SPAN)).clamp(0, 1)
        further = torch.where(inside, values_NGg * share, 0.0)
        sums.append((above - further).sum(-1))
        above = further
    return torch.stack([*sums, above.sum(-1)], dim=-1)


class _SelectLevels(torch.autograd.Function):
    """out = rounded level[code], with code the level nearest to the weight.

    Gradients: for the levels exact (each gets the sum over its weights), or with `residual` those of rounding taken for
    the identity, as in LSQ (arXiv 1902.08153), for levels anywhere: a weight between two levels is their mean weighted
    by its place, and pulls each by as much less. For the weight straight through where it lies between the outer
    levels, or within `reach` steps of them, divided by the row scale, since the output is in units of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_NGg: Tensor,
        rounded_NG4: Tensor,
        levels_NG4: Tensor,
        scale_N: Tensor,
        reach: float,
        residual: bool,
    ) -> Tensor:
        code = assign(weight_NGg, levels_NG4)
        low_NG1, high_NG1 = levels_NG4[..., :1], levels_NG4[..., 3:]
        if reach:
            low_NG1 = low_NG1 - reach * (levels_NG4[..., 1:2] - low_NG1)
            high_NG1 = high_NG1 + reach * (high_NG1 - levels_NG4[..., 2:3])
        inside = (weight_NGg >= low_NG1) & (weight_NGg <= high_NG1)
        ctx.save_for_backward(
            code + inside.to(torch.uint8) * _INSIDE, scale_N, *((weight_NGg, levels_NG4) if residual else ())
        )
        return torch.gather(rounded_NG4, 2, code.long())

    @staticmethod
    def backward(ctx: Any, grad_NGg: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale_N, *saved = ctx.saved_tensors
        grad_weight = torch.where(packed >= _INSIDE, grad_NGg, 0.0) / scale_N[:, None, None]
        grad_levels = sums_by_code(grad_NGg, packed & _CODE_BITS)
        if saved:
            grad_levels = grad_levels - sums_by_place(grad_NGg, *saved)
        return grad_weight, grad_levels, None, None, None, None


def select_nearest(
    weight_NGg: Tensor,
    levels_NG4: Tensor,
    rounded_NG4: Tensor,
    scale_N: Tensor,
    reach: float = 0.0,
    residual: bool = False,
) -> Tensor:
    """(N, G, g): rounded_NG4 at the level that is nearest to each weight. Gradients: see _SelectLevels."""
    return _SelectLevels.apply(weight_NGg, rounded_NG4, levels_NG4.detach(), scale_N, reach, residual)  # type: ignore[no-untyped-call, no-any-return]


def assign(weight_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
    """The code (uint8) of the level nearest to each weight; the lower one at a tie. levels: float, not decreasing."""
    middle_NG3 = (levels_NG4[..., 1:] + levels_NG4[..., :-1]) * 0.5
    code = (weight_NGg > middle_NG3[..., 0:1]).to(torch.uint8)
    code += weight_NGg > middle_NG3[..., 1:2]
    code += weight_NGg > middle_NG3[..., 2:3]
    return code


class NearestLevel(WeightQuantizer):
    """Four levels anywhere; a weight takes the nearest.

    Gradients: exact for the levels, straight through for the weights between the outer two, and Learning.reach beyond.
    """

    def codes(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
        """See WeightQuantizer."""
        return assign(grouped_NGg, levels_NG4)

    def select(self, grouped_NGg: Tensor, levels_NG4: Tensor, rounded_NG4: Tensor, scale_N: Tensor) -> Tensor:
        """See WeightQuantizer."""
        how = self.learning
        return select_nearest(grouped_NGg, levels_NG4, rounded_NG4, scale_N, how.reach, how.residual_levels)


class _RoundPosition(torch.autograd.Function):
    """out = rounded level[round(position)]; the position's gradient passes the rounding straight, times the step."""

    @staticmethod
    def forward(ctx: Any, position_NGg: Tensor, rounded_NG4: Tensor, step_NG1: Tensor) -> Tensor:
        code = nearest_code(position_NGg)
        ctx.save_for_backward(code, step_NG1)
        return torch.gather(rounded_NG4, 2, code.long())

    @staticmethod
    def backward(ctx: Any, grad_NGg: Tensor) -> tuple[Tensor | None, ...]:
        code, step_NG1 = ctx.saved_tensors
        return grad_NGg * step_NG1, sums_by_code(grad_NGg, code), None


def nearest_code(position_NGg: Tensor) -> Tensor:
    """The code (uint8) nearest to a position in steps above the lowest level; the even one at a tie."""
    return position_NGg.round().clamp(0, LAST).to(torch.uint8)


def steps(levels_NG4: Tensor) -> tuple[Tensor, Tensor]:
    """(N, G, 1) each: the lowest of evenly spaced levels, and the step between neighbours."""
    low_NG1 = levels_NG4[..., :1]
    return low_NG1, (levels_NG4[..., LAST:] - low_NG1) / LAST


class EvenLevels(WeightQuantizer):
    """Four levels with equal steps; a weight is rounded to the nearest.

    Gradients: those of low + step · round((W - low) / step) with the rounding taken for the identity (LSQ, arXiv
    1902.08153), for the weight and for what low and step depend on.
    """

    REACH = 0.0
    """How far beyond the outer levels, in steps, a weight still has a gradient."""

    def position(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
        """(N, G, g): steps above the lowest level, differentiable; rounded, it is the code."""
        low_NG1, step_NG1 = steps(levels_NG4)
        return ((grouped_NGg - low_NG1) / step_NG1).clamp(-self.REACH, LAST + self.REACH)

    def codes(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
        """See WeightQuantizer."""
        return nearest_code(self.position(grouped_NGg, levels_NG4))

    def select(self, grouped_NGg: Tensor, levels_NG4: Tensor, rounded_NG4: Tensor, scale_N: Tensor) -> Tensor:
        """See WeightQuantizer."""
        position_NGg = self.position(grouped_NGg, levels_NG4)
        step_NG1 = steps(levels_NG4.detach())[1] / scale_N[:, None, None]
        return _RoundPosition.apply(position_NGg, rounded_NG4, step_NG1)  # type: ignore[no-untyped-call, no-any-return]


def _gaussian_levels(weight_NGg: Tensor, counts_Gg: Tensor) -> Tensor:
    """(N, G, 4): the best levels for a Gaussian with each group's mean and deviation."""
    total = counts_Gg.sum(-1, keepdim=True).clamp(min=1e-30)
    mean = (weight_NGg * counts_Gg).sum(-1, keepdim=True) / total
    deviation = (((weight_NGg - mean) ** 2 * counts_Gg).sum(-1, keepdim=True) / total).sqrt()
    return mean + deviation * torch.tensor(GAUSSIAN_LEVELS, dtype=weight_NGg.dtype, device=weight_NGg.device)


def lloyd_max(weight_NGg: Tensor, counts_Gg: Tensor) -> Tensor:
    """Levels (N, G, 4) that minimise the squared error of each group, by Lloyd's iteration.

    counts: how much each channel's error counts, as base.channel_weights gives it.
    """
    n = len(weight_NGg)
    rows = max(1, _BLOCK_WEIGHTS // counts_Gg.numel()) if weight_NGg.device.type == "cpu" else n
    return torch.cat([_lloyd_max(block_NGg, counts_Gg) for block_NGg in weight_NGg.split(rows)])


def _masks(weight_Mg: Tensor, levels_M4: Tensor) -> tuple[Tensor, ...]:
    """Which weights take each of the levels, as `assign` has it; the middles between levels do not decrease."""
    middle_M3 = (levels_M4[..., 1:] + levels_M4[..., :-1]) * 0.5
    first, second, third = (weight_Mg > middle_M3[..., c : c + 1] for c in range(LAST))
    return ~first, first ^ second, second ^ third, third


def _masked_sums(values_Mg: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """As sums_by_code, and faster."""
    return torch.stack([(values_Mg * mask_Mg).sum(-1) for mask_Mg in masks], dim=-1)


def _lloyd_max(weight_NGg: Tensor, counts_Gg: Tensor) -> Tensor:
    """A group whose levels did not move will not move: M of them are left, after a few steps a handful."""
    levels_NG4 = _gaussian_levels(weight_NGg, counts_Gg)
    weight, levels = weight_NGg.flatten(0, 1), levels_NG4.flatten(0, 1)
    moving_M = torch.arange(len(levels), device=levels.device)
    for _ in range(LLOYD_MAX_STEPS):
        weight_Mg, counts_Mg, before_M4 = weight[moving_M], counts_Gg[moving_M % len(counts_Gg)], levels[moving_M]
        masks = _masks(weight_Mg, before_M4)
        mass_M4 = _masked_sums(counts_Mg, masks)
        centre_M4 = _masked_sums(weight_Mg * counts_Mg, masks) / mass_M4.clamp(min=1e-30)
        after_M4 = torch.where(mass_M4 > 0, centre_M4, before_M4).sort(dim=-1).values
        levels[moving_M] = after_M4
        moving_M = moving_M[(after_M4 != before_M4).any(-1)]
        if not len(moving_M):
            break
    return levels.reshape_as(levels_NG4)


def fit_even_levels(weight_NGg: Tensor, counts_Gg: Tensor) -> Tensor:
    """As lloyd_max, for levels with equal steps: by turns the nearest codes, and the line through weights by code."""
    levels_NG4 = _gaussian_levels(weight_NGg, counts_Gg)
    low_NG1, step_NG1 = steps(levels_NG4)
    code_4 = torch.arange(4, device=weight_NGg.device, dtype=weight_NGg.dtype)
    for _ in range(LLOYD_MAX_STEPS):
        code = nearest_code((weight_NGg - low_NG1) / step_NG1.clamp(min=1e-30))
        mass_NG4, sum_NG4 = sums_by_code(counts_Gg, code), sums_by_code(weight_NGg * counts_Gg, code)
        total = mass_NG4.sum(-1, keepdim=True).clamp(min=1e-30)
        mean_code = (mass_NG4 * code_4).sum(-1, keepdim=True) / total
        spread = (mass_NG4 * (code_4 - mean_code) ** 2).sum(-1, keepdim=True)
        slope = (sum_NG4 * (code_4 - mean_code)).sum(-1, keepdim=True) / spread.clamp(min=1e-30)
        fits = spread > 0  # more than one code is in use
        step_NG1 = torch.where(fits, slope, step_NG1)
        low_NG1 = torch.where(fits, sum_NG4.sum(-1, keepdim=True) / total - slope * mean_code, low_NG1)
    return low_NG1 + step_NG1 * code_4
