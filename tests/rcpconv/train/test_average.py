"""Weights pulled to their levels: what moves, and what stays."""

import pytest
import torch

from rcpconv.layers import ComputeOptions, QuantLinear
from rcpconv.quantizers import METHODS, WeightQuantizer, weight_quantizer
from rcpconv.train.average import pull_to_levels

SHAPE = (24, 300)


def quantized(method: str, generator: torch.Generator) -> QuantLinear:
    """A linear of Gaussian weights, and its quantizer's start."""
    linear = QuantLinear(SHAPE, False, weight_quantizer(method, SHAPE, 128), ComputeOptions())
    with torch.no_grad():
        linear.weight.copy_(torch.randn(SHAPE, generator=generator))
        linear.quantizer.initialise(linear.weight)
    return linear


def move(quantizer: WeightQuantizer, share: float, generator: torch.Generator) -> None:
    """Its parameters, at random."""
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += share * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_pulled_weights_keep_levels_and_codes(method: str, share: float) -> None:
    """With a last group that is short, and parameters that have moved; weights come nearer to their levels."""
    generator = torch.Generator().manual_seed(0)
    linear = quantized(method, generator)
    quantizer = linear.quantizer
    move(quantizer, 0.1, generator)
    before, weight = quantizer.bake(linear.weight), linear.weight.detach().clone()
    pull_to_levels(linear, share)
    after = quantizer.bake(linear.weight)
    assert torch.equal(after.codes_NK, before.codes_NK) and torch.equal(after.levels_NG4, before.levels_NG4)
    assert torch.equal(after.scale_N, before.scale_N)
    was, now = (weight - before.weights()).abs(), (linear.weight - before.weights()).abs()
    assert (now < was + 0.02).all()  # levels are rounded to the scale
    assert now.mean() < (1.01 - share * (0.6 if method in ("uniform", "rtn") else 0.8)) * was.mean()


@pytest.mark.parametrize("method", ["ldp", "lc", "seq", "r2q"])
def test_pulled_weights_keep_their_codes_while_levels_move_a_little(method: str) -> None:
    """As training leaves weights: many just where two levels meet."""
    generator = torch.Generator().manual_seed(0)
    linear = quantized(method, generator)
    quantizer = linear.quantizer
    before = quantizer.bake(linear.weight)
    pull_to_levels(linear, 1.0)
    move(quantizer, 0.05, generator)
    after = quantizer.bake(linear.weight)
    assert torch.equal(after.codes_NK, before.codes_NK)
    assert not torch.equal(after.weights(), before.weights())
