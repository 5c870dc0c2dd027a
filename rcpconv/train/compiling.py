"""torch.compile for the layers of student and teacher, and the proof that it does not change what a layer learns.

torch 2.11 once gave a compiled layer zero gradients without a word (docs/log.md, 2026-11-22), so gradients are compared
before the first update. Knows nothing of runs.

Shape suffixes: B sequences, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcpconv.errors import BadCompiler
from rcpconv.model import Decoder

ROUNDING = 2.0**-20
"""A relative change of a layer's input as small as float32 operations in another order make."""
_MOVED_INPUTS = 8
_DIFFERENCE = 0.2
"""How far a compiled gradient may be from the eager one, beside twice what moved inputs change."""

Gradients = dict[str, Tensor]


def compile_layers(student: Decoder, teacher: Decoder, tokens_BT: Tensor) -> None:
    """Compile every layer of both. Raises BadCompiler where that changes what the student's first layer learns."""
    layer = student.layers[0]
    with torch.no_grad():
        x_BTC = student.embed.embed(tokens_BT)  # type: ignore[operator]
    eager = layer_gradients(student, layer, x_BTC)
    noise = rounding_noise(student, x_BTC, eager)
    for model in (student, teacher):
        for each in model.layers:
            each.compile()
    for name, difference in distances(eager, layer_gradients(student, layer, x_BTC)).items():
        if not difference <= _DIFFERENCE + 2 * noise[name]:
            raise BadCompiler(
                f"compile: torch.compile of torch {torch.__version__} gives layers.0.{name} a gradient that "
                f"differs by {difference:.0%} from the one without; train with --compile off, or try another torch"
            )


def layer_gradients(student: Decoder, layer: Callable[..., Tensor], x_BTC: Tensor) -> Gradients:
    """Gradients of the first layer's parameters, and of its input, for some loss. layer: it, or its compiled form."""
    x_BTC = x_BTC.clone().requires_grad_()
    y_BTC = layer(x_BTC, *student.rope(x_BTC.shape[1]), student.options)
    y_BTC.backward(torch.linspace(-9, 9, y_BTC.numel(), device=y_BTC.device).sin().reshape(y_BTC.shape))
    found = {"input": x_BTC.grad} | {name: p.grad for name, p in student.layers[0].named_parameters()}
    student.layers[0].zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def rounding_noise(student: Decoder, x_BTC: Tensor, gradients: Gradients) -> dict[str, float]:
    """How far the first layer's gradients move, at most, when every input moves by about ROUNDING.

    Another order of operations flips a code now and then. How much that matters depends on how far a gradient's terms
    cancel (those of a clip nearly do), so it is measured.
    """
    noise = dict.fromkeys(gradients, 0.0)
    for seed in range(_MOVED_INPUTS):
        generator = torch.Generator(x_BTC.device).manual_seed(seed)
        factor = 1 + ROUNDING * torch.randn(x_BTC.shape, generator=generator, device=x_BTC.device)
        moved = layer_gradients(student, student.layers[0], x_BTC * factor)
        noise = {name: max(noise[name], value) for name, value in distances(gradients, moved).items()}
    return noise


def distances(a: Gradients, b: Gradients) -> dict[str, float]:
    """The norm of b − a over that of a, by name."""
    return {name: float((b[name] - value).norm() / value.norm().clamp(min=1e-30)) for name, value in a.items()}
