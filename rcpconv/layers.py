"""The pluggable modules of a decoder: norms, linears, quantizers in front of them, tables.

Three families behind the same calls: float (the original model), quant (in training: float weights quantized at every
forward pass) and baked (fixed integers, as the file holds them). Knows nothing of how a decoder is put together.

Shape suffixes: B batch, T positions, H heads, D head_dim, C hidden_size, V vocabulary, N out-features, K in-features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcpconv.quantizers.base import WeightCodes, WeightQuantizer, widened
from rcpconv.quantizers.functional import (
    Quantized,
    fake_quantize_kv,
    half_ste,
    integer_linear,
    quantize_activations,
)
from rcpconv.quantizers.tables import fake_quantize_rows, int8_rows
from rcpconv.quantizers.uniform import rounded_finely
from rcpconv.scheme import WEIGHT_BITS
from rcpformat.spec import SMALLEST_CLIP


@dataclass
class ComputeOptions:
    """How to compute, never what: shared by all modules of one model, changed between training and evaluation."""

    half: bool = False
    """Multiply integers in bfloat16 (exact) and run attention in bfloat16. CUDA only."""
    checkpoint_layers: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    dtype: torch.dtype = torch.float32
    """Of the residual stream and all that follows from it; float64 for the evaluation of a quantized model only."""


def rms_norm(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """SPEC.md, "RMSNorm", over the last axis, in float32; times gain if there is one."""
    y = x * (1.0 / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps))
    return y if gain is None else y * gain


class RMSNorm(nn.Module):
    """RMSNorm with an optional gain: the original model has one, a folded model has not."""

    def __init__(self, eps: float, size: int | None) -> None:
        super().__init__()
        self.eps = eps
        self.gain = None if size is None else nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) float32 -> the same."""
        return rms_norm(x, self.eps, self.gain)


class FloatLinear(nn.Module):
    """An unquantized linear layer; weight (N, K). Takes a float tensor."""

    def __init__(self, shape: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) float32, computed in the weight's dtype."""
        y = F.linear(
            x.to(self.weight.dtype), self.weight, None if self.bias is None else self.bias.to(self.weight.dtype)
        )
        return y.float()


class QuantLinear(nn.Module):
    """A linear layer in training: float weight (N, K), quantized at every forward pass. Takes quantized activations."""

    def __init__(self, shape: tuple[int, int], bias: bool, quantizer: WeightQuantizer, options: ComputeOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.quantizer = quantizer
        self.options = options
        self.bits = WEIGHT_BITS
        """More of them stand for that many bits by round to nearest, instead of what the quantizer says."""

    def forward(self, x: Quantized) -> Tensor:
        """(..., K) codes -> (..., N) float32."""
        if self.bits == WEIGHT_BITS:
            integers, scale = self.quantizer(self.weight)
        else:
            integers, scale = rounded_finely(self.weight, self.quantizer.group_size, self.bits)
        return integer_linear(x, integers, scale, self.bias, self.options.half)

    def bake(self) -> WeightCodes:
        """Codes, levels and scales of the weights that the forward pass uses."""
        return self.quantizer.bake(self.weight)


class BakedLinear(nn.Module):
    """A linear layer as the file holds it: fixed integers (N, K) int8 and row scales. Takes quantized activations."""

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, integers_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, options: ComputeOptions) -> None:
        super().__init__()
        self.register_buffer("integers", integers_NK)
        self.register_buffer("scale", scale_N)
        self.register_buffer("bias", bias_N)
        self.options = options

    def forward(self, x: Quantized) -> Tensor:
        """(..., K) codes -> (..., N) float32."""
        return integer_linear(x, self.integers, self.scale, self.bias, self.options.half)


class LearnedClip(nn.Module):
    """A bit width and a learnable clip in (0, 1), kept as its logit."""

    def __init__(self, bits: int, clip: float) -> None:
        super().__init__()
        self.bits = bits
        self.clip_logit = nn.Parameter(torch.logit(torch.tensor([clip], dtype=torch.float64)).float())

    @property
    def clip(self) -> Tensor:
        """(1,) float32."""
        return torch.sigmoid(self.clip_logit).clamp(min=SMALLEST_CLIP)


class ActivationQuantizer(LearnedClip):
    """Per-token quantizer of a linear's input."""

    def forward(self, x: Tensor) -> Quantized:
        """(..., K) float32 -> codes and scales."""
        return quantize_activations(x, self.clip, self.bits)


class KVQuantizer(LearnedClip):
    """Per-token, per-head fake quantizer of keys or values."""

    def forward(self, x_BHTD: Tensor) -> Tensor:
        """Quantized and read back, float32."""
        return fake_quantize_kv(x_BHTD, self.clip, self.bits)


class FixedClip(nn.Module):
    """Holds a clip read from a file; stands in for the learnable one of either quantizer."""

    clip: Tensor

    def __init__(self, bits: int, clip: Tensor, kind: str) -> None:
        super().__init__()
        self.bits = bits
        self.kind = kind
        self.register_buffer("clip", clip.reshape(1).float())

    def forward(self, x: Tensor) -> Quantized | Tensor:
        """As ActivationQuantizer ("activation") or KVQuantizer ("kv")."""
        quantize = quantize_activations if self.kind == "activation" else fake_quantize_kv
        return quantize(x, self.clip, self.bits)


class FloatTable(nn.Module):
    """Embedding or head of an unquantized model."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C) float32."""
        return F.embedding(tokens_BT, self.weight).float()

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32."""
        return F.linear(x.to(self.weight.dtype), self.weight).float()


class QuantTable(nn.Module):
    """Embedding or head in training: float weight (V, C), quantized to `bits` (8 or 16) where it is used."""

    def __init__(self, rows: int, columns: int, bits: int, options: ComputeOptions) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.bits = bits
        self.options = options

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C) float32."""
        rows = widened(F.embedding(tokens_BT, self.weight))
        return fake_quantize_rows(rows.flatten(0, -2), self.bits).reshape(rows.shape)

    def quantized(self) -> tuple[Tensor, Tensor | None]:
        """Integer-valued rows and their scales, or float16 values and None; differentiable. What `logits` takes."""
        weight = widened(self.weight)
        return (half_ste(weight), None) if self.bits == 16 else int8_rows(weight)

    def logits(self, x: Tensor, quantized: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """(..., C) -> (..., V) float32; from an earlier `quantized()` where there is one."""
        table, scale = quantized or self.quantized()
        if scale is None:
            return F.linear(half_ste(x), table)
        return integer_linear(quantize_activations(x, 1.0, 8), table, scale, None, self.options.half)

    def forward(self, x: Tensor, quantized: tuple[Tensor, Tensor | None]) -> Tensor:
        """As `logits`, and compiled where the module is."""
        return self.logits(x, quantized)

    @torch.no_grad()
    def bake(self) -> tuple[Tensor, Tensor | None]:
        """(weight int8, scale float32), or (weight float16, None)."""
        if self.bits == 16:
            return self.weight.to(torch.float16), None
        integers, scale = int8_rows(widened(self.weight))
        return integers.to(torch.int8), scale


class HeadMatrix(nn.Module):
    """Turns what a table shared with the embedding takes, in float16 as the file has it (SPEC.md, "Head")."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., C) float32."""
        return F.linear(half_ste(h), half_ste(self.weight).to(h.dtype))

    @torch.no_grad()
    def bake(self) -> Tensor:
        """(C, C) float16."""
        return self.weight.to(torch.float16)


class BakedTable(nn.Module):
    """Embedding or head as the file holds it."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight_VD: Tensor, scale_V: Tensor | None, options: ComputeOptions) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VD)
        self.register_buffer("scale", scale_V)
        self.options = options

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C) float32."""
        rows = self.weight[tokens_BT].float()
        return rows if self.scale is None else rows * self.scale[tokens_BT][..., None]

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32."""
        if self.scale is None:
            return F.linear(half_ste(x), self.weight.to(x.dtype))
        return integer_linear(quantize_activations(x, 1.0, 8), self.weight, self.scale, None, self.options.half)
