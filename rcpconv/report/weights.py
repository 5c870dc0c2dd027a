"""How far quantized weights are from the rotated originals, and how their levels, clips and partitions lie.

Works on the tensors of a file, so that it serves every method. Clip ratios are relative to the extremes of each group
of the rotated original. Knows nothing of plots.

Shape suffixes: N out-features, K in-features, G groups along K, g weights of one group, 4 levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rcpconv.inspection import code_counts
from rcpconv.prepare import PreparedModel
from rcpconv.quantizers.base import to_groups
from rcpformat import spec
from rcpformat.architecture import Quantization
from rcpformat.codec import PackedLinear

Array = NDArray[Any]

LEVEL_VALUES = np.arange(-spec.LEVEL_LIMIT, spec.LEVEL_LIMIT + 1)
CLIP_EDGES = np.linspace(0, 1.5, 76)
"""Bins of clip ratios; what is beyond counts in the outermost."""
GAP_EDGES = np.linspace(0, 1, 51)
"""Bins of partition gaps."""


def _counts(values: Array, edges: Array) -> Array:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


@dataclass
class WeightStatistics:
    """Of all linear layers of one model."""

    errors: dict[str, float] = field(default_factory=dict)
    """Linear -> ‖quantized − original‖ / ‖original‖."""
    codes_4: Array = field(default_factory=lambda: np.zeros(4, np.int64))
    """Weights by their code."""
    levels_4L: Array = field(default_factory=lambda: np.zeros((4, len(LEVEL_VALUES)), np.int64))
    """Groups by the int8 value of each of their levels."""
    clips_2: Array = field(default_factory=lambda: np.zeros((2, len(CLIP_EDGES) - 1), np.int64))
    """Groups by the ratio of their lowest level to the smallest original weight, and of the highest to the largest."""
    gaps_3: Array = field(default_factory=lambda: np.zeros((3, len(GAP_EDGES) - 1), np.int64))
    """Groups by the distances Δ1, Δ2, Δ3 of neighbouring levels, relative to the whole span (RCP, section 3.3)."""

    def add(self, linear: PackedLinear, original_NK: Array) -> None:
        """Count one layer."""
        whole = float(np.linalg.norm(original_NK))
        self.errors[linear.name] = float(np.linalg.norm(linear.weights() - original_NK)) / max(whole, 1e-30)
        self.codes_4 += code_counts(linear.codes, linear.shape[1])
        levels_NG4 = linear.levels.astype(np.int64)
        for code in range(spec.LEVELS_PER_GROUP):
            values = levels_NG4[..., code].reshape(-1) + spec.LEVEL_LIMIT
            self.levels_4L[code] += np.bincount(values, minlength=len(LEVEL_VALUES))
        self._add_clips(linear, original_NK)
        span_NG = levels_NG4[..., 3] - levels_NG4[..., 0]
        gaps = np.diff(levels_NG4, axis=-1)[span_NG > 0] / span_NG[span_NG > 0][:, None]
        for i in range(3):
            self.gaps_3[i] += _counts(gaps[:, i], GAP_EDGES)

    def _add_clips(self, linear: PackedLinear, original_NK: Array) -> None:
        grouped_NGg = to_groups(torch.from_numpy(original_NK), linear.group_size).numpy()
        ends = ((grouped_NGg.min(-1), linear.levels[..., 0]), (grouped_NGg.max(-1), linear.levels[..., 3]))
        for i, (extreme_NG, level_NG) in enumerate(ends):
            sign = (-1, 1)[i]
            real = sign * extreme_NG > 0
            ratio = (level_NG * linear.scale[:, None])[real] / extreme_NG[real]
            self.clips_2[i] += _counts(ratio, CLIP_EDGES)


def weight_statistics(
    prepared: PreparedModel, quantization: Quantization, models: Mapping[str, Callable[[str], Array]]
) -> dict[str, WeightStatistics]:
    """Statistics of each model against the rotated original. models: name -> what gives a tensor by its file name."""
    found = {name: WeightStatistics() for name in models}
    for tensor_name, original in prepared.tensors():
        linear, _, part = tensor_name.rpartition(".")
        if part != "weight" or not linear.startswith("layers."):
            continue
        n, k = original.shape
        for name, tensor in models.items():
            packed = PackedLinear(
                name=linear,
                shape=(n, k),
                group_size=quantization.group_of(linear),
                codes=tensor(linear + ".codes"),
                levels=tensor(linear + ".levels"),
                scale=tensor(linear + ".scale"),
            )
            found[name].add(packed, original.cpu().numpy())
    return found


def clips(tensor: Callable[[str], Array], layers: int) -> dict[str, list[float]]:
    """Clip ratios of activations, keys and values: site -> one a layer."""
    found: dict[str, list[float]] = {site: [] for site in (*spec.ACTIVATION_SITES, *spec.KV_SITES)}
    for i in range(layers):
        prefix = spec.layer_prefix(i)
        values = [*tensor(prefix + "act_clip"), *tensor(prefix + "kv_clip")]
        for site, value in zip(found, values, strict=True):
            found[site].append(float(value))
    return found
