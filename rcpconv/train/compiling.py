"""torch.compile for layers, the head and updates of small states, and the proof that it does not change what they do.

torch 2.11 once gave a compiled layer zero gradients without a word (docs/log.md, 2026-11-22), so gradients are compared
before the first update. Knows nothing of runs.

Shape suffixes: B sequences, T positions, C channels; N out-features, G groups, g weights of one group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rcpconv.errors import BadCompiler
from rcpconv.layers import QuantLinear, QuantTable
from rcpconv.model import Decoder, DecoderLayer, LazyDecoder
from rcpconv.quantizers.base import from_groups, to_groups
from rcpconv.train.losses import chunk_rows
from rcpconv.train.memory import LeanAdamW
from rcpformat import spec

ROUNDING = 2.0**-20
"""A relative change of a layer's input and weights as small as float32 operations in another order make."""
_LOSSES, _HEAD_LOSSES = 8, 2
"""Random ones, whose gradients are compared together: those of a clip may happen to cancel for one."""
_DIFFERENCE = 0.2
"""How far a compiled tensor of gradients may be from the eager one, beside twice what moved inputs and weights
do."""
_FACTOR = 4.0
"""How many times larger or smaller a compiled gradient of a single number may be."""

_UPDATES = 3
"""How many are compared."""
_UPDATED = {"cpu": 1 << 14, "cuda": 1 << 22}
"""Values that they change; so many that Triton's choice among forms of a kernel suits large weights."""
_UPDATE_DIFFERENCE = 0.1
"""How far weights and states may be from the eager ones, as a share of their change: now and then one is rounded to the
other neighbour."""

Gradients = dict[str, Tensor]
_Case = tuple[Callable[..., Tensor], Tensor]


def compile_layers(student: Decoder, teacher: Decoder, tokens_BT: Tensor, low_memory: bool = False) -> None:
    """Compile every layer of both, and the student's head. Raises BadCompiler where that changes what these learn.

    tokens_BT: of the shape that each batch of this process has, low_memory: as in training; for other shapes torch
    would compile once more, and more slowly running code.
    """
    for model in (student, teacher):
        for each in model.layers:
            each.compile()
    student.head.compile()
    _compare_first_layer(student, tokens_BT)
    _compare_head(student.head, tokens_BT, low_memory)


def compiled_layers(model: LazyDecoder, tokens_BT: Tensor | None = None, low_memory: bool = False) -> LazyDecoder:
    """The same, each layer compiled when it is made, which may raise BadCompiler as compile_layers does.

    tokens_BT, low_memory: what a student's first layer and head are compared on; a teacher's head stays as it is.
    """
    head = spec.EMBED if model.architecture.tied_table else spec.HEAD
    embed: list[nn.Module] = []

    def compile_piece(name: str, module: nn.Module) -> None:
        if name == spec.EMBED:
            embed[:] = [module]
        if isinstance(module, DecoderLayer):
            module.compile()
        if tokens_BT is None:
            return
        if name == head:
            module.compile()
            _compare_head(module, tokens_BT, low_memory)
        if name == "layers.0":
            a = dataclasses.replace(model.architecture, num_layers=1, attention_window=None)  # the layer has its window
            nothing = nn.Identity()
            pieces = ((spec.EMBED, embed[0]), (name, module), ("final_norm", nothing), ("head_input", nothing))
            _compare_first_layer(Decoder(a, model.inv_freq, pieces, model.options).to(tokens_BT.device), tokens_BT)

    return model.each(compile_piece)


def _compare_first_layer(student: Decoder, tokens_BT: Tensor) -> None:
    """Raises BadCompiler where the first layer, compiled, learns something else."""
    with torch.no_grad():
        x_BTC = student.embed.embed(tokens_BT)  # type: ignore[operator]
    _refuse("layers.0", compare(student, student.layers[0], x_BTC))


def _compare_head(head: nn.Module, tokens_BT: Tensor, low_memory: bool) -> None:
    """Raises BadCompiler where the head, compiled, learns something else. Its input is made up."""
    assert isinstance(head, QuantTable)
    rows, columns = head.weight.shape
    all_rows = tokens_BT.numel()
    chunk = chunk_rows(all_rows, rows, tokens_BT.device, low_memory)
    for count in {chunk, all_rows % chunk or chunk}:  # the last chunk may be smaller
        x_MC = torch.randn(count, columns, generator=torch.Generator().manual_seed(0)).to(tokens_BT.device)
        found: dict[str, Comparison] = {}
        for seed in range(_HEAD_LOSSES):
            _add(found, *(_head_gradients(head, run, x, seed) for run, x in _three(head.logits, head, x_MC, seed)))
        _refuse("head", found)


def _head_gradients(head: QuantTable, logits: Callable[..., Tensor], x_MC: Tensor, seed: int) -> Gradients:
    """Of a head's input and of its quantized weights, for a random loss."""
    x_MC = x_MC.clone().requires_grad_()
    with torch.no_grad():
        weight, scale = head.quantized()
    weight = weight.detach().requires_grad_()
    logits_MV = logits(x_MC, (weight, scale))
    generator = torch.Generator(x_MC.device).manual_seed(seed)
    logits_MV.backward(torch.randn(logits_MV.shape, generator=generator, device=x_MC.device))
    found = {"input": x_MC.grad, "weight": weight.grad}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _refuse(where: str, comparisons: dict[str, Comparison]) -> None:
    """Raises BadCompiler for the first gradient that is at fault."""
    for name, comparison in comparisons.items():
        if fault := comparison.fault():
            raise BadCompiler(
                f"compile: torch.compile of torch {torch.__version__} gives {where}.{name} a gradient that {fault} "
                "the one without; train with --compile off, or try another torch"
            )


@dataclass
class Comparison:
    """Of one parameter's gradients, eager and otherwise, over some losses: sums of squares."""

    numbers: int
    """Of the parameter."""
    eager: float = 0.0
    compiled: float = 0.0
    difference: float = 0.0
    """Between these two."""
    noise: float = 0.0
    """Between the eager ones and those with moved inputs and weights."""

    def add(self, eager: Tensor, compiled: Tensor, moved: Tensor) -> None:
        """Gradients for one more loss."""
        self.eager += float(eager.norm()) ** 2
        self.compiled += float(compiled.norm()) ** 2
        self.difference += float((compiled - eager).norm()) ** 2
        self.noise += float((moved - eager).norm()) ** 2

    def relative(self, of: float) -> float:
        """As a share of the eager gradients' norm."""
        return math.sqrt(of / max(self.eager, 1e-60))

    def fault(self) -> str:
        """What is wrong with the compiled gradients, or nothing.

        The gradient of a single number, a clip, is what is left of millions of terms. Where noise is as large as it, no
        gradient at all would pass; so its size counts too.
        """
        size, difference = (self.relative(squares) for squares in (self.compiled, self.difference))
        if not math.isfinite(difference):
            return "is not finite, unlike"
        if difference > _DIFFERENCE + 2 * self.relative(self.noise):
            return f"differs by {difference:.0%} from"
        if self.numbers == 1 and not (1 / _FACTOR <= size <= _FACTOR or self.eager == self.compiled):
            return f"is {size:.2g} times"
        return ""


def compare(student: Decoder, compiled: Callable[..., Tensor], x_BTC: Tensor) -> dict[str, Comparison]:
    """By name, what compiling changes in the gradients of the first layer's parameters and input.

    compiled: the first layer, compiled. Another order of operations flips a code now and then. How much that matters
    depends on how far a gradient's terms cancel (those of a clip nearly do), so it is measured by moving inputs and
    weights by about ROUNDING.
    """
    found: dict[str, Comparison] = {}
    first = student.layers[0]
    for seed in range(_LOSSES):
        *cases, (_, moved_BTC) = _three(first.forward, compiled, x_BTC, seed)
        as_is, other = (layer_gradients(student, layer, input_BTC, seed) for layer, input_BTC in cases)
        with _moved_weights(first, seed):
            _add(found, as_is, other, layer_gradients(student, first.forward, moved_BTC, seed))
    return found


@contextmanager
def _moved_weights(layer: nn.Module, seed: int) -> Iterator[None]:
    """Within, the weights of the linears, from which levels follow, are moved by about ROUNDING, and float32.

    Those of a group by the same amount, so that weights that are equal, as clipped ones are, stay so.
    """
    linears = [module for module in layer.modules() if isinstance(module, QuantLinear)]
    before = [linear.weight.data for linear in linears]
    for linear in linears:
        grouped_NGg = to_groups(linear.weight.data.float(), linear.quantizer.group_size)
        peak_NG1 = grouped_NGg.abs().amax(-1, keepdim=True)
        moved_NGg = grouped_NGg + ROUNDING * peak_NG1 * _normal(peak_NG1, seed)
        linear.weight.data = from_groups(moved_NGg, linear.weight.shape[1]).contiguous()
    try:
        yield
    finally:
        for linear, weight in zip(linears, before, strict=True):
            linear.weight.data = weight


def _normal(like: Tensor, seed: int) -> Tensor:
    """Float32 random numbers of a tensor's shape and device, the same for the same seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _three(eager: Callable[..., Tensor], compiled: Callable[..., Tensor], x: Tensor, seed: int) -> list[_Case]:
    """What is compared: eager, compiled, and eager with every input moved by about ROUNDING."""
    return [(eager, x), (compiled, x), (eager, x * (1 + ROUNDING * _normal(x, seed)))]


def _add(found: dict[str, Comparison], eager: Gradients, compiled: Gradients, moved: Gradients) -> None:
    for name, gradient in eager.items():
        comparison = found.setdefault(name, Comparison(gradient.numel()))
        comparison.add(gradient, compiled.get(name, torch.zeros_like(gradient)), moved[name])


def layer_gradients(student: Decoder, layer: Callable[..., Tensor], x_BTC: Tensor, seed: int) -> Gradients:
    """Gradients of the first layer's parameters, and of its input, for a random loss. layer: it, in some form."""
    x_BTC = x_BTC.clone().requires_grad_()
    y_BTC = layer(x_BTC, *student.rope(x_BTC.shape[1]), student.options)
    generator = torch.Generator(y_BTC.device).manual_seed(seed)
    y_BTC.backward(torch.randn(y_BTC.shape, generator=generator, device=y_BTC.device).to(y_BTC.dtype))
    found = {"input": x_BTC.grad} | {name: p.grad for name, p in student.layers[0].named_parameters()}
    student.layers[0].zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def compile_updates(optimizers: Iterable[Any]) -> None:
    """Have each kind of update compiled that these make. Raises BadCompiler where compiled ones are not the eager ones.

    Compiled here and not in the first step: a step may be within a backward pass.
    """
    lean = [optimizer for optimizer in optimizers if isinstance(optimizer, LeanAdamW) and optimizer.compiled]
    for device, dtype, width, states, betas in sorted({kind for each in lean for kind in each.kinds()}, key=str):
        shape = (_UPDATED[device.type] // width, width) if width else (_UPDATED[device.type] + 1,)
        generator = torch.Generator(device).manual_seed(0)
        start, *gradients = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(1 + _UPDATES)
        )
        eager, compiled = (_updated(start, gradients, betas, states, compiled) for compiled in (False, True))
        for what in eager:
            change = (eager[what] - start.float() if what == "weights" else eager[what]).norm()
            difference = float((compiled[what] - eager[what]).norm() / change)
            if not difference <= _UPDATE_DIFFERENCE:
                raise BadCompiler(
                    f"compile: torch.compile of torch {torch.__version__} makes updates of {dtype} weights with "
                    f"{states} states whose {what} differ by {difference:.0%} from those without; train with "
                    "--compile off, or try another torch"
                )


def _updated(
    start: Tensor, gradients: list[Tensor], betas: tuple[float, float], states: str, compiled: bool
) -> dict[str, Tensor]:
    """Weights and both states after a few updates, float32."""
    weight = nn.Parameter(start.clone())
    group = {"params": [weight], "lr": 1e-2, "weight_decay": 0.1}
    optimizer = LeanAdamW([group], betas, states, seed=0, compiled=compiled)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return {"weights": weight.detach().float()} | optimizer.read(weight)
