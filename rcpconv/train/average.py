"""Against noise in the parameters: a running mean of them, and weights pulled to their levels.

Knows nothing of losses or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rcpconv import distributed
from rcpconv.layers import QuantLinear
from rcpconv.quantizers.base import WeightQuantizer, from_groups, to_groups, widened


class RunningMean:
    """Exponential, with a shorter memory over the first updates."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.means = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take the parameters after update `step` (from 1) into the mean."""
        decay = min(self.decay, (step - 1) / (step + 9))
        torch._foreach_lerp_(self.means, self.parameters, 1 - decay)

    @torch.no_grad()
    def load(self, means: Sequence[Tensor]) -> None:
        """Go on from these means."""
        for mean, value in zip(self.means, means, strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def exchange(self) -> None:
        """The parameters become the means, and the means the parameters."""
        for mean, parameter in zip(self.means, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are their means."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


@torch.no_grad()
def pull_to_levels(linear: QuantLinear, share: float) -> None:
    """Move weights by this share of their way to the levels that they take, as oscillation damping does.

    After Nagel et al., arXiv 2203.11086, decoupled from the loss as weight decay is. Levels and codes stay as they are:
    the smallest and largest weight of a group, which clips are shares of, are not moved, nor any weight that would take
    another level there (`ldp-udq`). With a share of 1 they stay so while levels move a little, however near to where
    two levels meet the weights were.
    """
    with distributed.own_parts(linear):
        _pull(linear.weight, linear.quantizer, share)


def _pull(weight_NK: Tensor, quantizer: WeightQuantizer, share: float) -> None:
    grouped_NGg = to_groups(widened(weight_NK), quantizer.group_size)
    low_NG1, high_NG1 = grouped_NGg.aminmax(dim=-1, keepdim=True)
    levels_NG4 = quantizer.levels(grouped_NGg)
    codes_NGg = quantizer.codes(grouped_NGg, levels_NG4)
    level_NGg = levels_NG4.gather(-1, codes_NGg.long()).clamp(low_NG1, high_NG1)
    pulled_NGg = grouped_NGg.lerp(level_NGg, share)
    moves_NGg = (grouped_NGg > low_NG1) & (grouped_NGg < high_NG1)
    moves_NGg &= quantizer.codes(pulled_NGg, levels_NG4) == codes_NGg
    weight_NK.copy_(from_groups(torch.where(moves_NGg, pulled_NGg, grouped_NGg), weight_NK.shape[1]))
