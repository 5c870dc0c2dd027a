"""Which parameter learns how fast, and when. Knows nothing of losses or data."""

from __future__ import annotations

import math

import torch
from torch import nn

from rcpconv.config import QuantizeConfig

PEAK = "peak_lr"
"""Key of a parameter group: its learning rate before the schedule."""


def make_optimizer(student: nn.Module, config: QuantizeConfig) -> torch.optim.AdamW:
    """AdamW with a rate each for weights, weight quantizers, clips of activations and KV, and biases and gains.

    Weight decay is for weights alone.
    """
    assert config.lr is not None and config.quantizer_lr is not None and config.clip_lr is not None
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "quantizers": [], "clips": [], "others": []}
    for name, parameter in student.named_parameters():
        groups[_kind(name, parameter)].append(parameter)
    rates = {"weights": config.lr, "quantizers": config.quantizer_lr, "clips": config.clip_lr, "others": config.lr}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[kind],
                PEAK: rates[kind],
                "weight_decay": config.weight_decay if kind == "weights" else 0.0,
            }
            for kind, parameters in groups.items()
            if parameters
        ],
        betas=config.betas,
        fused=True,
    )


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.endswith("clip_logit"):
        return "clips"
    if ".quantizer." in name:
        return "quantizers"
    return "weights" if parameter.ndim > 1 else "others"


def rate_factor(step: int, steps: int, warmup: float, floor: float) -> float:
    """Share of the peak rate at update `step` (0-based) of `steps`: a line up, then a cosine down to `floor`."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - 1 - rising)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate = its peak times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group[PEAK] * factor
