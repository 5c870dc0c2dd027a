"""AdamW's update of some values of a parameter, as one function of tensors that torch.compile makes one kernel of.

8-bit states are torchao's: its table of values, its scales of blocks, its rounding. Numbers that change from step to
step come as tensors, so that nothing is compiled twice. Knows nothing of optimizers, steps or seeds.

Shape suffixes: R rows of a block's values, or of one value where their number is no multiple of BLOCK.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK, SMALLEST_BLOCK = 256, 16
"""Values that share the scale of an 8-bit state, at most and at least; in smaller blocks scales would take too much."""
_EPS = 1e-8
_LOWER_BITS = 16
"""Of a float32 value, that bfloat16 has not."""


def row_block(row: int) -> int:
    """How many values of a row of so many share a scale, so that no block is of two rows; 0 where too few would."""
    block = math.gcd(row, BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def eight_bit_bytes(row: int) -> float:
    """Of a value of an 8-bit state, with its scale; of float32 where a row has no blocks."""
    block = row_block(row)
    return 1 + 4 / block if block else 4.0


class EightBits(NamedTuple):
    """An 8-bit state, without torchao's tensor class around it."""

    codes: Tensor
    scale_R: Tensor
    table: Tensor
    """The value of each code."""


State = Tensor | EightBits


class Rates(NamedTuple):
    """What an update takes of learning rate, weight decay and step: single float32 numbers on the CPU."""

    keep: Tensor
    """Share of a weight that decay leaves."""
    rate: Tensor
    """Learning rate, over the bias correction of the mean."""
    correction: Tensor
    """Of the mean square's bias."""


Update = Callable[[Tensor, Tensor, State, State, tuple[float, float], Rates, Tensor | None], None]


def update(
    weight: Tensor,
    gradient: Tensor,
    mean: State,
    square: State,
    betas: tuple[float, float],
    rates: Rates,
    noise: Tensor | None,
) -> None:
    """Change weight and states in place, by arithmetic in float32. noise: by noise_like, for weights in bfloat16."""
    beta1, beta2 = betas
    gradient = gradient.float()
    m = read(mean).lerp_(gradient, 1 - beta1)
    v = read(square).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    write(mean, m)
    write(square, v)
    denominator = v.div_(rates.correction).sqrt_().add_(_EPS)
    new = (weight.float() * rates.keep).sub_(m.div_(denominator).mul_(rates.rate))
    weight.copy_(new if noise is None else stochastic_bfloat16(new, noise))


def read(state: State) -> Tensor:
    """A float32 copy."""
    if isinstance(state, EightBits):
        from torchao.optim.quant_utils import dequant_with_qmap

        return dequant_with_qmap(state.codes, state.table, state.scale_R)  # type: ignore[no-any-return]
    return state.to(torch.float32, copy=True)


def write(state: State, values: Tensor) -> None:
    """Round float32 values to the state's form."""
    if not isinstance(state, EightBits):
        state.copy_(values)
        return
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scale_R = scale_tensor(values, values.shape[-1])
    state.codes.copy_(quantize_8bit_with_qmap(scaled, state.table))
    state.scale_R.copy_(scale_R)


def stochastic_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Float32 rounded to a neighbouring bfloat16 value, the nearer the likelier, so that the mean is exact."""
    return ((x.view(torch.int32) + noise) & -(1 << _LOWER_BITS)).view(torch.float32)


def noise_like(x: Tensor, random: torch.Generator) -> Tensor:
    """Random numbers for stochastic_bfloat16."""
    return torch.randint(0, 1 << _LOWER_BITS, x.shape, generator=random, device=x.device, dtype=torch.int32)


@cache
def _compiled() -> Update:
    # Codes are 0 to 255 by their type, so looking for others in every kernel would be for nothing.
    return torch.compile(update, fullgraph=True, options={"assert_indirect_indexing": False})


def compiled_update(
    weight: Tensor,
    gradient: Tensor,
    mean: State,
    square: State,
    betas: tuple[float, float],
    rates: Rates,
    noise: Tensor | None,
) -> None:
    """As update, compiled once for each combination of dtypes, whatever the number of rows (2 or more)."""
    for state in (weight, gradient, mean, square, noise):
        for x in (state.codes, state.scale_R) if isinstance(state, EightBits) else (state,):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, 0)
    _compiled()(weight, gradient, mean, square, betas, rates, noise)
