"""Which parameter learns how fast, by what rule, and when. Knows nothing of losses or data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rcpconv import distributed
from rcpconv.config import AUTO, QuantizeConfig
from rcpconv.train.memory import LeanAdamW

PEAK = "peak_lr"
"""Key of a parameter group: its learning rate before the schedule."""
FREEZES = "freezes"
"""Key of a parameter group: whether it is of weights that are quantized to 2 bits."""
_TABLES = ("embed.", "head.", "head_input.")
_MUON_MOMENTUM = 0.95

_Group = dict[str, Any]


class Together:
    """Several optimizers, for different parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer | LeanAdamW) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[_Group]:
        """Of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Make an update."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Of each by its place."""
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave."""
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def make_optimizer(student: nn.Module, config: QuantizeConfig) -> torch.optim.AdamW | LeanAdamW | Together:
    """AdamW with a rate each for weights, tables, weight quantizers, clips of activations and KV, biases and gains.

    Weight decay is for weights and tables alone. Where the configuration says so, Muon for the weights, its updates as
    large as AdamW's (arXiv 2502.16982), and rates in proportion to the root mean square of a layer's weights; small
    states; and an optimizer for each parameter, for updates in the backward pass.
    """
    assert config.lr is not None and config.quantizer_lr is not None and config.clip_lr is not None
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "tables": [], "quantizers": [], "clips": [], "others": []}
    for name, parameter in student.named_parameters():
        groups[_kind(name, parameter)].append(parameter)
    rates = {
        "tables": config.lr if config.table_lr is None else config.table_lr,
        "quantizers": config.quantizer_lr,
        "clips": config.clip_lr,
        "others": config.lr,
    }
    weights = _weight_groups(groups.pop("weights"), config)
    others = [
        _group(parameters, rates[kind], config.weight_decay if kind == "tables" else 0.0)
        for kind, parameters in groups.items()
        if parameters
    ]

    def adamw(groups: list[_Group], first: int = 0) -> torch.optim.AdamW | LeanAdamW:
        if config.optimizer_states in (AUTO, "fp32") and config.master_weights in (AUTO, "fp32"):
            return torch.optim.AdamW(groups, betas=config.betas, fused=True)
        compiled = config.compile == "on"
        return LeanAdamW(groups, config.betas, config.optimizer_states, config.seed, first, compiled)

    def muon(groups: list[_Group], first: int = 0) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, momentum=_MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")

    parts: list[tuple[Callable[..., Any], list[_Group]]] = [(adamw, [*weights, *others])]
    if config.optimizer == "muon":
        parts = [(muon, weights), (adamw, others)]
    if config.step_in_backward == "on":
        return Together(*(make([group], i) for i, (make, group) in enumerate(_single(parts))))
    whole = [make(groups) for make, groups in parts]
    return whole[0] if len(whole) == 1 else Together(*whole)


def _single(parts: list[tuple[Callable[..., Any], list[_Group]]]) -> Iterator[tuple[Callable[..., Any], _Group]]:
    """A group for each parameter."""
    for make, groups in parts:
        for group in groups:
            for parameter in group["params"]:
                yield make, group | {"params": [parameter]}


@torch.no_grad()
def make_state(optimizer: torch.optim.Optimizer | LeanAdamW | Together) -> None:
    """Have an optimizer without state make it. torch's do so in an update, here one that changes nothing.

    One after another, for where each parameter has its own, memory may not suffice for all gradients.
    """
    if isinstance(optimizer, Together):
        for each in optimizer.optimizers:
            make_state(each)
        return
    if isinstance(optimizer, LeanAdamW):
        optimizer.make_state()
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _group(parameters: list[nn.Parameter], rate: float, decay: float, *, freezes: bool = False) -> _Group:
    return {"params": parameters, "lr": rate, PEAK: rate, "weight_decay": decay, FREEZES: freezes}


def _weight_groups(weights: list[nn.Parameter], config: QuantizeConfig) -> list[_Group]:
    """One group, or one a matrix when rates depend on their sizes."""
    assert config.lr is not None
    if config.lr_scale == "absolute":
        return [_group(weights, config.lr, config.weight_decay, freezes=True)]
    squares = [float(distributed.whole(w.detach().double().square().mean())) for w in weights]
    total = sum(s * w.numel() for s, w in zip(squares, weights, strict=True)) / sum(w.numel() for w in weights)
    return [
        _group([w], config.lr * math.sqrt(s / total), config.weight_decay, freezes=True)
        for s, w in zip(squares, weights, strict=True)
    ]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.endswith("clip_logit"):
        return "clips"
    if ".quantizer." in name:
        return "quantizers"
    if name.startswith(_TABLES) and parameter.ndim > 1:
        return "tables"
    return "weights" if parameter.ndim > 1 else "others"


def rate_factor(step: int, steps: int, warmup: float, floor: float, schedule: str = "cosine") -> float:
    """Share of the peak rate at update `step` (0-based) of `steps`: a line up, then the schedule down to `floor`."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    share = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * share


def set_rates(optimizer: torch.optim.Optimizer | LeanAdamW | Together, factor: float, frozen: bool = False) -> None:
    """Every group's learning rate = its peak times the factor; 0 for the weights when they are frozen."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if frozen and group.get(FREEZES) else group[PEAK] * factor
