"""The Hadamard transform of rcpformat.hadamard for torch tensors: differentiable, and merged into weights.

Vectors are rows, as in activations (tokens, n): hadamard_transform sends X to X · Hᵀ, each row x to H x.
The rotation of section 9 of formats/SPEC.md is rot(x) = Qᵀ x = H · (signs ∘ x) / √block, so that
Q = diag(signs) · Hᵀ / √block; it is orthogonal, and apply_right and apply_left_transposed merge it.
Knows nothing of models, layers or checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rcpformat.hadamard import HadamardError, hadamard_factor, transform_factors

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@lru_cache(maxsize=128)
def _stages(n: int, dtype: torch.dtype, device: torch.device, transpose: bool) -> list[tuple[Tensor, int]]:
    """The factors of transform_factors on this device, those of stride 1 transposed, each with its stride."""
    with torch.inference_mode(False):  # cached here, so they must also serve training later
        return [
            (torch.tensor(matrix if stride > 1 else matrix.T, device=device).to(dtype), stride)
            for matrix, stride in transform_factors(hadamard_factor(n), transpose)
        ]


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Within, float32 products are true float32: no autocast, no TF32, no bf16 passes, whatever is set."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    reduced = before not in ("ieee", "none")
    with torch.autocast(device.type, enabled=False):
        if reduced:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if reduced:
                matmul.fp32_precision = before


class _Transform(torch.autograd.Function):
    """y = H x is linear, so its gradient is the transposed transform (and that one's is the transform)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transpose: bool, normalized: bool) -> Tensor:
        ctx.transpose, ctx.normalized = transpose, normalized
        y = x
        with _true_float32(x.device):
            for matrix, stride in _stages(x.shape[-1], x.dtype, x.device, transpose):
                f = len(matrix)
                y = y.reshape(-1, f) @ matrix if stride == 1 else matrix @ y.reshape(-1, f, stride)
        y = x.clone() if y is x else y.reshape(x.shape)  # block 1 has no stages
        return y * hadamard_factor(x.shape[-1]).norm if normalized else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(grad, not ctx.transpose, ctx.normalized), None, None


def _apply(x: Tensor, transpose: bool, normalized: bool) -> Tensor:
    return _Transform.apply(x, transpose, normalized)  # type: ignore[no-untyped-call, no-any-return]


def hadamard_transform(x: Tensor, *, transpose: bool = False, normalized: bool = False) -> Tensor:
    """H x along the last axis (Hᵀ x with `transpose`) for rcpformat.hadamard's H; differentiable, any device.

    float32, float64 or bfloat16 in, the same out. float32 is true float32, forward and backward,
    inside autocast and under TF32 too. In bfloat16 each stage (at most three, and the scaling) rounds to
    bfloat16; pass x.float() where that is too coarse. `normalized` multiplies once, at the end, by 1/√block,
    as rcpformat does.
    """
    if x.ndim == 0 or x.dtype not in _DTYPES:
        raise HadamardError(
            f"hadamard_transform: expected float32, float64 or bfloat16 of one axis or more, "
            f"got {x.dtype} of shape {tuple(x.shape)}"
        )
    return _apply(x, transpose, normalized)


def _signed(weight: Tensor, signs: Tensor | None, axis: int) -> Tensor:
    """`weight` in float64, with index i of `axis` (0 or -1) moved last and multiplied by signs[i]."""
    weight = weight.to(torch.float64).movedim(axis, -1)
    if signs is None:
        return weight
    if signs.shape != weight.shape[-1:] or not bool((signs.abs() == 1).all()):
        raise HadamardError(
            f"signs: expected {weight.shape[-1]} values of ±1, got shape {tuple(signs.shape)}, "
            f"of them ±1: {int((signs.abs() == 1).sum())}"
        )
    return weight * signs.to(weight)


def apply_right(weight: Tensor, signs: Tensor | None = None) -> Tensor:
    """W · Q in float64, W of shape (..., n): each row w becomes rot(w); without signs, H w / √block.

    For a layer y = W x whose input is to be x' = rot(x), merged or online: W x = (W · Q) x'.
    """
    return hadamard_transform(_signed(weight, signs, -1), normalized=True)


def apply_left_transposed(weight: Tensor, signs: Tensor | None = None) -> Tensor:
    """Qᵀ · W in float64, W of shape (n, ...), a bias (n,) too: each column w becomes rot(w).

    For a layer y = W x whose output is to be y' = rot(y).
    """
    return hadamard_transform(_signed(weight, signs, 0), normalized=True).movedim(-1, 0).contiguous()
