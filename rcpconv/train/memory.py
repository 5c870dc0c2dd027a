"""What makes a training smaller: updates in the backward pass, small optimizer states, bf16 weights, an int8 teacher.

Each stands alone, and rcpconv/plan.py turns on those that are needed. Knows nothing of losses, texts or runs.

Shape suffixes: N out-features, V rows of a table, C hidden_size, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcpconv.errors import BadOption
from rcpconv.layers import FloatLinear, FloatTable, QuantLinear, QuantTable
from rcpconv.quantizers.tables import int8_rows
from rcpconv.train.update import BLOCK, EightBits, Rates, State, compiled_update, noise_like, read, update

SMALLEST_IN_8_BITS = 4096
"""Parameters with fewer values keep float32 states: there is nothing to gain."""
_SLICE = 1 << 24
"""Values that are updated at a time, a multiple of BLOCK: what an update needs beside its states is bounded by it."""
_CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grads_with_norm_."""
_PRIME = 1_000_003
_INSTALL = "pip install 'rcpconv[low-memory]' (torchao)"

Group = dict[str, Any]
Kind = tuple[torch.device, torch.dtype, bool, str, tuple[float, float]]
"""Of an update: device, dtype of weights, whether they are whole blocks, states, betas."""


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

    states: "fp32", "bf16" or "int8" (blocks of 256 with a scale, dynamic 8-bit values of arXiv 2110.02861, by torchao).
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
        self.moments: dict[int, list[tuple[Tensor, ...]]] = {}
        """By the parameter's place: the two states of each slice."""

    def _places(self) -> Iterator[tuple[int, nn.Parameter, Group]]:
        place = self.first
        for group in self.param_groups:
            for parameter in group["params"]:
                yield place, parameter, group
                place += 1

    def _zeros(self, like: Tensor) -> list[tuple[Tensor, ...]]:
        sizes = [len(part) for part in _slices(like.detach())]
        if self.states == "int8" and sum(sizes) >= SMALLEST_IN_8_BITS and sum(sizes) % BLOCK == 0:
            state = eight_bits()
            return [tuple(state.zeros(n, signed, BLOCK, like.device) for signed in (True, False)) for n in sizes]
        dtype = torch.bfloat16 if self.states == "bf16" else torch.float32
        return [tuple(torch.zeros(n, dtype=dtype, device=like.device) for _ in range(2)) for n in sizes]

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
            random = self._random(place, parameter)
            parts = (_slices(parameter.detach()), _slices(parameter.grad), self.moments[place])
            for weight, gradient, (mean, square) in zip(*parts, strict=True):
                change = compiled_update if self.compiled and len(weight) >= SMALLEST_IN_8_BITS else update
                noise = None if random is None else noise_like(weight, random)
                values = (_rows(weight), _rows(gradient), _state(mean), _state(square))
                change(*values, self.betas, rates, None if noise is None else _rows(noise))

    def _random(self, place: int, parameter: Tensor) -> torch.Generator | None:
        """Where the random numbers of an update come from, if it needs any."""
        if parameter.dtype != torch.bfloat16:
            return None
        random = torch.Generator(parameter.device)
        return random.manual_seed((self.seed * _PRIME + place * 2**20 + self.steps) % 2**63)

    def kinds(self) -> set[Kind]:
        """Of the updates that are compiled."""
        large = [p for _, p, _ in self._places() if p.numel() >= SMALLEST_IN_8_BITS]
        return {(p.device, p.dtype, p.numel() % BLOCK == 0, self.states, self.betas) for p in large}

    def read(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states of a parameter, float32."""
        (place,) = (place for place, each, _ in self._places() if each is parameter)
        pairs = zip(*self.moments[place], strict=True)
        return {
            name: torch.cat([read(_state(part)).flatten() for part in parts])
            for name, parts in zip(("means", "mean squares"), pairs, strict=True)
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for _, parameter, _ in self._places():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and the number of steps."""
        moments = {place: [tuple(map(_plain, pair)) for pair in pairs] for place, pairs in self.moments.items()}
        return {"steps": self.steps, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave."""
        self.steps = state["steps"]
        parameters = {place: parameter for place, parameter, _ in self._places()}
        for place, pairs in state["moments"].items():
            self.moments[place] = self._zeros(parameters[place])
            for into, values in zip(self.moments[place], pairs, strict=True):
                for tensor, value in zip(into, values, strict=True):
                    _restore(tensor, value)


def eight_bits() -> Any:
    """The tensor class of 8-bit states. Raises BadOption without torchao."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise BadOption(f"optimizer_states: int8 needs torchao ({error}): {_INSTALL}, or use bf16") from error
    return OptimState8bit


def _slices(x: Tensor) -> tuple[Tensor, ...]:
    """The values that are on this device, some at a time; views where they lie in order."""
    here: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return here.reshape(-1).split(_SLICE)  # type: ignore[no-any-return]


def _rows(x: Tensor) -> Tensor:
    """Values in rows of BLOCK, where that divides their number."""
    return x.view(-1, BLOCK) if len(x) % BLOCK == 0 else x


def _state(state: Any) -> State:
    """What an update takes, its values in rows."""
    return EightBits(_rows(state.codes), state.scale, state.qmap) if hasattr(state, "codes") else _rows(state)


def _plain(state: Any) -> Any:
    return {"codes": state.codes, "scale": state.scale} if hasattr(state, "codes") else state


def _restore(state: Any, value: Any) -> None:
    if isinstance(value, dict):
        state.codes.copy_(value["codes"])
        state.scale.copy_(value["scale"])
    else:
        state.copy_(value)


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
        # Parameters, for several processes share out those, and not buffers.
        self.integers = _constant(integers.to(torch.int8))
        self.scale = _constant(scale)
        self.bias = None if bias is None else _constant(bias.detach().float())
        self.dtype = weight.dtype

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
