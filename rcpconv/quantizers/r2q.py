"""Residual refinement quantization (R2Q, arXiv 2511.21736), `r2q`: two stages of 1 bit. Reconstructed.

Per group: Ŵ = α1·sign(W) + α2·sign(W − α1·sign W), the levels ±α1 ± α2; with α2 < α1 each weight takes the nearest.
Both scales are learned, as log α1 and the logit of α2/α1, which keeps 0 < α2 < α1 and makes their learning rate
independent of their size. Gradients: exact for the levels, straight through for weights between the outer ones.
Start: from each stage's best scale, α1 = mean |W| and α2 = mean |W − α1·sign W|, on to the pair of least squared error.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcpconv.quantizers.base import SMALLEST_SPAN, channel_weights, to_groups
from rcpconv.quantizers.ldp import logit
from rcpconv.quantizers.levels import NearestLevel
from rcpformat import spec

_FIT_STEPS = 25


class R2QQuantizer(NearestLevel):
    """log α1 and logit(α2/α1) of every group, as float32 parameters of shape (N, G)."""

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__(rows, columns, group_size)
        shape = (rows, spec.ceil_div(columns, group_size))
        self.log_alpha = nn.Parameter(torch.zeros(shape))
        self.ratio_logit = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Find the scales of least squared error: by turns the nearest levels, and the scales that fit them."""
        magnitude = to_groups(weight_NK.float(), self.group_size).abs()
        counts = channel_weights(weight_NK.shape[1], self.group_size, importance_K, weight_NK.device)
        total = counts.sum(-1).clamp(min=1e-30)
        first = ((magnitude * counts).sum(-1) / total).clamp(min=SMALLEST_SPAN)
        second = ((magnitude - first[..., None]).abs() * counts).sum(-1) / total
        for _ in range(_FIT_STEPS):
            outer = counts * (magnitude > first[..., None])
            inner = counts - outer
            upper = (magnitude * outer).sum(-1) / outer.sum(-1).clamp(min=1e-30)
            lower = (magnitude * inner).sum(-1) / inner.sum(-1).clamp(min=1e-30)
            fits = (outer.sum(-1) > 0) & (inner.sum(-1) > 0)
            first = torch.where(fits, (upper + lower) / 2, first)
            second = torch.where(fits, (upper - lower) / 2, second)
        self.log_alpha.copy_(first.log())
        self.ratio_logit.copy_(logit(second / first))

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        first = self.log_alpha.exp()
        second = first * torch.sigmoid(self.ratio_logit)
        return torch.stack([-first - second, second - first, first - second, first + second], dim=-1)
