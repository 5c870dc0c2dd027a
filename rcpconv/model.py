"""The LLaMA-family decoder in torch: one module for the full-precision model and for the quantized one.

What differs is plugged in as `Parts`. The forward pass is SPEC.md, chapter "Arithmetic", step for step; with the float
parts it is the original model. Knows nothing of files, training or where weights come from.

Shape suffixes: B batch, T positions, H heads, D head_dim, C hidden_size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcpconv.hadamard import hadamard_transform
from rcpconv.layers import ComputeOptions, RMSNorm, rms_norm
from rcpconv.parts import Parts
from rcpformat import spec
from rcpformat.architecture import Architecture


class Attention(nn.Module):
    """Grouped-query attention with RoPE, optional q/k norm, R3 and a quantized KV cache (SPEC.md, "Attention")."""

    def __init__(self, architecture: Architecture, parts: Parts, layer: int, r3: bool) -> None:
        super().__init__()
        a = architecture
        self.architecture, self.r3, self.window = a, r3, a.window(layer)
        prefix = f"layers.{layer}.attn."
        self.input_quantizer = parts.activation(layer, 0)
        self.o_quantizer = parts.activation(layer, 1)
        self.q, self.k, self.v, self.o = (parts.linear(prefix + kind) for kind in "qkvo")
        self.key_quantizer, self.value_quantizer = parts.kv(layer, 0), parts.kv(layer, 1)
        self.q_norm = nn.Parameter(torch.ones(a.head_dim)) if a.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(a.head_dim)) if a.qk_norm else None

    def _heads(self, x_BTN: Tensor) -> Tensor:
        b, t, _ = x_BTN.shape
        return x_BTN.view(b, t, -1, self.architecture.head_dim).transpose(1, 2)

    def _position(self, x_BHTD: Tensor, norm: Tensor | None, rope: tuple[Tensor, Tensor]) -> Tensor:
        if norm is not None:
            x_BHTD = rms_norm(x_BHTD, self.architecture.rms_norm_eps, norm)
        first, second = x_BHTD.chunk(2, dim=-1)
        cos, sin = rope
        x_BHTD = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return hadamard_transform(x_BHTD, normalized=True) if self.r3 else x_BHTD

    def forward(self, h_BTC: Tensor, rope: tuple[Tensor, Tensor], options: ComputeOptions) -> Tensor:
        """(B, T, C) normalised input -> (B, T, C) to be added to the residual."""
        x = self.input_quantizer(h_BTC)
        q = self._position(self._heads(self.q(x)), self.q_norm, rope)
        k = self.key_quantizer(self._position(self._heads(self.k(x)), self.k_norm, rope))
        v = self.value_quantizer(self._heads(self.v(x)))
        if options.half:
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        t = q.shape[2]
        mask = None
        if self.window is not None and self.window < t:
            distance = torch.arange(t, device=q.device)[:, None] - torch.arange(t, device=q.device)[None, :]
            mask = (distance >= 0) & (distance < self.window)
        grouped = self.architecture.num_heads != self.architecture.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o(self.o_quantizer(y.transpose(1, 2).flatten(2).to(h_BTC.dtype)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU with R4 in front of down_proj (SPEC.md, "MLP")."""

    def __init__(self, parts: Parts, layer: int, r4: bool) -> None:
        super().__init__()
        prefix = f"layers.{layer}.mlp."
        self.r4 = r4
        self.input_quantizer = parts.activation(layer, 2)
        self.down_quantizer = parts.activation(layer, 3)
        self.gate, self.up, self.down = (parts.linear(prefix + kind) for kind in ("gate", "up", "down"))

    def forward(self, h_BTC: Tensor) -> Tensor:
        """(B, T, C) normalised input -> (B, T, C) to be added to the residual."""
        x = self.input_quantizer(h_BTC)
        z = F.silu(self.gate(x)) * self.up(x)
        if self.r4:
            z = hadamard_transform(z, normalized=True)
        return self.down(self.down_quantizer(z))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind an RMSNorm, added to the residual stream."""

    def __init__(self, architecture: Architecture, parts: Parts, layer: int, r3: bool, r4: bool) -> None:
        super().__init__()
        size = parts.norm_size()
        self.attn_norm = RMSNorm(architecture.rms_norm_eps, size)
        self.attn = Attention(architecture, parts, layer, r3)
        self.mlp_norm = RMSNorm(architecture.rms_norm_eps, size)
        self.mlp = MLP(parts, layer, r4)

    def forward(self, x_BTC: Tensor, cos: Tensor, sin: Tensor, options: ComputeOptions) -> Tensor:
        """(B, T, C) residual stream in, float32, and out."""
        x_BTC = x_BTC + self.attn(self.attn_norm(x_BTC), (cos, sin), options)
        x_BTC = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return x_BTC


class OneTableInput(nn.Module):
    """What stands between the final norm and a table shared with the embedding: rot(γ ∘ unrot(h)) (SPEC.md, "Head")."""

    signs: Tensor | None

    def __init__(self, size: int, rotated: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.register_buffer("signs", torch.ones(size) if rotated else None)

    def forward(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., C) float32."""
        if self.signs is None:
            return h * self.gain
        unrotated = self.signs * hadamard_transform(h, transpose=True, normalized=True)
        return hadamard_transform(self.signs * (self.gain * unrotated), normalized=True)


Piece = tuple[str, nn.Module]
"""A module of a decoder under its name: "embed", "layers.0", ..., "final_norm", "head_input", "head"."""


def build_pieces(architecture: Architecture, parts: Parts, *, r1: bool, r3: bool, r4: bool) -> Iterator[Piece]:
    """The pieces of a decoder in the order of their use, each made when it is asked for; no head with one table.

    `parts` decides what they are made of; r3 and r4 switch the online rotations on.
    """
    a = architecture
    yield spec.EMBED, parts.table(spec.EMBED)
    for i in range(a.num_layers):
        yield f"layers.{i}", DecoderLayer(a, parts, i, r3, r4)
    yield "final_norm", RMSNorm(a.rms_norm_eps, parts.norm_size())
    if a.head_matrix:
        yield "head_input", parts.head_matrix()
    else:
        yield "head_input", OneTableInput(a.hidden_size, r1) if a.tied_table else nn.Identity()
    if not a.tied_table:
        yield spec.HEAD, parts.table(spec.HEAD)


def rope_tables(architecture: Architecture, inv_freq: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, D/2) for positions 0..T-1: float64 throughout, rounded once, to dtype."""
    angle = torch.arange(length, dtype=torch.float64, device=inv_freq.device)[:, None] * inv_freq
    factor = architecture.rope_attention_factor
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


class Decoder(nn.Module):
    """The whole model, of pieces as build_pieces orders them."""

    inv_freq: Tensor

    def __init__(
        self,
        architecture: Architecture,
        inv_freq: NDArray[np.float64],
        pieces: Iterable[Piece],
        options: ComputeOptions | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.options = options or ComputeOptions()
        self.register_buffer("inv_freq", torch.from_numpy(np.array(inv_freq, dtype=np.float64)))
        made = dict(pieces)
        self.embed = made[spec.EMBED]
        self.layers = nn.ModuleList(made[f"layers.{i}"] for i in range(architecture.num_layers))
        self.final_norm = made["final_norm"]
        self.head_input = made["head_input"]
        self.head = made.get(spec.HEAD, self.embed)

    def pieces(self) -> Iterator[Piece]:
        """As build_pieces gave them."""
        for name, module in self.named_children():
            if name == "layers":
                yield from ((f"layers.{i}", layer) for i, layer in enumerate(self.layers))
            else:
                yield name, module

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """See rope_tables."""
        return rope_tables(self.architecture, self.inv_freq, length, self.options.dtype)

    def streams(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """(B, T) token ids -> (B, T, C) float32, one at a time: the residual stream after each layer."""
        x = self.embed.embed(tokens_BT).to(self.options.dtype)  # type: ignore[operator]
        cos, sin = self.rope(tokens_BT.shape[1])
        for layer in self.layers:
            if self.options.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, self.options, use_reentrant=False)
            else:
                x = layer(x, cos, sin, self.options)
            yield x

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, C) float32: what the head takes."""
        for stream_BTC in self.streams(tokens_BT):
            last_BTC = stream_BTC
        return self.head_inputs(last_BTC)

    def hidden_and_streams(self, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What `hidden` gives, and all of `streams`."""
        streams = list(self.streams(tokens_BT))
        return self.head_inputs(streams[-1]), streams

    def head_inputs(self, stream_BTC: Tensor) -> Tensor:
        """The residual stream after the last layer -> (B, T, C) float32: what the head takes."""
        return self.head_input(self.final_norm(stream_BTC))  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) from `hidden` -> (..., V) float32."""
        return self.head.logits(hidden)  # type: ignore[no-any-return, operator]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) token ids -> logits (B, T, V) float32."""
        return self.logits(self.hidden(tokens_BT))


@dataclass(frozen=True, kw_only=True)
class LazyDecoder:
    """A decoder whose pieces are made when they are used, and need not be in memory together."""

    architecture: Architecture
    inv_freq: NDArray[np.float64]
    pieces: Callable[[], Iterator[Piece]]
    """As build_pieces gives them, ready for use; each call makes them anew."""
    options: ComputeOptions = field(default_factory=ComputeOptions)

    def each(self, change: Callable[[str, nn.Module], object]) -> LazyDecoder:
        """The same, with this done in place to each piece, by its name, as soon as it is there."""

        def pieces() -> Iterator[Piece]:
            for name, module in self.pieces():
                change(name, module)
                yield name, module
                del module  # before the next one is made

        return dataclasses.replace(self, pieces=pieces)

    def whole(self) -> Decoder:
        """All of it."""
        return Decoder(self.architecture, self.inv_freq, self.pieces(), self.options)

    @torch.inference_mode()
    def outputs(self, tokens: Sequence[Tensor]) -> Iterator[tuple[Tensor, nn.Module]]:
        """What a head takes, (T, C) float32, of each sequence of ids (T,), and the head; on the device of the ids.

        Goes through the pieces once, with all sequences at each. The numbers are those of the whole decoder.
        """
        device = tokens[0].device
        inv_freq = torch.from_numpy(np.array(self.inv_freq, dtype=np.float64)).to(device)
        lengths = {len(tokens_T) for tokens_T in tokens}
        rope = {t: rope_tables(self.architecture, inv_freq, t, self.options.dtype) for t in lengths}
        streams: list[Tensor] = []
        head: Any = None
        for name, module in self.pieces():
            module.to(device)
            if name == spec.EMBED:
                embed = module.embed
                streams = [embed(tokens_T[None]).to(self.options.dtype) for tokens_T in tokens]  # type: ignore[operator]
                head = module if self.architecture.tied_table else None
                del embed
            elif name == spec.HEAD:
                head = module
            else:
                for i, x_BTC in enumerate(streams):  # each in the place of the one before
                    if isinstance(module, DecoderLayer):
                        streams[i] = module(x_BTC, *rope[x_BTC.shape[1]], self.options)
                    else:
                        streams[i] = module(x_BTC)
            del module  # before the next one is made
        for x_BTC in streams:
            yield x_BTC[0], head
