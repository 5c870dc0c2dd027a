"""Looks tokens up in the embedding. Launches kernels/embed.cu; knows nothing of where ids come from.

Shape suffixes: M tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

import cupy
import numpy as np

from rcprun.backends.cuda.launch import check, kernel

_THREADS = 256
_STRIDES = 4


def embed(ids_M: cupy.ndarray, table_VD: cupy.ndarray, scale_V: cupy.ndarray | None, x_MD: cupy.ndarray) -> None:
    """SPEC.md, "Embedding": x = table[ids], of an int8 table with row scales or a float16 one.

    ids: int32; x: float32. An id out of range gives a row of NaN. The first kernel of a pass through the model: it
    starts when all before it have ended, so that later ones may read at once what earlier passes wrote.
    """
    (tokens,), (vocabulary, width) = ids_M.shape, table_VD.shape
    check(ids_M, "ids", np.int32, (None,))
    check(table_VD, "table", np.float16 if scale_V is None else np.int8, (None, None))
    check(x_MD, "x", np.float32, (tokens, width))
    scales = [] if scale_V is None else [check(scale_V, "scale", np.float32, (vocabulary,))]
    name = "embed_half" if scale_V is None else "embed_int8"
    kernel("embed", name, (("RCP_STRIDES", _STRIDES), ("RCP_THREADS", _THREADS))).launch(
        (-(-width // (_THREADS * _STRIDES)), tokens, 1),
        _THREADS,
        [ids_M, table_VD, *scales, x_MD, np.int32(vocabulary), np.int32(width)],
    )
