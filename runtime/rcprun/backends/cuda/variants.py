"""The definitions that kernels are compiled with: a few sets for each `.cu` file, that differ where its code does.

Plain data, so that it can be read, and every kernel be compiled, without a GPU or CuPy. Knows nothing of launching.
"""

from __future__ import annotations

ARCHITECTURES = (80, 89, 90)
"""Compute capabilities that every kernel is compiled for in tests: A100, RTX 40, H100 and H200."""

Definitions = dict[str, int]

VARIANTS: dict[str, tuple[Definitions, ...]] = {
    "bandwidth": ({},),
    "linear": (
        {"GROUP": 128, "TOKENS": 1, "A_BITS": 4, "PROLOGUE": 1, "EPILOGUE": 0, "STAGES": 5},
        {"GROUP": 128, "TOKENS": 1, "A_BITS": 4, "PROLOGUE": 2, "EPILOGUE": 1, "STAGES": 5},
        {"GROUP": 64, "TOKENS": 8, "A_BITS": 8, "PROLOGUE": 1, "EPILOGUE": 2, "STAGES": 4},
        {"GROUP": 128, "TOKENS": 8, "A_BITS": 4, "PROLOGUE": 0, "EPILOGUE": 0, "STAGES": 4},
    ),
    "repack": ({"GROUP": 128}, {"GROUP": 64}),
}
"""Name of a `.cu` file to its definition sets, each of which defines all that the file asks for."""
