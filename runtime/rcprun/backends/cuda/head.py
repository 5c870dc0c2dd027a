"""Logits from the head's table, in the layout it has in the file. Launches kernels/head.cu; knows nothing of norms.

Shape suffixes: M tokens, D hidden_size, P hidden_size with padding to a multiple of 128, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import cupy
import numpy as np

from rcprun.backends.cuda.launch import check, kernel, multiprocessors

_WARPS, _SEGMENT, _STAGES = 8, 512, 3
"""Of a block, one on each multiprocessor; bytes of a row in a stage of a warp; stages of 8 rows that a warp has under
way: 108 KiB in all, which leaves room for the tokens and for a block of the kernel before."""
_BULK = 1
"""Bulk copies on GPUs that have them; 0: cp.async, in sixteen bytes a lane."""
_TOKENS = 32
"""Of one launch, at most: more of them read the table again."""


def head_int8(
    codes_MP: cupy.ndarray,
    token_scale_M: cupy.ndarray,
    table_VD: cupy.ndarray,
    scale_V: cupy.ndarray,
    logits_MV: cupy.ndarray,
) -> None:
    """SPEC.md, "Head": float32 logits of an int8 table and tokens quantized to 8 bits, their padding zero."""
    (vocabulary, width), (tokens, padded) = table_VD.shape, codes_MP.shape
    check(codes_MP, "codes", np.int8, (None, -(-width // 128) * 128))
    check(token_scale_M, "token_scale", np.float32, (tokens,))
    check(table_VD, "table", np.int8, (None, None))
    check(scale_V, "scale", np.float32, (vocabulary,))
    check(logits_MV, "logits", np.float32, (tokens, vocabulary))
    for rows, launch in _launches(table_VD, tokens):
        count = np.int32(rows.stop - rows.start)
        tensors = [table_VD, scale_V, codes_MP[rows], token_scale_M[rows], logits_MV[rows]]
        launch([*tensors, np.int32(vocabulary), count, np.int32(padded)])


def head_half(h_MD: cupy.ndarray, table_VD: cupy.ndarray, logits_MV: cupy.ndarray) -> None:
    """SPEC.md, "Head": float32 logits of a float16 table and float32 tokens."""
    (vocabulary, width), tokens = table_VD.shape, len(h_MD)
    check(h_MD, "h", np.float32, (None, width))
    check(table_VD, "table", np.float16, (None, None))
    check(logits_MV, "logits", np.float32, (tokens, vocabulary))
    for rows, launch in _launches(table_VD, tokens):
        count = np.int32(rows.stop - rows.start)
        launch([table_VD, h_MD[rows], logits_MV[rows], np.int32(vocabulary), count])


def _launches(table_VD: cupy.ndarray, tokens: int) -> Iterator[tuple[slice, Callable[[Sequence[Any]], None]]]:
    """The rows of each launch, and what launches the kernel with given arguments."""
    vocabulary, width = table_VD.shape
    half = table_VD.dtype == np.float16
    ring = _WARPS * _STAGES * (8 * (_SEGMENT + 64) + 8)
    token = -(-width * table_VD.itemsize // 128) * 128 + 64
    most = min(_TOKENS, (int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]) - ring) // token)
    assert most > 0, f"hidden_size {width}: one token does not fit into shared memory"
    sizes = (("RCP_SEGMENT", _SEGMENT), ("RCP_STAGES", _STAGES), ("RCP_WARPS", _WARPS), ("RCP_BULK", _BULK))
    blocks = min(multiprocessors(), -(-vocabulary // (8 * _WARPS)))
    for first in range(0, tokens, most):
        rows = slice(first, min(first + most, tokens))
        count = rows.stop - rows.start
        defines = (("RCP_D", width), ("RCP_HALF", int(half)), ("RCP_TILES", -(-count // 8)), *sizes)
        program = kernel("head", "head_half" if half else "head_int8", defines)
        yield (
            rows,
            partial(program.launch, blocks, 32 * _WARPS, shared=ring + count * token, overlap=True),
        )
