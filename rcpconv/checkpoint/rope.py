"""RoPE frequencies of the static scaling rules, in float64. Knows nothing of files or tensors.

The rules are those of transformers' `modeling_rope_utils`, whose results (float32) these agree with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.errors import BadConfig, UnsupportedRope

Float64Array = NDArray[np.float64]


def rope_frequencies(rope: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[Float64Array, float]:
    """(inv_freq float64 (head_dim/2,), factor on cos and sin) for a configuration's `rope_parameters`.

    rope: `rope_type` (default, linear, llama3, yarn), `rope_theta` and the numbers of the rule. max_positions is the
    context length in tokens. Raises UnsupportedRope for any other rule, BadConfig for missing or impossible numbers.
    """
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _RULES:
        raise UnsupportedRope(
            f"rope_type: expected one of {sorted(_RULES)}, found {kind!r}; a rule that depends on the sequence length "
            "has no fixed table, so set another rope_type in config.json if the model was trained without this one"
        )
    if (partial := rope.get("partial_rotary_factor")) not in (None, 1):
        raise UnsupportedRope(f"partial_rotary_factor: only 1 (RoPE on the whole head) is supported, found {partial!r}")
    theta = _number(rope, "rope_theta")
    if theta <= 1:
        raise BadConfig(f"rope_parameters.rope_theta: expected a number above 1, found {theta}")
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return _RULES[kind](plain, rope, max_positions)


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if rope.get(key) is None else rope[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise BadConfig(f"rope_parameters.{key}: expected a number above 0, found {rope.get(key)!r}")
    return float(value)


def _default(plain: Float64Array, rope: Mapping[str, Any], max_positions: int) -> tuple[Float64Array, float]:
    return plain, 1.0


def _linear(plain: Float64Array, rope: Mapping[str, Any], max_positions: int) -> tuple[Float64Array, float]:
    return plain / _number(rope, "factor"), 1.0


def _llama3(plain: Float64Array, rope: Mapping[str, Any], max_positions: int) -> tuple[Float64Array, float]:
    """LLaMA-3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise BadConfig(f"rope_parameters: expected high_freq_factor above low_freq_factor, found {high} and {low}")
    turns = _number(rope, "original_max_position_embeddings", max_positions) * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (keep + (1 - keep) / factor), 1.0


def _yarn(plain: Float64Array, rope: Mapping[str, Any], max_positions: int) -> tuple[Float64Array, float]:
    """YaRN (arXiv 2309.00071), with transformers' rules for `attention_factor`, `mscale` and `truncate`."""
    half = len(plain)
    original = _number(rope, "original_max_position_embeddings", max_positions)
    factor = _number(rope, "factor", max_positions / original)
    theta = _number(rope, "rope_theta")

    def dimension(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    low, high = dimension(_number(rope, "beta_fast", 32)), dimension(_number(rope, "beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    interpolate = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
    inv_freq = plain * (interpolate / factor + (1 - interpolate))
    if rope.get("attention_factor") is not None:
        return inv_freq, _number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return inv_freq, magnitude(_number(rope, "mscale")) / magnitude(_number(rope, "mscale_all_dim"))
    return inv_freq, magnitude(1)


_RULES: dict[str, Callable[[Float64Array, Mapping[str, Any], int], tuple[Float64Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
