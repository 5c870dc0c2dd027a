"""Stretched elastic quantization (SEQ of ParetoQ, arXiv 2502.02631), `seq`, from its formula.

Per row: Ŵ = α·(round(clip(W/α, −0.99, 0.99)·2 − ½) + ½) / 2, four balanced levels ±α/4 and ±3α/4 with no zero among
them. In the file they are ±1 and ±3 with the row scale α/4, exactly; a group has no part in it.
Gradients are those of the formula with the rounding taken for the identity (LSQ), for W and α.
Reconstructed: α is kept as its logarithm, so that it stays positive and its learning rate does not depend on its size;
and it starts where the squared error is least, not at the row's largest weight.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcpconv.quantizers.base import SMALLEST_SPAN, channel_weights, to_groups
from rcpconv.quantizers.levels import EvenLevels
from rcpformat import spec

CLIP = 0.99
LEVELS = (-0.75, -0.25, 0.25, 0.75)
"""In units of α."""
_FIT_STEPS = 25


class SEQQuantizer(EvenLevels):
    """The logarithm of α of every row, as float32 parameter of shape (N,)."""

    REACH = 2 * CLIP - 1.5  # α·CLIP lies this many steps of α/2 beyond 3α/4

    def __init__(self, rows: int, columns: int, group_size: int) -> None:
        super().__init__(rows, columns, group_size)
        self.log_alpha = nn.Parameter(torch.zeros(rows))

    @torch.no_grad()
    def initialise(self, weight_NK: Tensor, importance_K: Tensor | None = None) -> None:
        """Find the α of least squared error: by turns the nearest levels, and the α that fits them."""
        grouped = to_groups(weight_NK.float(), self.group_size)
        counts = channel_weights(weight_NK.shape[1], self.group_size, importance_K, weight_NK.device)
        unit = torch.tensor(LEVELS, device=weight_NK.device)
        alpha = 2 * ((grouped**2 * counts).sum((1, 2)) / counts.sum()).sqrt()  # the Gaussian's best, nearly
        for _ in range(_FIT_STEPS):
            self.log_alpha.copy_(alpha.clamp(min=SMALLEST_SPAN).log())
            chosen = unit[self.codes(grouped, self.levels(grouped)).long()]
            alpha = (grouped * chosen * counts).sum((1, 2)) / (chosen**2 * counts).sum((1, 2))

    def levels(self, grouped_NGg: Tensor) -> Tensor:
        """See WeightQuantizer."""
        alpha_N11 = self.log_alpha.exp().clamp(min=8 * spec.SMALLEST_SCALE)[:, None, None]
        unit_4 = torch.tensor(LEVELS, device=alpha_N11.device, dtype=alpha_N11.dtype)
        return (alpha_N11 * unit_4).expand(-1, grouped_NGg.shape[1], -1)

    def scale(self, levels_NG4: Tensor) -> Tensor:
        """α/4."""
        return levels_NG4.detach()[:, 0, 2]
