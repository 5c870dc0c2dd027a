"""Training text that is new each time: some of its tokens are drawn anew from what the teacher expects there.

A student that sees the same text again learns its contexts by heart, and a teacher that was trained on a text predicts
it better than any other. A teacher can be asked about any context, so a text may come with changes, which the teacher
itself finds likely. Knows nothing of training.

Shape suffixes: B sequences, T positions, M tokens that are drawn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcpconv.cached import draw_at
from rcpconv.model import Decoder
from rcpconv.train.losses import chunk_rows


def places(
    indices: Sequence[int], seq_len: int, share: float, seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """For sequences of these numbers, (B, T): which tokens are drawn, never the first, and a number in 0..1 for each.

    The same for the same number and seed, whatever else is in the batch. From raw bits, whose stream numpy promises to
    keep.
    """
    raw = np.stack([np.random.PCG64([seed, index, 1]).random_raw((2, seq_len)) for index in indices])
    uniform_2BT = (raw >> 40).transpose(1, 0, 2) * 2.0**-24  # exact in float32
    chosen_BT = uniform_2BT[0] < share
    chosen_BT[:, 0] = False
    return chosen_BT, uniform_2BT[1]


@torch.no_grad()
def redraw(teacher: Decoder, tokens_BT: Tensor, chosen_BT: Tensor, uniform_BT: Tensor) -> Tensor:
    """(B, T) ids in which the chosen ones are drawn from the teacher's prediction after the text as it was."""
    hidden_MC = teacher.hidden(tokens_BT)[:, :-1][chosen_BT[:, 1:]]
    uniform_M1 = uniform_BT[:, 1:][chosen_BT[:, 1:]].float()[:, None]
    if not len(hidden_MC):
        return tokens_BT
    rows = chunk_rows(len(hidden_MC), teacher.architecture.vocab_size, tokens_BT.device)
    drawn = [
        draw_at(teacher.logits(part_MC), part_M1)
        for part_MC, part_M1 in zip(hidden_MC.split(rows), uniform_M1.split(rows), strict=True)
    ]
    return tokens_BT.masked_scatter(chosen_BT, torch.cat(drawn))
