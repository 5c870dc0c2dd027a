"""Embedding and head tables: int8 with a scale per row, or float16. Knows nothing of what the rows mean.

Shape suffixes: V rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcpconv.quantizers.functional import half_ste, round_ste
from rcpformat import spec


def int8_rows(table_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Integer-valued rows (V, D) in -127..127, differentiable, and their scales (V,) float32, which are not."""
    peak = table_VD.detach().abs().amax(dim=1)
    scale_V = peak / spec.LEVEL_LIMIT
    scale_V = torch.where(scale_V < 2 * spec.SMALLEST_SCALE, 1.0, scale_V)
    integers = round_ste(table_VD / scale_V[:, None]).clamp(-spec.LEVEL_LIMIT, spec.LEVEL_LIMIT)
    return integers, scale_V


def fake_quantize_rows(rows_MD: Tensor, bits: int) -> Tensor:
    """Table rows as the file will hold them, (M, D) float32; each row depends on itself alone."""
    if bits == 16:
        return half_ste(rows_MD)
    integers, scale_M = int8_rows(rows_MD)
    return integers * scale_M[:, None]
