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
_NARROW = 6
"""Measured on a CPU: 108 x 108 times 108 x 4 is 5 times faster turned, 60 x 60 times 60 x 8 twice as fast, but
44 x 44 times 44 x 32 half as fast."""


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


def _stage(y: Tensor, matrix: Tensor, stride: int) -> Tensor:
    f = len(matrix)
    if stride == 1:
        return y.reshape(-1, f) @ matrix
    y = y.reshape(-1, f, stride)
    if stride * _NARROW < f:  # a product with few columns is slow: turn it
        return (y.transpose(1, 2) @ matrix.T).transpose(1, 2).contiguous()
    return matrix @ y


@torch.library.custom_op("rcpconv::hadamard", mutates_args=())
def _hadamard(x: Tensor, transpose: bool, normalized: bool) -> Tensor:
    """An operator of its own, so that torch.compile neither traces the construction nor loses the float32 guarantee."""
    y = x
    with _true_float32(x.device):
        for matrix, stride in _stages(x.shape[-1], x.dtype, x.device, transpose):
            y = _stage(y, matrix, stride)
    y = x.clone() if y is x else y.reshape(x.shape)  # block 1 has no stages
    return (y * hadamard_factor(x.shape[-1]).norm if normalized else y).contiguous()


@_hadamard.register_fake
def _(x: Tensor, transpose: bool, normalized: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, bool, bool], output: Tensor) -> None:
    _, ctx.transpose, ctx.normalized = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """y = H x is linear, so its gradient is the transposed transform (and that one's is the transform)."""
    return _hadamard(grad, not ctx.transpose, ctx.normalized), None, None


_hadamard.register_autograd(_backward, setup_context=_remember)


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
    return _hadamard(x, transpose, normalized)  # type: ignore[no-any-return]


def apply_right(weight: Tensor, signs: Tensor | None = None) -> Tensor:
    """W · Q in float64, W of shape (..., n): each row w becomes rot(w); without signs, H w / √block.

    For a layer y = W x whose input is to be x' = rot(x), merged or online: W x = (W · Q) x'. For one whose output is to
    be y' = rot(y), rotate its columns: apply_right(W.T, signs).T.
    """
    weight = weight.to(torch.float64)
    if signs is not None:
        if signs.shape != weight.shape[-1:] or not bool((signs.abs() == 1).all()):
            raise HadamardError(
                f"signs: expected {weight.shape[-1]} values of ±1, got shape {tuple(signs.shape)}, "
                f"of them ±1: {int((signs.abs() == 1).sum())}"
            )
        weight = weight * signs.to(weight)
    return hadamard_transform(weight, normalized=True)
