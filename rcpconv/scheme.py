"""Quantization schemes of runs: those of the file format, and some for comparison only. Knows nothing of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rcpformat.architecture import Quantization

WEIGHT_BITS = 2
"""Of what a file holds."""
UNQUANTIZED = 16
"""As a_bits or kv_bits: activations or the KV cache are left as they are."""


@dataclass(frozen=True, kw_only=True)
class ComparisonQuantization(Quantization):
    """A scheme with activations or a KV cache that are not quantized, which no file can hold."""

    ACTIVATION_BITS: ClassVar[tuple[int, ...]] = (4, 8, UNQUANTIZED)


def read_scheme(value: object) -> Quantization:
    """A scheme from its JSON form; a ComparisonQuantization where it says so. Raises BadMetadata."""
    compared = isinstance(value, Mapping) and UNQUANTIZED in (value.get("a_bits"), value.get("kv_bits"))
    return (ComparisonQuantization if compared else Quantization).from_json(value)
