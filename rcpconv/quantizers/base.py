"""The one weight form (SPEC.md, "Codes and levels") and what a 2-bit weight quantizer has to offer for it.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcpformat import spec


@dataclass(frozen=True, kw_only=True)
class WeightCodes:
    """A baked linear weight: W[n, k] = scale[n] * levels[n, k // group, codes[n, k]]."""

    codes_NK: Tensor
    """uint8, 0..3."""
    levels_NG4: Tensor
    """int8, not decreasing along the last axis."""
    scale_N: Tensor
    """float32, above 0."""
    group_size: int

    def integers(self) -> Tensor:
        """(N, K) int8: the level of each weight."""
        n, k = self.codes_NK.shape
        group_of_k = torch.arange(k, device=self.codes_NK.device) // self.group_size
        index = group_of_k * spec.LEVELS_PER_GROUP + self.codes_NK.long()
        return torch.gather(self.levels_NG4.reshape(n, -1), 1, index)

    def weights(self) -> Tensor:
        """(N, K) float32: the fake-quant weight, one product a weight."""
        return self.integers().float() * self.scale_N[:, None]


class WeightQuantizer(nn.Module):
    """Turns a float weight (N, K) into integer-valued weights and a row scale, in training and when baking alike."""

    group_size: int

    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Set the quantizer's parameters from a weight. importance: weight of each input channel, None = all equal."""
        raise NotImplementedError

    def forward(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Integer-valued float weights (N, K), differentiable, and the row scale (N,) float32, which is not."""
        raise NotImplementedError

    def bake(self, weight_NK: Tensor) -> WeightCodes:
        """The codes, levels and scale of exactly the weights that `forward` gives."""
        raise NotImplementedError


def to_groups(weight_NK: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, G, g). A short last group is filled up with zeros."""
    n, k = weight_NK.shape
    groups = spec.ceil_div(k, group_size)
    padded = torch.nn.functional.pad(weight_NK, (0, groups * group_size - k))
    return padded.reshape(n, groups, group_size)


def from_groups(grouped_NGg: Tensor, k: int) -> Tensor:
    """Inverse of to_groups: drops the fill of a short last group."""
    return grouped_NGg.flatten(1)[:, :k]


def group_mask(k: int, group_size: int, device: torch.device) -> Tensor:
    """(G, g) bool: True where a weight is real, False where to_groups filled up."""
    groups = spec.ceil_div(k, group_size)
    return (torch.arange(groups * group_size, device=device) < k).reshape(groups, group_size)


def row_scale(levels_NG4: Tensor) -> Tensor:
    """The row scale (N,) that maps the largest level of a row to 127 (row maximum / 127); 1 for zero rows."""
    peak = levels_NG4.detach().abs().amax(dim=(1, 2))
    scale = peak / spec.LEVEL_LIMIT
    return torch.where(scale < 2 * spec.SMALLEST_SCALE, 1.0, scale)
