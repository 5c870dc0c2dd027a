"""The definitions that kernels are compiled with: a few sets for each `.cu` file, that differ where its code does.

Plain data, so that every kernel can be compiled without a GPU or CuPy. Knows nothing of launching.
"""

from __future__ import annotations

ARCHITECTURES = (80, 89, 90)
"""Compute capabilities that every kernel is compiled for in tests: A100, RTX 40, H100 and H200."""

Definitions = dict[str, int]


def _layout(dense: int, columns: int, groups: int, row_parts: int, mt: int, nt: int, codes: int) -> Definitions:
    """Of hadamard.cu."""
    shape = {"DENSE": dense, "COLUMNS": columns, "GROUPS": groups, "ROW_PARTS": row_parts}
    return {**shape, "MT": mt, "NT": nt, "CODES": codes}


VARIANTS: dict[str, tuple[Definitions, ...]] = {
    "attention": (
        {"HEAD_DIM": 128, "BITS": 4},
        {"HEAD_DIM": 64, "BITS": 8},
        {"HEAD_DIM": 20, "BITS": 4},
        {"HEAD_DIM": 512, "BITS": 4},
    ),
    "bandwidth": ({},),
    "embed": ({"RCP_STRIDES": 4, "RCP_THREADS": 256},),
    "expand": ({"GROUP": 128}, {"GROUP": 64}),
    "hadamard": (
        _layout(dense=60, columns=8, groups=1, row_parts=1, mt=1, nt=1, codes=1),  # 480
        _layout(dense=64, columns=64, groups=1, row_parts=1, mt=2, nt=4, codes=1),  # 4096, many tokens
        _layout(dense=344, columns=32, groups=4, row_parts=2, mt=1, nt=1, codes=0),  # 11008, few tokens
        _layout(dense=344, columns=32, groups=2, row_parts=1, mt=2, nt=2, codes=0),  # 11008, many
    ),
    "hadamard_plain": ({},),
    "head": (
        {"RCP_D": 4096, "RCP_HALF": 0, "RCP_TILES": 1, "RCP_WARPS": 8},
        {"RCP_D": 1001, "RCP_HALF": 1, "RCP_TILES": 1, "RCP_WARPS": 8},
        {"RCP_D": 192, "RCP_HALF": 0, "RCP_TILES": 4, "RCP_WARPS": 2},
    ),
    "linear": (
        {"GROUP": 128, "TOKENS": 1, "A_BITS": 4, "PROLOGUE": 1, "EPILOGUE": 0, "PLANES": 1, "STAGES": 3},
        {"GROUP": 128, "TOKENS": 1, "A_BITS": 4, "PROLOGUE": 2, "EPILOGUE": 1, "PLANES": 1, "STAGES": 3},
        {"GROUP": 64, "TOKENS": 1, "A_BITS": 8, "PROLOGUE": 1, "EPILOGUE": 2, "PLANES": 0, "STAGES": 3},
        {"GROUP": 128, "TOKENS": 8, "A_BITS": 4, "PROLOGUE": 0, "EPILOGUE": 0, "PLANES": 0, "STAGES": 3},
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
    "sample": ({"RCP_CHUNK": 4096, "RCP_FIELDS": 16390},),
}
"""Name of a `.cu` file to its definition sets, each of which defines all that the file asks for."""

HOPPER_VARIANTS: dict[str, tuple[Definitions, ...]] = {
    "hadamard": (
        _layout(dense=16, columns=256, groups=4, row_parts=1, mt=1, nt=1, codes=1),  # 4096, few tokens
        _layout(dense=344, columns=32, groups=4, row_parts=2, mt=1, nt=1, codes=1),  # 11008, few
    ),
}
"""The same, of definitions that only clusters of blocks (sm_90) can do."""
