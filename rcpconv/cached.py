"""A decoder with a KV cache, one position at a time for a batch of sequences. Knows nothing of texts or prompts.

Serves the original model, and a baked one with its quantized activations, keys and values alike.

Shape suffixes: B sequences, T positions, H heads, D head_dim, C hidden_size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpconv.model import Attention, Decoder

_LARGEST_BATCH = {"cpu": 256, "cuda": 2048}
_CACHE_BYTES = 4 << 30
"""Batches are as large as keys and values of this size allow, or a quarter of a GPU's free memory."""


def _dtype(decoder: Decoder) -> torch.dtype:
    """What a decoder's attention runs in, and so what its keys and values are kept in."""
    return torch.bfloat16 if decoder.options.half else torch.float32


def largest_batch(decoder: Decoder, length: int) -> int:
    """How many sequences of `length` tokens to run side by side."""
    a, device = decoder.architecture, decoder.inv_freq.device
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CACHE_BYTES
    each = a.num_layers * 2 * a.kv_size * length * _dtype(decoder).itemsize
    return max(1, min(_LARGEST_BATCH[device.type], room // each))


class CachedDecoder:
    """A decoder that does not train, for `batch` sequences of at most `length` tokens."""

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        a = decoder.architecture
        self.decoder, self.position = decoder, 0
        self.cos, self.sin = decoder.rope(length)
        shape = (a.num_layers, 2, batch, a.num_kv_heads, length, a.head_dim)
        self.keys_values = torch.empty(shape, dtype=_dtype(decoder), device=decoder.inv_freq.device)

    def step(self, tokens_B: Tensor) -> Tensor:
        """The tokens at the next position -> logits (B, V) for the one after it."""
        decoder, here = self.decoder, slice(self.position, self.position + 1)
        x_B1C = decoder.embed.embed(tokens_B[:, None])  # type: ignore[operator]
        rope = self.cos[here], self.sin[here]
        for layer, (keys, values) in zip(decoder.layers, self.keys_values, strict=True):
            x_B1C = x_B1C + self._attend(layer.attn, layer.attn_norm(x_B1C), rope, keys, values)  # type: ignore[arg-type, operator]
            x_B1C = x_B1C + layer.mlp(layer.mlp_norm(x_B1C))  # type: ignore[operator]
        self.position += 1
        return decoder.logits(decoder.head_input(decoder.final_norm(x_B1C)))[:, 0]

    def _attend(
        self, attn: Attention, h_B1C: Tensor, rope: tuple[Tensor, Tensor], keys_BHTD: Tensor, values_BHTD: Tensor
    ) -> Tensor:
        """What Attention.forward gives at this position."""
        x = attn.input_quantizer(h_B1C)
        here, seen = self.position, self.position + 1
        q_BH1D = attn._position(attn._heads(attn.q(x)), attn.q_norm, rope)
        k_BH1D = attn._position(attn._heads(attn.k(x)), attn.k_norm, rope)
        keys_BHTD[:, :, here] = attn.key_quantizer(k_BH1D)[:, :, 0]
        values_BHTD[:, :, here] = attn.value_quantizer(attn._heads(attn.v(x)))[:, :, 0]
        visible = slice(max(0, seen - attn.window) if attn.window else 0, seen)
        keys, values = keys_BHTD[:, :, visible], values_BHTD[:, :, visible]
        # Query heads that share keys stand where positions would, so that keys are read once, and not repeated.
        grouped = q_BH1D.to(keys.dtype).reshape(len(q_BH1D), keys.shape[1], -1, keys.shape[3])
        y = F.scaled_dot_product_attention(grouped, keys, values)
        return attn.o(attn.o_quantizer(y.reshape(len(y), 1, -1).to(h_B1C.dtype)))  # type: ignore[no-any-return]


def draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token (B,) of each row."""
    return draw_at(logits_BV, torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device))


def draw_at(logits_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The token (B,) of each row that a number in 0..1 stands for, by inversion.

    torch.multinomial takes as long as the rest of the model on a CPU.
    """
    cumulated_BV = logits_BV.softmax(-1).cumsum(-1)
    place_B1 = uniform_B1 * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, place_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)
