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

SELF_TOKENS = 1_000_000
"""At most so many tokens are sampled; a longer training repeats them."""
_BATCH = 64


class _KVCache:
    """Keys and values of one layer for a batch, filled position by position."""

    def __init__(self, attention: Attention, batch: int, length: int, like: Tensor) -> None:
        a = attention.architecture
        shape = (batch, a.num_kv_heads, length, a.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.attention, self.used = attention, 0

    def attend(self, h_B1C: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What Attention.forward gives at the next position."""
        layer = self.attention
        q, k = (
            layer._position(layer._heads(linear(h_B1C)), norm, rope)
            for linear, norm in ((layer.q, layer.q_norm), (layer.k, layer.k_norm))
        )
        self.keys[:, :, self.used] = k[:, :, 0]
        self.values[:, :, self.used] = layer._heads(layer.v(h_B1C))[:, :, 0]
        self.used += 1
        visible = slice(max(0, self.used - layer.window) if layer.window else 0, self.used)
        y = F.scaled_dot_product_attention(q, self.keys[:, :, visible], self.values[:, :, visible], enable_gqa=True)
        return layer.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@torch.inference_mode()
def sample(
    teacher: Decoder, info: TokenizerInfo, *, tokens: int, seq_len: int, seed: int, tell: Callable[[int], None]
) -> Iterator[list[int]]:
    """Rows of seq_len token ids sampled from an unquantized decoder, about `tokens` in all; `tell` hears how many."""
    device = teacher.inv_freq.device
    generator = torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(info.eos_ids, device=device)
    rows = -(-tokens // seq_len)
    for start in range(0, rows, _BATCH):
        batch = min(_BATCH, rows - start)
        cos, sin = teacher.rope(seq_len)
        row_BT = torch.empty(batch, seq_len, dtype=torch.long, device=device)
        row_BT[:, 0] = (
            torch.randint(teacher.architecture.vocab_size, (batch,), generator=generator, device=device)
            if info.bos_id is None
            else info.bos_id
        )
        like = teacher.embed.embed(row_BT[:1, :1])  # type: ignore[operator]
        caches = [_KVCache(layer.attn, batch, seq_len, like) for layer in teacher.layers]  # type: ignore[arg-type]
        for t in range(1, seq_len):
            x_B1C = teacher.embed.embed(row_BT[:, t - 1 : t])  # type: ignore[operator]
            for layer, cache in zip(teacher.layers, caches, strict=True):
                x_B1C = x_B1C + cache.attend(layer.attn_norm(x_B1C), (cos[t - 1 : t], sin[t - 1 : t]))  # type: ignore[operator]
                x_B1C = x_B1C + layer.mlp(layer.mlp_norm(x_B1C))  # type: ignore[operator]
            logits_BV = teacher.logits(teacher.head_input(teacher.final_norm(x_B1C)))[:, 0]
            row_BT[:, t] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
            if info.bos_id is not None and info.eos_ids:
                row_BT[torch.isin(row_BT[:, t - 1], eos), t] = info.bos_id
        tell(min((start + batch) * seq_len, tokens))
        yield from row_BT.tolist()
