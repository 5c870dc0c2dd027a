"""From a checkpoint to a decoder ready for training: fold norms, untie, rotate (RCP, arXiv 2502.15779, section 3.2).

Rotations are merged in float64. R1 turns the residual stream, R2 the value heads, R4 down_proj's input; R3 acts on
queries and keys online and leaves the weights alone. Knows nothing of quantization levels, losses or files to write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcpconv.checkpoint import SourceModel
from rcpconv.hadamard import apply_right
from rcpconv.layers import ComputeOptions, QuantLinear, QuantTable
from rcpconv.model import Decoder, LazyDecoder, Piece, build_pieces
from rcpconv.parts import FloatParts, TrainingParts
from rcpconv.quantizers import Learning
from rcpconv.rotations import LearnedRotations
from rcpformat import spec
from rcpformat.architecture import Architecture, Quantization

TABLE_ROWS = 1024
"""Of an embedding or head that are prepared at a time."""
_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Of a matrix that are rotated at a time: what stays in a processor's cache, or what keeps a GPU busy."""

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
    """As the source's, with tied_table and head_matrix resolved."""
    rotations: Rotations
    signs: Tensor
    """(hidden_size,) ±1 float64: R1 is x -> H(signs ∘ x) / √n."""
    device: torch.device | str = "cpu"
    """Where tensors are computed, and are; signs and learned rotations too (`on`)."""
    learned: LearnedRotations | None = None
    """What comes on top of R1 and R2."""

    def on(self, device: torch.device | str) -> PreparedModel:
        """The same, computed on another device."""
        learned = None if self.learned is None else self.learned.on(device)
        return dataclasses.replace(self, device=device, signs=self.signs.to(device), learned=learned)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) for every entry of the state of a decoder with folded norms, one at a time."""
        layers = (f"layers.{i}" for i in range(self.architecture.num_layers))
        for piece in (spec.EMBED, "head_input", spec.HEAD, *layers):
            for name, value in self.piece(piece):
                yield f"{piece}.{name}", value

    def piece(self, piece: str) -> Iterator[tuple[str, Tensor]]:
        """(name in it, float32 tensor) for every entry of the state of one of a decoder's pieces, one at a time."""
        a = self.architecture
        if piece.startswith("layers."):
            for name, value in self._layer(piece + "."):
                yield name, self._turned(f"{piece}.{name}", value)
        elif piece == spec.EMBED or (piece == spec.HEAD and not a.tied_table):
            blocks = self.table(piece)
            table = torch.empty(a.vocab_size, a.hidden_size, device=self.device)
            for part in table.split(TABLE_ROWS):
                part.copy_(next(blocks))
            yield "weight", table
        elif a.head_matrix and piece == "head_input":
            gain = torch.diag(self.source.tensors.get(spec.FINAL_GAIN, torch.float64, self.device))
            yield "weight", self._turned(f"{piece}.weight", self._rotate_input(self._rotate_input(gain).T).T.float())
        elif piece == "head_input" and a.tied_table:
            yield "gain", self.source.tensors.get(spec.FINAL_GAIN, torch.float32, self.device)
            if self.rotations.r1:
                yield "signs", self.signs.float()

    def table(self, name: str) -> Iterator[Tensor]:
        """The embedding or the head, TABLE_ROWS float32 rows at a time."""
        store = self.source.tensors
        gain = store.get(spec.FINAL_GAIN, torch.float64, self.device) if name == spec.HEAD else None
        stored = spec.EMBED if self.source.tied_embeddings else name
        for rows in store.blocks(f"{stored}.weight", TABLE_ROWS, torch.float64, self.device):
            rotated = self._rotate_input(rows if gain is None else rows * gain).float()
            yield self._turned(f"{name}.weight", rotated)

    def _turned(self, name: str, value: Tensor) -> Tensor:
        return value if self.learned is None else self.learned.turned(name, value).float()

    def _layer(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        a, store = self.architecture, self.source.tensors

        def read(name: str) -> Tensor:
            return store.get(prefix + name, torch.float64, self.device)

        if a.qk_norm:
            for name in ("attn.q_norm", "attn.k_norm"):
                yield name, read(name).float()
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
            weight = read(f"{kind}.weight")
            if gain is not None:
                weight *= read(f"{gain}.gain")
            for transform in inputs:
                _transform_rows(weight, transform)
            for transform in outputs:
                _transform_rows(weight.T, transform)
            yield f"{kind}.weight", weight.float()
            if f"{prefix}{kind}.bias" in store:
                value = read(f"{kind}.bias")
                for transform in outputs:
                    value = transform(value)
                yield f"{kind}.bias", value.float()

    def _rotate_input(self, rows: Tensor) -> Tensor:
        """R1 along the last axis."""
        return apply_right(rows, self.signs) if self.rotations.r1 else rows


def _transform_rows(matrix: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
    """Transform each row in place, some at a time: that takes little memory, and stays in the processor's cache."""
    for block in matrix.split(max(1, _BLOCK_ELEMENTS[matrix.device.type] // matrix.shape[1])):
        block.copy_(transform(block))


def _heads_first(head_dim: int) -> Callable[[Tensor], Tensor]:
    """R2: the Hadamard transform of each block of head_dim along the last axis."""
    return lambda rows: apply_right(rows.reshape(*rows.shape[:-1], -1, head_dim)).reshape(rows.shape)


def prepare(
    source: SourceModel,
    *,
    rotations: Rotations | None = None,
    one_table: bool = False,
    head_matrix: bool = False,
    seed: int = 0,
    learned: LearnedRotations | None = None,
) -> PreparedModel:
    """Fold the norms of `source` and rotate it.

    one_table: keep one table for embedding and head, for a model with tied embeddings only (saves a quarter to
    a third of a small model's file); otherwise tied embeddings are untied first. head_matrix: with one table, which
    may then have a learned R1. seed: of R1's random signs. learned:
    come on top of R1 and R2.
    """
    assert source.tied_embeddings or not one_table, "one table needs tied embeddings"
    assert learned is None or learned.r1_CC is None or not one_table or head_matrix, "R1 needs a head matrix"
    architecture = dataclasses.replace(source.architecture, tied_table=one_table, head_matrix=head_matrix)
    return PreparedModel(
        source=source,
        architecture=architecture,
        rotations=rotations or Rotations(),
        signs=rotation_signs(architecture.hidden_size, seed),
        learned=learned,
    )


def rotation_signs(size: int, seed: int) -> Tensor:
    """R1's (size,) random signs, ±1 float64."""
    return torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=size))


@torch.no_grad()
def _load(module: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy named tensors into the module's parameters and buffers; each must be there, and shapes must match."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in tensors:
        assert state[name].shape == value.shape, (name, state[name].shape, value.shape)
        state[name].copy_(value)


def made_on(device: torch.device | str, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces, made on this device; it is the default for no longer than that."""
    while True:
        with torch.device(device):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece
        del piece  # before the next one is made


def lazy_original(
    source: SourceModel,
    dtype: torch.dtype = torch.float32,
    options: ComputeOptions | None = None,
    device: torch.device | str = "cpu",
    change: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> LazyDecoder:
    """The unquantized model as it came, in eval mode: the teacher. Weights in dtype, residual stream float32.

    change: what becomes of each piece as soon as it is there.
    """
    options = options or ComputeOptions()
    parts = FloatParts(architecture=source.architecture, with_gains=True)
    names = {name: f"{name}." for name in (spec.EMBED, "final_norm", spec.HEAD)}
    if source.tied_embeddings:
        names[spec.HEAD] = names[spec.EMBED]

    def tensors(piece: str) -> Iterator[tuple[str, Tensor]]:
        prefix = names.get(piece, piece + ".")
        for name in source.tensors.names():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), source.tensors.get(name, dtype, device)

    def pieces() -> Iterator[Piece]:
        for name, module in made_on(device, build_pieces(source.architecture, parts, r1=False, r3=False, r4=False)):
            _load(module.to(dtype), tensors(name))
            yield name, change(module.requires_grad_(False).eval())
            del module  # before the next one is made

    return LazyDecoder(architecture=source.architecture, inv_freq=source.inv_freq, pieces=pieces, options=options)


def original_decoder(
    source: SourceModel,
    dtype: torch.dtype = torch.float32,
    options: ComputeOptions | None = None,
    device: torch.device | str = "cpu",
    change: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Decoder:
    """All of lazy_original, which takes the same arguments."""
    return lazy_original(source, dtype, options, device, change).whole().eval().to(device)


def rotated_decoder(prepared: PreparedModel) -> Decoder:
    """The folded, rotated and still unquantized model in float32, on the device of `prepared`.

    Gives the original's logits.
    """
    parts = FloatParts(architecture=prepared.architecture, with_gains=False)
    r = prepared.rotations
    pieces = made_on(prepared.device, build_pieces(prepared.architecture, parts, r1=r.r1, r3=r.r3, r4=r.r4))
    decoder = Decoder(prepared.architecture, prepared.source.inv_freq, pieces).to(prepared.device)
    _load(decoder, prepared.tensors())
    return decoder.requires_grad_(False).eval()


def _initialise(piece: Piece, importance: Callable[[str], Tensor] | None) -> None:
    name, module = piece
    for linear_name, linear in module.named_modules(prefix=name):
        if isinstance(linear, QuantLinear):
            linear.quantizer.initialise(linear.weight, None if importance is None else importance(linear_name))


def lazy_student(
    prepared: PreparedModel,
    quantization: Quantization,
    options: ComputeOptions,
    importance: Callable[[str], Tensor] | None = None,
    device: torch.device | str = "cpu",
    learning: Learning | None = None,
    a_clip: float = 0.9,
    cut_tables: bool = False,
    initialise: bool = True,
) -> LazyDecoder:
    """The model to train, made on `device`: prepared weights, every quantizer initialised from them.

    importance: linear name -> (K,) weight of each input channel for the initial levels; None = all equal. initialise:
    False where quantizers are not used. cut_tables: a table comes in several pieces of its name, of TABLE_ROWS rows
    each; good for baking alone.
    """
    a, q = prepared.architecture, quantization
    parts = TrainingParts(architecture=a, quantization=q, options=options, learning=learning, a_clip=a_clip)
    prepared = prepared.on(device)

    def pieces() -> Iterator[Piece]:
        for name, module in made_on(device, build_pieces(a, parts, r1=q.r1, r3=q.r3, r4=q.r4)):
            if cut_tables and isinstance(module, QuantTable):
                for rows in prepared.table(name):
                    module.weight.data = rows
                    yield name, module
                continue
            _load(module, prepared.piece(name))
            if initialise:
                _initialise((name, module), importance)
            yield name, module
            del module  # before the next one is made

    return LazyDecoder(architecture=a, inv_freq=prepared.source.inv_freq, pieces=pieces, options=options)


def student_decoder(
    prepared: PreparedModel,
    quantization: Quantization,
    options: ComputeOptions,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Decoder:
    """All of lazy_student, which takes the same arguments."""
    return lazy_student(prepared, quantization, options, device=device, **how).whole().to(device)
