"""What passes write between kernels, for few tokens or many.

Shape suffixes: M tokens of a pass.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from rcpformat import spec
from rcpformat.architecture import Architecture
from rcprun.backends.cuda import linear

_STRIP_BYTES = 24 << 20
"""Of wide intermediate results, which are made and used up a strip of tokens at a time: so much stays in the GPU's
cache."""
_ROUND_STRIP = 64
_OF_A_STRIP = "z", "z_rotated"
_OF_FEW = frozenset({"qkv"})
"""What only passes of few tokens write."""


class Buffers:
    """What passes of up to `tokens` tokens write between kernels. The padding of codes is zero and stays it."""

    def __init__(self, architecture: Architecture, tokens: int) -> None:
        a = architecture
        rows = _float_rows(a, tokens)
        self.strip = rows["z"]
        """Tokens of a strip."""
        widths = _float_widths(a, tokens)
        self._floats = {name: cupy.empty((rows[name], width), np.float32) for name, width in widths.items()}
        self._codes = {width: cupy.zeros((tokens, linear.padded(width)), np.int8) for width in _code_widths(a)}
        self.head_codes = cupy.zeros((tokens, spec.ceil_div(a.hidden_size, 128) * 128), np.int8)
        self.scale = cupy.empty(tokens, np.float32)
        self.token = cupy.zeros(tokens, np.int32)
        self.position = cupy.zeros(tokens, np.int32)
        self.slot = cupy.zeros(tokens, np.int32)

    @staticmethod
    def bytes_needed(architecture: Architecture, tokens: int) -> int:
        """What Buffers would hold, without allocating it."""
        a = architecture
        codes = sum(map(linear.padded, _code_widths(a))) + spec.ceil_div(a.hidden_size, 128) * 128
        rows = _float_rows(a, tokens)
        floats = sum(rows[name] * width for name, width in _float_widths(a, tokens).items())
        return 4 * floats + tokens * (codes + 16)

    def floats(self, name: str, count: int) -> Any:
        """The first rows of one of the float32 buffers."""
        return self._floats[name][:count]

    def codes(self, width: int, count: int) -> tuple[Any, Any]:
        """The first rows of the codes of inputs of this width, and their scales."""
        return self._codes[width][:count], self.scale[:count]


def _float_rows(a: Architecture, tokens: int) -> dict[str, int]:
    """Of the buffers between kernels that hold floats: wide ones hold a strip."""
    strip = max(1, _STRIP_BYTES // (4 * a.intermediate_size * _ROUND_STRIP)) * _ROUND_STRIP
    return {name: min(tokens, strip) if name in _OF_A_STRIP else tokens for name in _float_widths(a, tokens)}


def _float_widths(a: Architecture, tokens: int) -> dict[str, int]:
    """Of the buffers between kernels that hold floats."""
    heads = a.num_heads * a.head_dim
    widths = {
        "x": a.hidden_size,
        "h": a.hidden_size,
        "unrotated": a.hidden_size,
        "qkv": heads + 2 * a.num_kv_heads * a.head_dim,
        "q": heads,
        "attended": heads,
        "z": a.intermediate_size,
        "z_rotated": a.intermediate_size,
    }
    return {name: width for name, width in widths.items() if tokens <= linear.MAX_TOKENS or name not in _OF_FEW}


def _code_widths(a: Architecture) -> set[int]:
    """Widths of all inputs of linear layers."""
    return {a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size}
