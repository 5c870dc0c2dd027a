"""2-bit linear layers on the GPU: packed once, then multiplied with the codes of 1 to 8 tokens. Launches linear.cu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np

from rcpformat import spec
from rcpformat.codec import PackedLinear
from rcprun.backends.cuda.launch import NO_HOPPER, check, has_hopper, kernel, multiprocessors

MAX_TOKENS = 8
"""Of one launch."""
UNIT_COLUMNS = 128
TILE_ROWS = 16

# Prologues and epilogues of linear.cu.
CODES, NORMALIZE, QUANTIZE = 0, 1, 2
STORE, ADD, SWIGLU = 0, 1, 2

_WARPS, _STAGE_UNITS = 16, 2
_PLANE_BYTES = 272
"""Of shared memory for the planes of a unit, where products go by them."""
_MOST_SLOTS_FOR_FEW, _LEAST_SLOTS = 5, 2
"""Pieces of weights in shared memory (kernels/stream.cuh): at most for several tokens, and at least."""
HALF_SHARED, _WHOLE_SHARED = 112 * 1024, 200 * 1024
"""Bytes of shared memory for a block: of one token, when a multiprocessor has two, since the next layer's first weights
come during this one; and of several tokens, whose blocks take too many registers for that."""
_FLIGHT = 3
"""Pieces asked for at a time, once the activations are there."""


def padded(columns: int) -> int:
    """Bytes of a token's codes: columns, up to whole stages of units."""
    return spec.ceil_div(columns, _STAGE_UNITS * UNIT_COLUMNS) * _STAGE_UNITS * UNIT_COLUMNS


def _unit_bytes(group: int) -> int:
    return 512 + 64 * (UNIT_COLUMNS // group)


class UnitLinear:
    """One or several linear layers of the same input as units: rows after each other, or gate and up interleaved."""

    def __init__(self, layers: Sequence[PackedLinear], *, interleave: bool = False) -> None:
        """layers: as the file holds them. interleave: they are gate and up, for SWIGLU."""
        assert not interleave or len(layers) == 2
        self.interleaved = interleave
        self.k = layers[0].shape[1]
        self.group = min(layer.group_size for layer in layers)
        self.units = padded(self.k) // UNIT_COLUMNS
        rows = sum(layer.shape[0] for layer in layers)
        self.n = rows // 2 if interleave else rows
        self.tiles = spec.ceil_div(self.n, TILE_ROWS // 2 if interleave else TILE_ROWS)
        self.unit_TU = cupy.zeros((self.tiles, self.units, _unit_bytes(self.group)), dtype=np.uint8)
        self.scale_R = cupy.zeros(self.tiles * TILE_ROWS, dtype=np.float32)
        biased = any(layer.bias is not None for layer in layers)
        self.bias_R = cupy.zeros(self.tiles * TILE_ROWS, dtype=np.float32) if biased else None
        self.blocks = min(self.tiles, multiprocessors())
        base = 0
        for side, layer in enumerate(layers):
            self._repack(layer, base, side if interleave else -1)
            base += layer.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.unit_TU.nbytes + self.scale_R.nbytes * (1 if self.bias_R is None else 2))

    def _repack(self, layer: PackedLinear, base: int, side: int) -> None:
        n, k = layer.shape
        assert k == self.k
        levels = layer.levels.repeat(layer.group_size // self.group, axis=1)  # of layers whose groups are larger
        codes, levels, scale = (cupy.asarray(np.ascontiguousarray(part)) for part in (layer.codes, levels, layer.scale))
        bias = None if layer.bias is None else cupy.asarray(np.ascontiguousarray(layer.bias))
        kernel("repack", "repack", (("GROUP", self.group),)).launch(
            spec.ceil_div(n * self.units * 4, 256),
            256,
            (
                codes,
                levels,
                scale,
                bias,
                *map(np.int32, (n, codes.shape[1], levels.shape[1])),
                self.unit_TU,
                self.scale_R,
                self.bias_R,
                *map(np.int32, (self.tiles, self.units, self.blocks, base, side)),
            ),
        )


def linear(
    weights: UnitLinear,
    x: Any,
    out: Any,
    *,
    prologue: int,
    epilogue: int,
    a_bits: int,
    x_scale: Any | None = None,
    clip: np.float32 | None = None,
    eps: float = 0.0,
    shared_limit: int = HALF_SHARED,
    overlap: bool = False,
    hopper: bool = True,
) -> None:
    """out (m, n) float32 of x: codes int8 (m, padded(k)) with x_scale (m,) for CODES, else float32 (m, k).

    NORMALIZE and QUANTIZE, of one token, take a clip, NORMALIZE an eps. ADD adds to what is in out. SWIGLU needs
    interleaved weights.
    shared_limit: bytes of shared memory that a block for one token takes, at most, where its weights leave a choice.
    overlap: start while the kernel before still runs.
    hopper: False takes the path for GPUs before sm_90 everywhere.
    """
    m = len(x)
    assert m == 1 or prologue == CODES
    assert 1 <= m <= MAX_TOKENS and (epilogue == SWIGLU) == weights.interleaved
    at_once = _tokens_at_once(weights)
    if m > at_once:
        assert x_scale is not None
        for first in range(0, m, at_once):
            part = slice(first, first + at_once)
            linear(
                weights,
                x[part],
                out[part],
                prologue=prologue,
                epilogue=epilogue,
                a_bits=a_bits,
                x_scale=x_scale[part],
                overlap=overlap,
                hopper=hopper,
            )
        return
    if prologue == CODES:
        check(x, "x", np.int8, (m, weights.units * UNIT_COLUMNS))
        check(x_scale, "x_scale", np.float32, (m,))
    else:
        check(x, "x", np.float32, (m, weights.k))
    check(out, "out", np.float32, (m, weights.n))
    planes = int(m == 1 and a_bits == 4 and weights.group == 128)
    if planes:
        shared = weights.units * _PLANE_BYTES + _sum_bytes(weights, 1)
    else:
        shared = _shared(weights, 1 if m == 1 else at_once)
    piece = _piece_bytes(weights)
    pieces = spec.ceil_div(spec.ceil_div(weights.tiles, weights.blocks) * weights.units // _STAGE_UNITS, _WARPS)
    most, limit = (pieces, shared_limit) if m == 1 else (min(pieces, _MOST_SLOTS_FOR_FEW), _WHOLE_SHARED)
    slots = max(_LEAST_SLOTS, min(most, (min(limit, _shared_at_most()) - shared) // piece))
    defines = {
        "CHANNELS": weights.k,
        "GROUP": weights.group,
        "TOKENS": 1 if m == 1 else MAX_TOKENS,
        "A_BITS": a_bits,
        "PROLOGUE": prologue,
        "EPILOGUE": epilogue,
        "PLANES": planes,
        "SLOTS": slots,
        "FLIGHT": min(_FLIGHT, slots),
    }
    kernel("linear", "linear", _defines(defines, hopper)).launch(
        weights.blocks,
        (_WARPS + (hopper and has_hopper())) * 32,
        (
            weights.unit_TU,
            weights.scale_R,
            weights.bias_R,
            x,
            x_scale,
            out,
            *map(np.int32, (m, weights.n, weights.tiles)),
            np.float32(0 if clip is None else clip),
            np.float32(eps),
        ),
        shared=shared + slots * piece,
        overlap=overlap,
    )


def _tokens_at_once(weights: UnitLinear) -> int:
    """As many as find room in shared memory beside the fewest pieces of weights: all, or a half, or so on."""
    tokens = MAX_TOKENS
    while tokens > 1 and _shared(weights, tokens) + _LEAST_SLOTS * _piece_bytes(weights) > _shared_at_most():
        tokens //= 2
    return tokens


def _shared(weights: UnitLinear, tokens: int) -> int:
    """Bytes of shared memory for codes and sums of some tokens."""
    return tokens * (weights.units * UNIT_COLUMNS + 16) + _sum_bytes(weights, 1 if tokens == 1 else MAX_TOKENS)


def _sum_bytes(weights: UnitLinear, tokens: int) -> int:
    """The same for sums, scales and biases of a block's rows."""
    return spec.ceil_div(weights.tiles, weights.blocks) * TILE_ROWS * 4 * (tokens + 2)


def _piece_bytes(weights: UnitLinear) -> int:
    return _WARPS * _STAGE_UNITS * _unit_bytes(weights.group)


@cache
def _shared_at_most() -> int:
    """Bytes of shared memory that a block can have besides what linear.cu declares."""
    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]) - 4096


def _defines(defines: Mapping[str, int], hopper: bool) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((defines if hopper else {**defines, NO_HOPPER: 1}).items()))
