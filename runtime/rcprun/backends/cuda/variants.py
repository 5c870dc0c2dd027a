"""The definitions that kernels are compiled with: a few sets for each `.cu` file, that differ where its code does.

Plain data, so that every kernel can be compiled without a GPU or CuPy. Knows nothing of launching.
"""

from __future__ import annotations

from rcpformat.hadamard import hadamard_factor
from rcprun.backends.cuda.hadamard_layout import best_layout

ARCHITECTURES = (80, 89, 90)
"""Compute capabilities that every kernel is compiled for in tests: A100, RTX 40, H100 and H200."""

Definitions = dict[str, int]


def _head(width: int, half: int, tiles: int, segment: int, stages: int, bulk: int) -> Definitions:
    shape = {"RCP_D": width, "RCP_HALF": half, "RCP_TILES": tiles, "RCP_WARPS": 8}
    return {**shape, "RCP_SEGMENT": segment, "RCP_STAGES": stages, "RCP_BULK": bulk}


def _hadamard(width: int, *, few: bool, codes: int) -> Definitions:
    """Of hadamard.cu."""
    layout = best_layout(hadamard_factor(width), few=few)
    assert layout is not None
    return {**dict(layout.defines), "CODES": codes}


def _linear(
    channels: int, tokens: int, a_bits: int, group: int, prologue: int, epilogue: int, slots: int
) -> Definitions:
    """Of linear.cu."""
    planes = int(tokens == 1 and a_bits == 4 and group == 128)
    form = {"GROUP": group, "TOKENS": tokens, "A_BITS": a_bits, "PROLOGUE": prologue, "EPILOGUE": epilogue}
    return {**form, "CHANNELS": channels, "PLANES": planes, "SLOTS": slots, "FLIGHT": min(3, slots)}


def _decode(
    head_dim: int, bits: int, *, warps: int, stages: int, cluster: int, paley: int = -1, hadamard: int = 1
) -> Definitions:
    """Of attention.cu. paley: of what is fused; -1: nothing is."""
    shape = {"HEAD_DIM": head_dim, "BITS": bits, "WARPS": warps, "STAGES": stages, "EARLY": 5, "CLUSTER": cluster}
    return {**shape, "FUSED": int(paley >= 0), "PALEY": max(0, paley), "HADAMARD": hadamard}


VARIANTS: dict[str, tuple[Definitions, ...]] = {
    "attention": (
        _decode(128, 4, warps=8, stages=3, cluster=1, paley=1, hadamard=128),
        _decode(64, 8, warps=8, stages=2, cluster=1, paley=0, hadamard=64),
        _decode(20, 4, warps=8, stages=3, cluster=1, paley=20, hadamard=20),
        _decode(512, 8, warps=2, stages=2, cluster=1),
    ),
    "bandwidth": ({},),
    "embed": ({"RCP_STRIDES": 4, "RCP_THREADS": 256},),
    "expand": ({"GROUP": 128}, {"GROUP": 64}),
    "hadamard": (
        _hadamard(480, few=True, codes=1),
        _hadamard(4096, few=False, codes=1),
        _hadamard(11008, few=True, codes=0),
        _hadamard(11008, few=False, codes=0),
    ),
    "hadamard_plain": ({},),
    "head": (
        _head(4096, half=0, tiles=1, segment=512, stages=3, bulk=1),
        _head(1001, half=1, tiles=1, segment=512, stages=3, bulk=1),
        _head(192, half=0, tiles=4, segment=1024, stages=2, bulk=0),
    ),
    "linear": (
        _linear(4096, tokens=1, a_bits=4, group=128, prologue=1, epilogue=0, slots=5),
        _linear(11008, tokens=1, a_bits=4, group=128, prologue=2, epilogue=1, slots=4),
        _linear(11008, tokens=1, a_bits=4, group=128, prologue=0, epilogue=1, slots=4),
        _linear(172, tokens=1, a_bits=8, group=64, prologue=1, epilogue=2, slots=5),
        _linear(4096, tokens=8, a_bits=4, group=128, prologue=0, epilogue=2, slots=4),
        _linear(11008, tokens=8, a_bits=8, group=64, prologue=0, epilogue=0, slots=2),
    ),
    "norm": (
        {"RCP_K": 4096, "RCP_THREADS": 512},
        {"RCP_K": 11008, "RCP_THREADS": 1024},
        {"RCP_K": 1001, "RCP_THREADS": 512},
    ),
    "prefill_attention": (
        {"HEAD_DIM": 128, "BITS": 4, "BLOCK_WARPS": 4, "TILE_TOKENS": 64, "PARTS": 1},
        {"HEAD_DIM": 64, "BITS": 8, "BLOCK_WARPS": 4, "TILE_TOKENS": 64, "PARTS": 1},
        {"HEAD_DIM": 20, "BITS": 4, "BLOCK_WARPS": 4, "TILE_TOKENS": 64, "PARTS": 1},
        {"HEAD_DIM": 512, "BITS": 4, "BLOCK_WARPS": 1, "TILE_TOKENS": 16, "PARTS": 2},
    ),
    "repack": ({"GROUP": 128}, {"GROUP": 64}),
    "rescale": ({"EPILOGUE": 0, "WHOLE": 1}, {"EPILOGUE": 1, "WHOLE": 0}, {"EPILOGUE": 2, "WHOLE": 1}),
    "rope": (
        {"HEAD_DIM": 128, "BITS": 4, "PALEY": 1, "HADAMARD": 128},
        {"HEAD_DIM": 64, "BITS": 8, "PALEY": 0, "HADAMARD": 64},
        {"HEAD_DIM": 20, "BITS": 4, "PALEY": 20, "HADAMARD": 20},
    ),
    "rope_lanes": (
        {"HEAD_DIM": 128, "BITS": 4, "PALEY": 1, "HADAMARD": 128},
        {"HEAD_DIM": 64, "BITS": 8, "PALEY": 0, "HADAMARD": 64},
    ),
    "rope_many": (
        {"HEAD_DIM": 96, "BITS": 4, "PALEY": 12, "HADAMARD": 96},
        {"HEAD_DIM": 20, "BITS": 8, "PALEY": 20, "HADAMARD": 20},
    ),
    "sample": ({"RCP_FIELDS": 18438, "RCP_QUADS": 2}, {"RCP_FIELDS": 18438, "RCP_QUADS": 8}),
    "sample_all": ({"RCP_CHUNK": 4096, "RCP_FIELDS": 18438},),
    "swiglu_hadamard": (
        {"DENSE": 344, "COLUMNS": 32, "MT": 2, "NT": 2, "PASSES": 2, "BIASED": 0},  # 11008
        {"DENSE": 112, "COLUMNS": 128, "MT": 2, "NT": 2, "PASSES": 4, "BIASED": 0},  # 14336
        {"DENSE": 44, "COLUMNS": 32, "MT": 1, "NT": 4, "PASSES": 1, "BIASED": 1},  # 1408
    ),
}
"""Name of a `.cu` file to its definition sets, each of which defines all that the file asks for."""

HOPPER_VARIANTS: dict[str, tuple[Definitions, ...]] = {
    "attention": (
        _decode(128, 4, warps=8, stages=3, cluster=8, paley=1, hadamard=128),
        _decode(64, 8, warps=8, stages=3, cluster=4),
        _decode(256, 8, warps=4, stages=3, cluster=2, paley=0, hadamard=256),
    ),
    "hadamard": (
        _hadamard(8192, few=True, codes=1),
        _hadamard(11008, few=True, codes=1),
        _hadamard(11008, few=False, codes=1),
        _hadamard(13824, few=True, codes=1),
    ),
}
"""The same, of definitions that only clusters of blocks (sm_90) can do."""
