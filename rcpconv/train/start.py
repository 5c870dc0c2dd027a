"""Where training starts: levels and weights that fit what layers compute on text, not the weights alone.

`data`: initial levels with input channels weighted by their second moment. `feedback`: then GPTQ's error feedback
(arXiv 2210.17323; LDLQ of QuIP, arXiv 2307.13304), with the levels held: column by column, what rounding does to the
layer's output is made good by the columns not rounded yet. Reconstructed: what becomes of each column before it is
rounded is the weight that training starts from, whose nearest level is the one that feedback chose.

Layers are started one after the other, each on what the started ones before it give. Knows nothing of training itself.

Shape suffixes: B sequences, T positions, C channels, N out-features, K in-features, g weights of one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rcpconv.layers import QuantLinear
from rcpconv.model import Decoder
from rcpconv.quantizers.base import to_groups
from rcpconv.quantizers.functional import Quantized

CALIBRATION_SEQUENCES = 64
DAMPING = 0.01
"""Added to the diagonal of the second moment, as a share of its mean."""


@torch.no_grad()
def start_from_weights(student: Decoder) -> None:
    """Set the weight quantizers of every layer from the weights as they are."""
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.quantizer.initialise(module.weight)


@torch.no_grad()
def start_from_data(student: Decoder, batches: list[Tensor], feedback: bool) -> None:
    """Set the weight quantizers of every layer, and with `feedback` the weights. batches: (B, T) token ids each."""
    rope = student.rope(batches[0].shape[1])
    streams = [student.embed.embed(tokens_BT).to(student.options.dtype) for tokens_BT in batches]  # type: ignore[operator]
    for layer in student.layers:
        sites = _sites(layer)
        moments = [_SecondMoment(quantizer) for quantizer, _ in sites]
        for x_BTC in streams:
            layer(x_BTC, *rope, student.options)
        for moment, (_, linears) in zip(moments, sites, strict=True):
            moment_KK = moment.finish()
            inverse_KK = _inverse_factor(moment_KK) if feedback else None
            for linear in linears:
                _start(linear, moment_KK.diagonal().float(), inverse_KK)
        streams = [layer(x_BTC, *rope, student.options) for x_BTC in streams]


def _sites(layer: Any) -> list[tuple[nn.Module, list[QuantLinear]]]:
    """Each activation quantizer of a layer with the linears that take what it gives."""
    attn, mlp = layer.attn, layer.mlp
    return [
        (attn.input_quantizer, [attn.q, attn.k, attn.v]),
        (attn.o_quantizer, [attn.o]),
        (mlp.input_quantizer, [mlp.gate, mlp.up]),
        (mlp.down_quantizer, [mlp.down]),
    ]


class _SecondMoment:
    """Sums x xᵀ over every token that a quantizer gives, until it is finished."""

    def __init__(self, quantizer: nn.Module) -> None:
        self.sum_KK: Tensor | None = None
        self.handle = quantizer.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: Any, output: Quantized) -> None:
        x_MK = (output.codes * output.scale).flatten(0, -2).float()
        product_KK = (x_MK.T @ x_MK).double()
        self.sum_KK = product_KK if self.sum_KK is None else self.sum_KK + product_KK

    def finish(self) -> Tensor:
        """The sum (K, K) float64."""
        self.handle.remove()
        assert self.sum_KK is not None
        return self.sum_KK


def _inverse_factor(moment_KK: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = (moment + damping)⁻¹, float32."""
    damping = DAMPING * moment_KK.diagonal().mean().clamp(min=1e-30)
    damped_KK = moment_KK + damping * torch.eye(len(moment_KK), dtype=moment_KK.dtype, device=moment_KK.device)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    factor_KK: Tensor = torch.linalg.cholesky(inverse_KK, upper=True)
    return factor_KK.float()


def _start(linear: QuantLinear, importance_K: Tensor, inverse_KK: Tensor | None) -> None:
    quantizer, weight_NK = linear.quantizer, linear.weight
    quantizer.initialise(weight_NK, importance_K)
    if inverse_KK is None:
        return
    levels_NG4 = quantizer.levels(to_groups(weight_NK, quantizer.group_size))
    rest_NK = weight_NK.detach().clone()  # to be rounded, group by group
    for group, start in enumerate(range(0, weight_NK.shape[1], quantizer.group_size)):
        part = slice(start, start + quantizer.group_size)
        levels_N14 = levels_NG4[:, group : group + 1]
        block_Ng, inverse_gg = rest_NK[:, part], inverse_KK[part, part]
        error_Ng = torch.zeros_like(block_Ng)
        for k in range(block_Ng.shape[1]):
            column_N1 = block_Ng[:, k : k + 1]
            code = quantizer.codes(column_N1[..., None], levels_N14).long()
            rounded_N1 = torch.gather(levels_N14, 2, code)[..., 0]
            error_Ng[:, k : k + 1] = (column_N1 - rounded_N1) / inverse_gg[k, k]
            block_Ng[:, k + 1 :] -= error_Ng[:, k : k + 1] * inverse_gg[k, k + 1 :]
        rest_NK[:, part.stop :] -= error_Ng @ inverse_KK[part, part.stop :]
    weight_NK.copy_(rest_NK)
    quantizer.hold(to_groups(weight_NK, quantizer.group_size), levels_NG4)
