"""Training text sampled from the teacher itself (`--data self`), for models whose own data is not to be had.

Sequences of seq_len tokens at temperature 1, each begun with BOS, or with a random token where there is no BOS (as in
LLM-QAT, arXiv 2305.17888). After an EOS the sequence goes on with BOS. Knows nothing of training.

Shape suffixes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rcpconv.cached import CachedDecoder, draw, largest_batch
from rcpconv.model import Decoder
from rcpformat.architecture import TokenizerInfo


@torch.inference_mode()
def sample(
    teacher: Decoder, info: TokenizerInfo, *, tokens: int, seq_len: int, seed: int, tell: Callable[[int], None]
) -> Iterator[list[int]]:
    """Rows of seq_len token ids sampled from an unquantized decoder, about `tokens` in all; `tell` hears how many."""
    a, device = teacher.architecture, teacher.inv_freq.device
    generator = torch.Generator(device).manual_seed(seed)
    eos = torch.tensor(info.eos_ids, device=device)
    rows = -(-tokens // seq_len)
    largest = largest_batch(teacher, seq_len)
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
            row_BT[:, t] = draw(decoder.step(before_B), generator)
            if info.bos_id is not None:
                row_BT[torch.isin(before_B, eos), t] = info.bos_id
        tell(min((start + batch) * seq_len, tokens))
        yield from row_BT.tolist()
