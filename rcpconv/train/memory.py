"""What makes a training smaller: updates in the backward pass, small optimizer states, bf16 weights, an int8 teacher.

Each stands alone, and rcpconv/plan.py turns on those that are needed. Knows nothing of losses, texts or runs.

Shape suffixes: N out-features, V rows of a table, C hidden_size, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcpconv import distributed
from rcpconv.errors import BadOption, BadRun
from rcpconv.layers import FloatLinear, FloatTable, QuantLinear, QuantTable
from rcpconv.quantizers.tables import int8_rows
from rcpconv.train.update import (
    BLOCK,
    EightBits,
    Rates,
    State,
    compiled_update,
    noise_like,
    read,
    row_block,
    update,
    write,
)

SMALLEST_IN_8_BITS = 4096
"""Parameters with fewer values keep float32 states: there is nothing to gain."""
_SLICE = 1 << 24
"""Values that are updated at a time, a multiple of BLOCK: what an update needs beside its states is bounded by it."""
_CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grads_with_norm_."""
_PRIME = 1_000_003
_INSTALL = "pip install 'rcpconv[low-memory]' (torchao)"

Group = dict[str, Any]
Kind = tuple[torch.device, torch.dtype, int, str, tuple[float, float]]
"""Of an update: device, dtype of weights, how many are in a row (0: they are in none), states, betas."""
_MOMENTS = ("mean", "square")


class StepInBackward:
    """Updates each parameter as soon as its gradient is whole, and drops the gradient; so few exist at a time.

    The norm of all gradients is known only when all are gone. So a gradient is scaled down as clipping would, by the
    larger of its own norm and the whole norm of the update before.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizers: list[Any], clip: float) -> None:
        """optimizers: one for each parameter, in any order. clip: largest norm."""
        owner = {id(p): each for each in optimizers for group in each.param_groups for p in group["params"]}
        assert len(owner) == len(optimizers), "one parameter an optimizer"
        self.parameters, self.clip = parameters, clip
        self.optimizers = {name: owner[id(p)] for name, p in parameters.items()}
        self.previous = 0.0
        """Norm of all gradients at the update before."""
        self.norms: dict[str, Tensor] = {}
        """Of this update's gradients, as they came."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, a backward pass is an update."""
        handles = [p.register_post_accumulate_grad_hook(self._hook(name)) for name, p in self.parameters.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self.norms[name] = norm
            factor = (self.clip / (norm.clamp(min=self.previous) + _CLIP_EPS)).clamp(max=1.0)
            # A gradient that is not finite becomes 0; the loop stops the training after this backward pass.
            parameter.grad.mul_(factor).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            self.optimizers[name].step()
            parameter.grad = None

        return update

    def norm(self) -> Tensor:
        """Of all gradients since the last call, before they were scaled."""
        norms = [self.norms[name] for name in self.parameters if name in self.norms]
        return torch.linalg.vector_norm(torch.stack(norms))  # type: ignore[no-any-return]


class LeanAdamW:
    """AdamW whose two states are kept in fewer bits, for weights in float32 or bfloat16. All arithmetic is float32.

    states: "fp32", "bf16" or "int8" (blocks with a scale, dynamic 8-bit values of arXiv 2110.02861, by torchao). Blocks
    lie within rows, and rows are what processes share out: so the same states serve any number of them. A block has
    the largest power of two up to 256 that divides a row; where that is below 16, and for vectors, states are fp32.
    Weights in bfloat16 are rounded up or down at random (arXiv 2010.06192), or small updates would be lost; the random
    numbers follow from seed, parameter and step alone.
    """

    def __init__(
        self,
        groups: list[Group],
        betas: tuple[float, float],
        states: str,
        seed: int,
        first: int = 0,
        compiled: bool = False,
    ) -> None:
        """groups: as torch.optim.AdamW takes them, with lr and weight_decay. first: place of the first parameter.

        compiled: whether the updates of all but small parameters are.
        """
        self.param_groups, self.first = groups, first
        self.betas, self.states, self.seed, self.compiled = betas, states, seed, compiled
        self.steps = 0
        self.moments: dict[int, tuple[State, State]] = {}
        """By the parameter's place: the two states of what this process has of it."""

    def _places(self) -> Iterator[tuple[int, nn.Parameter, Group]]:
        place = self.first
        for group in self.param_groups:
            for parameter in group["params"]:
                yield place, parameter, group
                place += 1

    def _block(self, parameter: Tensor) -> int:
        """How many values share a scale; 0 where states are not in 8 bits."""
        if self.states != "int8" or parameter.ndim < 2 or parameter.numel() < SMALLEST_IN_8_BITS:
            return 0
        return row_block(parameter.shape[-1])

    def _zeros(self, like: Tensor) -> tuple[State, State]:
        shape, device, block = distributed.own_part(like).shape, like.device, self._block(like)
        if block:
            scales = (*shape[:-1], shape[-1] // block)
            mean, square = (
                EightBits(
                    torch.zeros(shape, dtype=torch.uint8, device=device),
                    torch.zeros(scales, device=device),
                    _table(signed, device),
                )
                for signed in (True, False)
            )
            return mean, square
        dtype = torch.bfloat16 if self.states == "bf16" else torch.float32
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    def make_state(self) -> None:
        """Of all parameters, as before their first update."""
        for place, parameter, _ in self._places():
            if place not in self.moments:
                self.moments[place] = self._zeros(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.steps += 1
        beta1, beta2 = self.betas
        for place, parameter, group in self._places():
            if parameter.grad is None:
                continue
            if place not in self.moments:
                self.moments[place] = self._zeros(parameter)
            rate = group["lr"]
            numbers = (1 - rate * group["weight_decay"], rate / (1 - beta1**self.steps), 1 - beta2**self.steps)
            rates = Rates(*(torch.tensor(number, dtype=torch.float32) for number in numbers))
            random, width = self._random(place, parameter), self._block(parameter) or BLOCK
            parts = [_slices(distributed.own_part(x), width) for x in (parameter.detach(), parameter.grad)]
            states = [_state_slices(state, width) for state in self.moments[place]]
            for weight, gradient, mean, square in zip(*parts, *states, strict=True):
                change = compiled_update if self.compiled and weight.numel() >= SMALLEST_IN_8_BITS else update
                noise = None if random is None else noise_like(weight, random)
                change(weight, gradient, mean, square, self.betas, rates, noise)

    def _random(self, place: int, parameter: Tensor) -> torch.Generator | None:
        """Where the random numbers of an update come from, if it needs any; each of several processes has its own."""
        if parameter.dtype != torch.bfloat16:
            return None
        random = torch.Generator(parameter.device)
        seed = (self.seed + distributed.rank() * 2**32) * _PRIME + place * 2**20 + self.steps
        return random.manual_seed(seed % 2**63)

    def kinds(self) -> set[Kind]:
        """Of the updates that are compiled."""
        found = set()
        for _, parameter, _ in self._places():
            numbers, block = distributed.own_part(parameter).numel(), self._block(parameter)
            if numbers >= SMALLEST_IN_8_BITS:
                width = block or (BLOCK if numbers % BLOCK == 0 else 0)
                states = "fp32" if self.states == "int8" and not block else self.states
                found.add((parameter.device, parameter.dtype, width, states, self.betas))
        return found

    def read(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states of what this process has of a parameter, float32."""
        (place,) = (place for place, each, _ in self._places() if each is parameter)
        width = self._block(parameter) or BLOCK
        return {
            name: torch.cat([read(part).flatten() for part in _state_slices(state, width)])
            for name, state in zip(("means", "mean squares"), self.moments[place], strict=True)
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for _, parameter, _ in self._places():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and states by place, shared out as their parameters are. Nothing is copied."""
        return {
            "steps": self.steps,
            "moments": {
                str(place): {
                    name: _shown(state, parameter) for name, state in zip(_MOMENTS, self.moments[place], strict=True)
                }
                for place, parameter, _ in self._places()
                if place in self.moments
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave, in this version or before it kept states whole."""
        self.steps = state["steps"]
        for place, parameter, _ in self._places():
            found = state["moments"].get(str(place), state["moments"].get(place))
            if not found or (isinstance(found, dict) and {} in found.values()):  # not there, in one form or in 8 bits
                self.moments.pop(place, None)
                continue
            if place not in self.moments:
                self.moments[place] = self._zeros(parameter)
            if isinstance(found, list):
                self._load_slices(place, parameter, found)
                continue
            for into, name in zip(self.moments[place], _MOMENTS, strict=True):
                _restore(into, found[name])

    def _load_slices(self, place: int, parameter: Tensor, slices: list[tuple[Any, Any]]) -> None:
        """From flat slices, 8-bit ones in blocks of BLOCK whatever the rows: so they were in checkpoints once."""
        if distributed.processes() > 1:
            raise BadRun(
                "the newest checkpoint's optimizer states are of an earlier version, which one process alone can read; "
                "resume in one process up to its next checkpoint"
            )
        width = self._block(parameter) or BLOCK
        for into, values, signed in zip(self.moments[place], zip(*slices, strict=True), (True, False), strict=True):
            for part, value in zip(_state_slices(into, width), values, strict=True):
                like = part.codes if isinstance(part, EightBits) else part
                if not isinstance(value, dict):
                    write(part, value.to(like.device).view_as(like))
                    continue
                codes, scale = value["codes"].to(like.device).view(-1, BLOCK), value["scale"].to(like.device)
                if isinstance(part, EightBits) and width == BLOCK:
                    part.codes.copy_(codes)
                    part.scale_R.copy_(scale)
                else:
                    write(part, read(EightBits(codes, scale, _table(signed, like.device))).view_as(like))


def eight_bits() -> Any:
    """torchao's function that gives the values of 8-bit codes. Raises BadOption without torchao."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError as error:
        raise BadOption(f"optimizer_states: int8 needs torchao ({error}): {_INSTALL}, or use bf16") from error
    return create_dynamic_map


@cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """The value of each 8-bit code."""
    return torch.tensor(eight_bits()(signed), dtype=torch.float32, device=device)


def _slices(x: Tensor, width: int) -> list[Tensor]:
    """Some of the values at a time, in rows of `width` where that divides their number; views where in order."""
    parts = x.reshape(-1).split(_SLICE) if x.numel() else ()
    return [part.view(-1, width) if len(part) % width == 0 else part for part in parts]


def _state_slices(state: State, width: int) -> list[State]:
    """As _slices; of an 8-bit state, rows are its blocks."""
    if not isinstance(state, EightBits):
        return [*_slices(state, width)]
    parts = _slices(state.codes, width)
    scales = state.scale_R.reshape(-1).split(_SLICE // width) if parts else ()
    return [EightBits(codes, scale, state.table) for codes, scale in zip(parts, scales, strict=True)]


def _shown(state: State, parameter: Tensor) -> Any:
    """As a checkpoint has it."""
    if isinstance(state, EightBits):
        return {"codes": _shown(state.codes, parameter), "scale": _shown(state.scale_R, parameter)}
    return distributed.as_part(state, parameter)


def _restore(state: State, value: Any) -> None:
    """The opposite of _shown."""
    if isinstance(state, EightBits):
        _restore(state.codes, value["codes"])
        _restore(state.scale_R, value["scale"])
    else:
        state.copy_(distributed.own_part(value))


def narrow_weights(student: nn.Module) -> None:
    """The weights of linear layers and tables in bfloat16, and so their gradients; all else stays float32."""
    for module in student.modules():
        if isinstance(module, QuantLinear | QuantTable):
            module.weight.data = module.weight.data.to(torch.bfloat16)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Int8Linear(nn.Module):
    """An unquantized linear layer kept as int8 with a scale a row, multiplied in the dtype that it had."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scale = int8_rows(weight.detach().float())
        # Parameters, for several processes share out those, and not buffers; and in torch 2.11 none of integers.
        self.width = weight.shape[1]
        even = F.pad(integers.to(torch.int8), (0, self.width % 2))
        self.pairs = _constant(even.view(torch.bfloat16))
        self.scale = _constant(scale)
        self.bias = None if bias is None else _constant(bias.detach().float())
        self.dtype = weight.dtype

    @property
    def integers(self) -> Tensor:
        """(N, K) int8."""
        return self.pairs.view(torch.int8)[:, : self.width]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) float32."""
        y = F.linear(x.to(self.dtype), self.integers.to(self.dtype)).float() * self.scale
        return y if self.bias is None else y + self.bias


class Int8Table(Int8Linear):
    """An embedding or head kept as int8 with a scale a row."""

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C) float32."""
        return self.integers[tokens_BT].float() * self.scale[tokens_BT][..., None]

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32."""
        return self(x)  # type: ignore[no-any-return]


@torch.no_grad()
def int8_teacher(module: nn.Module) -> nn.Module:
    """The module with int8 layers and tables in the place of float ones, one at a time; or its own int8 form."""
    if isinstance(module, FloatLinear):
        return Int8Linear(module.weight, module.bias)
    if isinstance(module, FloatTable):
        return Int8Table(module.weight, None)
    for name, child in module.named_children():
        setattr(module, name, int8_teacher(child))
    return module
