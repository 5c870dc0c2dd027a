"""Weight, activation, KV-cache and table quantizers. `weight_quantizer` makes one by its method's name."""

from __future__ import annotations

from rcpconv.quantizers.base import Learning, WeightCodes, WeightQuantizer
from rcpconv.quantizers.ldp import LDPQuantizer, LDPUniformQuantizer, LearnedClipQuantizer
from rcpconv.quantizers.r2q import R2QQuantizer
from rcpconv.quantizers.seq import SEQQuantizer
from rcpconv.quantizers.uniform import BitDistillerQuantizer, RoundToNearestQuantizer

METHODS: dict[str, type[WeightQuantizer]] = {
    "ldp": LDPQuantizer,
    "ldp-udq": LDPUniformQuantizer,
    "lc": LearnedClipQuantizer,
    "uniform": BitDistillerQuantizer,
    "seq": SEQQuantizer,
    "r2q": R2QQuantizer,
    "rtn": RoundToNearestQuantizer,
}
"""Every value that `--method` takes."""


def weight_quantizer(
    method: str, shape: tuple[int, int], group_size: int, learning: Learning | None = None
) -> WeightQuantizer:
    """The quantizer of this method for a weight of shape (N, K)."""
    quantizer = METHODS[method](*shape, group_size)
    quantizer.learning = learning or quantizer.learning
    return quantizer


__all__ = ["METHODS", "LDPQuantizer", "Learning", "WeightCodes", "WeightQuantizer", "weight_quantizer"]
