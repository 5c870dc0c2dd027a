"""Straight-through building blocks of quantization-aware training, on integer-valued operands.

Everything the file will hold (codes, levels, activation codes) appears here as whole numbers inside floating tensors,
which bfloat16 and float32 represent exactly; scales are applied afterwards in float32. So what is trained is what the
file says (SPEC.md, "Arithmetic"). Given float64, all of it computes in float64 instead, which shows how much of a
difference is rounding. Knows nothing of layers or models.

Shape suffixes: M tokens, K in-features, N out-features, D head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcpconv.scheme import UNQUANTIZED
from rcpformat import arithmetic
from rcpformat.spec import LEVEL_LIMIT

SMALLEST_KV_SCALE = float(arithmetic.SMALLEST_KV_SCALE)
LARGEST_HALF = float(arithmetic.LARGEST_HALF)
ZERO_TOKEN = float(arithmetic.ZERO_TOKEN)


@torch.library.custom_op("rcpconv::to_half", mutates_args=())
def _to_half(x: Tensor) -> Tensor:
    """An operator of its own, because torch.compile merges a cast to float16 and back into nothing."""
    return x.to(torch.float16)


@_to_half.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float16)


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _HalfSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _to_half(x).to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through (Bengio et al., arXiv 1308.3432)."""
    return _RoundSTE.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def half_ste(x: Tensor) -> Tensor:
    """Round to the nearest float16 value, kept in x's dtype; the gradient passes straight through."""
    return _HalfSTE.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class Quantized(NamedTuple):
    """Per-token quantized activations: x ≈ codes * scale. codes (..., K) whole numbers; scale (..., 1) float32.

    With UNQUANTIZED bits the codes are x itself, and the scale is 1.
    """

    codes: Tensor
    scale: Tensor
    bits: int


class _ActivationCodes(torch.autograd.Function):
    """clamp(round(x / scale)): straight through inside the grid. Keeps a byte an element, beside x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        reciprocal = torch.where(zero, 0.0, 1.0 / scale)
        rounded = (x * reciprocal).round_()
        codes = rounded.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        ctx.save_for_backward(x, reciprocal, codes == rounded)
        return codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reciprocal, inside = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad_x * x).sum(dim=-1, keepdim=True).mul_(reciprocal).mul_(reciprocal).neg_()
        return grad_x.mul_(reciprocal), grad_scale, None, None


def quantize_activations(x: Tensor, clip: Tensor | float, bits: int) -> Quantized:
    """SPEC.md, "Activations", differentiable in x and clip (the scale's dependence on x is not differentiated).

    x: (..., K) float32. With UNQUANTIZED bits nothing is done to it.
    """
    if bits == UNQUANTIZED:
        return Quantized(x, torch.ones_like(x[..., :1]), bits)
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    zero = peak < ZERO_TOKEN
    scale = torch.where(zero, 1.0, (clip * peak) / (2 ** (bits - 1) - 1))
    codes: Tensor = _ActivationCodes.apply(x, scale, zero, bits)  # type: ignore[no-untyped-call]
    return Quantized(codes, scale, bits)


def fake_quantize_kv(x: Tensor, clip: Tensor | float, bits: int) -> Tensor:
    """SPEC.md, "KV cache": quantize and read back, per token and head. x: (..., D) float32; same shape back.

    With UNQUANTIZED bits it is x itself.
    """
    if bits == UNQUANTIZED:
        return x
    top = 2**bits - 1
    frozen = x.detach()
    high = torch.clamp(clip * frozen.amax(dim=-1, keepdim=True), -LARGEST_HALF, LARGEST_HALF)
    low = half_ste(torch.clamp(clip * frozen.amin(dim=-1, keepdim=True), -LARGEST_HALF, LARGEST_HALF))
    step = half_ste(torch.clamp((high - low) / top, max=LARGEST_HALF)).clamp(min=SMALLEST_KV_SCALE)
    codes = torch.clamp(round_ste((x - low) * (1.0 / step)), 0, top)
    return low + codes * step


def exact_chunk(largest_product: int) -> int:
    """How many terms of this magnitude a float32 sum may hold and still be exact."""
    return arithmetic.EXACT_FLOAT32_INTEGER // largest_product


def _integer_mm(a_MK: Tensor, b_KN: Tensor, *, half: bool) -> Tensor:
    if half:
        return torch.mm(a_MK.to(torch.bfloat16), b_KN.to(torch.bfloat16), out_dtype=torch.float32)
    return torch.mm(a_MK.float(), b_KN.float())


def integer_product(codes_MK: Tensor, integers_NK: Tensor, *, chunk: int, half: bool) -> Tensor:
    """Σ_k codes[m, k] * integers[n, k] as float32 (M, N), rounded once.

    Sums of at most `chunk` terms are exact in float32; more are split and added in float64.
    half: multiply in bfloat16 with float32 accumulation (CUDA); otherwise in float32.
    """
    k = codes_MK.shape[1]
    if k <= chunk:
        return _integer_mm(codes_MK, integers_NK.T, half=half)
    total: Tensor | None = None
    for start in range(0, k, chunk):
        part = _integer_mm(codes_MK[:, start : start + chunk], integers_NK[:, start : start + chunk].T, half=half)
        total = part.double() if total is None else total + part
    assert total is not None
    return total.float()


class _IntegerLinear(torch.autograd.Function):
    """y = (codes @ integersᵀ) * activation scale * row scale, with gradients for codes, activation scale and integers.

    Since y is linear in the codes, Σ_n y·dy = Σ_k codes·dcodes: the activation scale's gradient needs no saved output.
    """

    @staticmethod
    def forward(
        ctx: Any, codes_MK: Tensor, scale_M1: Tensor, integers_NK: Tensor, row_scale_N: Tensor, chunk: int, half: bool
    ) -> Tensor:
        sums = integer_product(codes_MK, integers_NK, chunk=chunk, half=half)
        kept = torch.bfloat16 if half else torch.float32
        ctx.save_for_backward(codes_MK.to(kept), scale_M1, integers_NK.to(kept), row_scale_N)
        ctx.half = half
        # Not in place: compiled by torch 2.11, a result changed in place has a gradient of zero.
        return sums.to(scale_M1.dtype) * scale_M1 * row_scale_N

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        codes_MK, scale_M1, integers_NK, row_scale_N = ctx.saved_tensors
        scaled_MN = (grad_MN.float() * row_scale_N).mul_(scale_M1)
        grad_codes = _integer_mm(scaled_MN, integers_NK, half=ctx.half)
        grad_scale = grad_integers = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad_codes * codes_MK).sum(dim=1, keepdim=True) / scale_M1
        if ctx.needs_input_grad[2]:
            grad_integers = _integer_mm(scaled_MN.T, codes_MK, half=ctx.half)
        return grad_codes, grad_scale, grad_integers, None, None, None


def integer_linear(x: Quantized, integers_NK: Tensor, row_scale_N: Tensor, bias_N: Tensor | None, half: bool) -> Tensor:
    """SPEC.md, "Linear": y (..., N), in the dtype of x.scale, from quantized activations and integer-valued weights.

    The row scale is not differentiated: weights are scale * round(level / scale), which moves with the level alone.
    """
    shape = x.codes.shape
    chunk = shape[-1] if x.bits == UNQUANTIZED else exact_chunk(LEVEL_LIMIT * 2 ** (x.bits - 1))
    y_MN: Tensor = _IntegerLinear.apply(  # type: ignore[no-untyped-call]
        x.codes.reshape(-1, shape[-1]), x.scale.reshape(-1, 1), integers_NK, row_scale_N, chunk, half
    )
    y = y_MN.reshape(*shape[:-1], integers_NK.shape[0])
    return y if bias_N is None else y + bias_N
