"""Against noise in the parameters: a running mean of them, and weights pulled to their levels.

Knows nothing of losses or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rcpconv.layers import QuantLinear


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
    """Move every weight by this share of its way to the level that it takes, as oscillation damping does.

    After Nagel et al., arXiv 2203.11086, decoupled from the loss as weight decay is.
    """
    integers_NK, scale_N = linear.quantizer(linear.weight)
    linear.weight.lerp_(integers_NK * scale_N[:, None], share)
