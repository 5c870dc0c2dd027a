"""Training text sampled from the teacher itself (`--data self`), for models whose own data is not to be had.

Sequences of seq_len tokens at temperature 1, each begun with BOS, or with a random token where there is no BOS (as in
LLM-QAT, arXiv 2305.17888). After an EOS the sequence goes on with BOS. Knows nothing of training.

Shape suffixes: B sequences, T positions, H heads, D head_dim, C hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from rcpconv.model import Attention, Decoder
from rcpformat.architecture import TokenizerInfo

SELF_EPOCHS = 2
"""How often a training uses each sampled token: on the demo model twice is as good as once, for half the sampling."""
SELF_TOKENS = 1_000_000
"""At most so many tokens are sampled; a longer training repeats them more often."""
_LARGEST_BATCH = 256
_CACHE_BYTES = 4 << 30
"""Batches are as large as keys and values of this size allow."""


class CachedDecoder:
    """An unquantized decoder, one position at a time for a batch of sequences."""

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        a = decoder.architecture
        self.decoder, self.position = decoder, 0
        self.cos, self.sin = decoder.rope(length)
        shape = (a.num_layers, 2, batch, a.num_kv_heads, length, a.head_dim)
        self.keys_values = torch.empty(shape, device=decoder.inv_freq.device)

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
        q_BH1D = attn._position(attn._heads(attn.q(h_B1C)), attn.q_norm, rope)
        here, seen = self.position, self.position + 1
        keys_BHTD[:, :, here] = attn._position(attn._heads(attn.k(h_B1C)), attn.k_norm, rope)[:, :, 0]
        values_BHTD[:, :, here] = attn._heads(attn.v(h_B1C))[:, :, 0]
        visible = slice(max(0, seen - attn.window) if attn.window else 0, seen)
        y = F.scaled_dot_product_attention(
            q_BH1D, keys_BHTD[:, :, visible], values_BHTD[:, :, visible], enable_gqa=True
        )
        return attn.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token (B,) of each row, by inversion: torch.multinomial takes as long as the rest of the model on a CPU."""
    cumulated_BV = logits_BV.softmax(-1).cumsum(-1)
    place_B1 = torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device) * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, place_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


@torch.inference_mode()
def sample(
    teacher: Decoder, info: TokenizerInfo, *, tokens: int, seq_len: int, seed: int, tell: Callable[[int], None]
) -> Iterator[list[int]]:
    """Rows of seq_len token ids sampled from an unquantized decoder, about `tokens` in all; `tell` hears how many."""
    a, device = teacher.architecture, teacher.inv_freq.device
    generator = torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(info.eos_ids, device=device)
    rows = -(-tokens // seq_len)
    fitting = _CACHE_BYTES // (a.num_layers * 2 * a.kv_size * seq_len * 4)
    largest = max(1, min(_LARGEST_BATCH, fitting))
    for start in range(0, rows, largest):
        batch = min(largest, rows - start)
        decoder = CachedDecoder(teacher, batch, seq_len)
        row_BT = torch.empty(batch, seq_len, dtype=torch.long, device=device)
        if info.bos_id is None:
            row_BT[:, 0] = torch.randint(a.vocab_size, (batch,), generator=generator, device=device)
        else:
            row_BT[:, 0] = info.bos_id
        for t in range(1, seq_len):
            before_B = row_BT[:, t - 1]
            row_BT[:, t] = _draw(decoder.step(before_B), generator)
            if info.bos_id is not None:
                row_BT[torch.isin(before_B, eos), t] = info.bos_id
        tell(min((start + batch) * seq_len, tokens))
        yield from row_BT.tolist()
