"""From a checkpoint to a decoder ready for training: fold norms, untie, rotate (RCP, arXiv 2502.15779, section 3.2).

Rotations are merged in float64. R1 turns the residual stream, R2 the value heads, R4 down_proj's input; R3 acts on
queries and keys online and leaves the weights alone. Knows nothing of quantization levels, losses or files to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rcpconv.checkpoint import SourceModel, TensorStore
from rcpconv.hadamard import apply_right
from rcpconv.layers import ComputeOptions, QuantLinear
from rcpconv.model import Decoder
from rcpconv.parts import FloatParts, TrainingParts
from rcpconv.quantizers import Learning
from rcpformat.architecture import Architecture, Quantization

_Transforms = tuple[Callable[[Tensor], Tensor], ...]


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """Which rotations are in use."""

    r1: bool = True
    r2: bool = True
    r3: bool = True
    r4: bool = True


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A folded and rotated full-precision model, its tensors computed when asked for."""

    source: SourceModel
    architecture: Architecture
    """As the source's, with tied_table resolved."""
    rotations: Rotations
    signs: Tensor
    """(hidden_size,) ±1 float64: R1 is x -> H(signs ∘ x) / √n."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) for every entry of the state of a decoder with folded norms, one at a time."""
        a, store = self.architecture, self.source.tensors
        final_gain = store.get("final_norm.gain", torch.float64)
        embed = store.get("embed.weight", torch.float64)
        yield "embed.weight", self._rotate_input(embed).float()
        if a.tied_table:
            yield "head_input.gain", final_gain.float()
            if self.rotations.r1:
                yield "head_input.signs", self.signs.float()
        else:
            head = embed if self.source.tied_embeddings else store.get("head.weight", torch.float64)
            yield "head.weight", self._rotate_input(head * final_gain).float()
        del embed
        for i in range(a.num_layers):
            yield from self._layer(i)

    def _layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        a, store = self.architecture, self.source.tensors
        prefix = f"layers.{layer}."
        if a.qk_norm:
            for name in ("attn.q_norm", "attn.k_norm"):
                yield prefix + name, store.get(prefix + name, torch.float32)
        heads = _heads_first(a.head_dim)
        steps: dict[str, tuple[str | None, _Transforms, _Transforms]] = {
            # linear: (gain to fold, transforms of its input side, transforms of its output side)
            "attn.q": ("attn_norm", (self._rotate_input,), ()),
            "attn.k": ("attn_norm", (self._rotate_input,), ()),
            "attn.v": ("attn_norm", (self._rotate_input,), (heads,) if self.rotations.r2 else ()),
            "attn.o": (None, (heads,) if self.rotations.r2 else (), (self._rotate_input,)),
            "mlp.gate": ("mlp_norm", (self._rotate_input,), ()),
            "mlp.up": ("mlp_norm", (self._rotate_input,), ()),
            "mlp.down": (None, (apply_right,) if self.rotations.r4 else (), (self._rotate_input,)),
        }
        for kind, (gain, inputs, outputs) in steps.items():
            weight = store.get(f"{prefix}{kind}.weight", torch.float64)
            if gain is not None:
                weight = weight * store.get(f"{prefix}{gain}.gain", torch.float64)
            for transform in inputs:
                weight = transform(weight)
            for transform in outputs:
                weight = transform(weight.T).T
            yield f"{prefix}{kind}.weight", weight.float().contiguous()
            bias = f"{prefix}{kind}.bias"
            if bias in store.names():
                value = store.get(bias, torch.float64)
                for transform in outputs:
                    value = transform(value)
                yield bias, value.float()

    def _rotate_input(self, rows: Tensor) -> Tensor:
        """R1 along the last axis."""
        return apply_right(rows, self.signs) if self.rotations.r1 else rows


def _heads_first(head_dim: int) -> Callable[[Tensor], Tensor]:
    """R2: the Hadamard transform of each block of head_dim along the last axis."""
    return lambda rows: apply_right(rows.reshape(*rows.shape[:-1], -1, head_dim)).reshape(rows.shape)


def prepare(
    source: SourceModel, *, rotations: Rotations | None = None, one_table: bool = False, seed: int = 0
) -> PreparedModel:
    """Fold the norms of `source` and rotate it.

    one_table: keep one table for embedding and head, for a model with tied embeddings only (saves a quarter to
    a third of a small model's file); otherwise tied embeddings are untied first. seed: of R1's random signs.
    """
    assert source.tied_embeddings or not one_table, "one table needs tied embeddings"
    architecture = dataclasses.replace(source.architecture, tied_table=one_table)
    return PreparedModel(
        source=source,
        architecture=architecture,
        rotations=rotations or Rotations(),
        signs=rotation_signs(architecture.hidden_size, seed),
    )


def rotation_signs(size: int, seed: int) -> Tensor:
    """R1's (size,) random signs, ±1 float64."""
    return torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=size))


@torch.no_grad()
def _load(decoder: Decoder, tensors: Iterator[tuple[str, Tensor]]) -> Decoder:
    """Copy named tensors into the decoder's parameters and buffers; each must be there, and shapes must match."""
    state = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    for name, value in tensors:
        assert state[name].shape == value.shape, (name, state[name].shape, value.shape)
        state[name].copy_(value)
    return decoder


def _original_tensors(store: TensorStore, tied: bool, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in store.names():
        yield name, store.get(name, dtype)
    if tied:
        yield "head.weight", store.get("embed.weight", dtype)


def original_decoder(
    source: SourceModel, dtype: torch.dtype = torch.float32, options: ComputeOptions | None = None
) -> Decoder:
    """The unquantized model as it came, in eval mode: the teacher. Weights in dtype, residual stream float32."""
    parts = FloatParts(architecture=source.architecture, with_gains=True)
    decoder = Decoder(source.architecture, source.inv_freq, parts, r1=False, r3=False, r4=False, options=options)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(dtype)
    return _load(decoder, _original_tensors(source.tensors, source.tied_embeddings, dtype)).requires_grad_(False).eval()


def rotated_decoder(prepared: PreparedModel) -> Decoder:
    """The folded, rotated and still unquantized model in float32: gives the original's logits."""
    parts = FloatParts(architecture=prepared.architecture, with_gains=False)
    r = prepared.rotations
    decoder = Decoder(prepared.architecture, prepared.source.inv_freq, parts, r1=r.r1, r3=r.r3, r4=r.r4)
    return _load(decoder, prepared.tensors()).requires_grad_(False).eval()


def student_decoder(
    prepared: PreparedModel,
    quantization: Quantization,
    options: ComputeOptions,
    importance: Callable[[str], Tensor] | None = None,
    device: torch.device | str = "cpu",
    learning: Learning | None = None,
    a_clip: float = 0.9,
) -> Decoder:
    """The model to train, on `device`: prepared weights, every quantizer initialised from them.

    importance: linear name -> (K,) weight of each input channel for the initial levels; None = all equal.
    """
    parts = TrainingParts(
        architecture=prepared.architecture,
        quantization=quantization,
        options=options,
        learning=learning,
        a_clip=a_clip,
    )
    q, inv_freq = quantization, prepared.source.inv_freq
    decoder = Decoder(prepared.architecture, inv_freq, parts, r1=q.r1, r3=q.r3, r4=q.r4, options=options).to(device)
    _load(decoder, prepared.tensors())
    for name, module in decoder.named_modules():
        if isinstance(module, QuantLinear):
            module.quantizer.initialise(module.weight, None if importance is None else importance(name))
    return decoder
