"""RoPE frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rcpconv.checkpoint.rope import rope_frequencies
from rcpconv.errors import BadConfig, UnsupportedRope

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        YARN | {"factor": 1.0},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
        YARN | {"mscale": 0.707},
        YARN | {"beta_fast": 16, "beta_slow": 2},
        YARN | {"truncate": False},
        YARN | {"original_max_position_embeddings": 8, "rope_theta": 1e4},
    ],
    ids=str,
)
def test_rules_agree_with_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=8 * head_dim, num_attention_heads=8, max_position_embeddings=16384, rope_parameters=dict(rope)
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=None)
    ours, factor = rope_frequencies(config.rope_parameters, head_dim, 16384)
    assert ours.dtype == np.float64
    # theirs: a power (2 ulp of its logarithm, up to ln(1e6) = 14 of them) and a few operations in float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=32 * 2**-24)
    assert factor == pytest.approx(their_factor, rel=1e-12)


def test_default_rule() -> None:
    inv_freq, factor = rope_frequencies({"rope_type": "default", "rope_theta": 10000}, 8, 128)
    np.testing.assert_allclose(inv_freq, [1, 0.1, 0.01, 0.001], rtol=1e-15)
    assert factor == 1


@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, UnsupportedRope, "default.*linear.*llama3.*yarn"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, UnsupportedRope, "partial_rotary_factor"),
        ({}, BadConfig, "rope_theta"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": True}, BadConfig, "factor"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": float("nan")}, BadConfig, "factor"),
        (LLAMA3 | {"factor": 8, "high_freq_factor": 1.0}, BadConfig, "high_freq_factor"),
    ],
)
def test_refused_rules(rope: dict[str, Any], error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        rope_frequencies(rope, 64, 4096)
