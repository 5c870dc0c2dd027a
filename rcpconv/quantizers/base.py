"""The one weight form (SPEC.md, "Codes and levels") and what a 2-bit weight quantizer has to offer for it.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rcpconv.quantizers.functional import round_ste
from rcpformat import spec

SMALLEST_SPAN = 1e-8
"""A group's outer levels are no nearer than this, so that constant and zero groups have levels too."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a weight quantizer does in training beside what its method says. A file knows nothing of it."""

    reach: float = 0.0
    """ldp and r2q: how far beyond the outer levels, in steps to their neighbours, a weight still has a gradient."""
    residual_levels: bool = False
    """ldp and r2q: levels learn from what rounding changes, as LSQ's step does, not from all of their weights."""
    fixed_range: bool = False
    """ldp, ldp-udq and lc: clips refer to the extremes that a group had at the start, not to those it has."""


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
    """Turns a float weight (N, K) into integer-valued weights and a row scale, in training and when baking alike.

    A method says where the four levels of each group are (`levels`), which of them a weight takes (`codes`), and how
    gradients pass that choice (`select`).
    """

    learning = Learning()

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Set the quantizer's parameters from a weight, which may be clipped in place.

        importance: weight of each input channel, such as the diagonal of the input second moment; None = all equal.
        """
        raise NotImplementedError

    def hold(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> None:
        """Keep the levels as they were, now that the weights are others. Nothing to do where they depend on none."""

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """(N, G, 4) float levels before rounding, not decreasing, differentiable."""
        raise NotImplementedError

    def scale(self, levels_NG4: Tensor) -> Tensor:
        """(N,) float32, above 0, without a gradient: what the levels are rounded to multiples of."""
        return row_scale(levels_NG4)

    def codes(self, grouped_NGg: Tensor, levels_NG4: Tensor) -> Tensor:
        """(N, G, g) uint8: which of the float levels each weight takes."""
        raise NotImplementedError

    def select(self, grouped_NGg: Tensor, levels_NG4: Tensor, rounded_NG4: Tensor, scale_N: Tensor) -> Tensor:
        """(N, G, g): rounded_NG4 at `codes`, differentiable."""
        raise NotImplementedError

    def _rounded(self, levels_NG4: Tensor) -> tuple[Tensor, Tensor]:
        scale_N = self.scale(levels_NG4)
        rounded_NG4 = round_ste(levels_NG4 / scale_N[:, None, None]).clamp(-spec.LEVEL_LIMIT, spec.LEVEL_LIMIT)
        return rounded_NG4, scale_N

    def forward(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Integer-valued float weights (N, K), differentiable, and the row scale (N,) float32, which is not."""
        grouped_NGg = to_groups(widened(weight_NK), self.group_size)
        levels_NG4 = self.levels(grouped_NGg)
        rounded_NG4, scale_N = self._rounded(levels_NG4)
        integers_NGg = self.select(grouped_NGg, levels_NG4, rounded_NG4, scale_N)
        return from_groups(integers_NGg, weight_NK.shape[1]), scale_N

    @torch.no_grad()
    def bake(self, weight_NK: Tensor) -> WeightCodes:
        """The codes, levels and scale of exactly the weights that `forward` gives."""
        grouped_NGg = to_groups(widened(weight_NK), self.group_size)
        levels_NG4 = self.levels(grouped_NGg)
        rounded_NG4, scale_N = self._rounded(levels_NG4)
        return WeightCodes(
            codes_NK=from_groups(self.codes(grouped_NGg, levels_NG4), weight_NK.shape[1]).contiguous(),
            levels_NG4=rounded_NG4.to(torch.int8),
            scale_N=scale_N,
            group_size=self.group_size,
        )


def widened(weight: Tensor) -> Tensor:
    """A bfloat16 weight as float32, which is exact; any other as it is. Its gradient is bfloat16 again."""
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def to_groups(weight_NK: Tensor, group_size: int) -> Tensor:
    """(N, K) -> (N, G, g). A short last group is filled up with zeros."""
    n, k = weight_NK.shape
    groups = spec.ceil_div(k, group_size)
    if fill := groups * group_size - k:
        # Not F.pad: compiled for CPUs by torch 2.13, its gradient can be left unwritten in the last group.
        weight_NK = torch.cat([weight_NK, weight_NK.new_zeros(n, fill)], dim=1)
    return weight_NK.reshape(n, groups, group_size)


def from_groups(grouped_NGg: Tensor, k: int) -> Tensor:
    """Inverse of to_groups: drops the fill of a short last group."""
    return grouped_NGg.flatten(1)[:, :k]


def channel_weights(k: int, group_size: int, importance_K: Tensor | None, device: torch.device) -> Tensor:
    """(G, g) float32: how much each input channel counts, 0 where to_groups filled up. importance: None = all equal."""
    importance = torch.ones(k, device=device) if importance_K is None else importance_K.float()
    return to_groups(importance[None], group_size)[0]


def extremes(grouped_NGg: Tensor) -> tuple[Tensor, Tensor]:
    """(N, G) each: the smallest weight, at most 0, and the largest, at least 0; so fill counts for nothing."""
    return grouped_NGg.amin(-1).clamp(max=0), grouped_NGg.amax(-1).clamp(min=0)


def row_scale(levels_NG4: Tensor) -> Tensor:
    """The row scale (N,) that maps the largest level of a row to 127 (row maximum / 127); 1 for zero rows."""
    peak = levels_NG4.detach().abs().amax(dim=(1, 2))
    scale = peak / spec.LEVEL_LIMIT
    return torch.where(scale < 2 * spec.SMALLEST_SCALE, 1.0, scale)
