"""Weight, activation, KV-cache and table quantizers. `weight_quantizer` makes one by its method's name."""

from __future__ import annotations

from rcpconv.quantizers.base import WeightCodes, WeightQuantizer
from rcpconv.quantizers.ldp import LDPQuantizer

METHODS = {"ldp": LDPQuantizer}
"""Every value that `--method` takes."""


def weight_quantizer(method: str, shape: tuple[int, int], group_size: int) -> WeightQuantizer:
    """The quantizer of this method for a weight of shape (N, K)."""
    return METHODS[method](*shape, group_size)


__all__ = ["METHODS", "LDPQuantizer", "WeightCodes", "WeightQuantizer", "weight_quantizer"]
