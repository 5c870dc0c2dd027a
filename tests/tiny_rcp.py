"""Small random models for tests: valid metadata and tensors for any architecture and quantization.

Only integer draws, exact arithmetic and powers of two, so that the same seed gives the same bytes everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpformat import Architecture, Quantization, RcpMetadata, TokenizerInfo, pack_codes, spec, write_rcp
from rcpformat.writer import TensorSource

Tensors = dict[str, NDArray[Any]]

TINY = Architecture(
    model_type="llama",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
"""The smallest ordinary model; vary it with dataclasses.replace."""

LDP = Quantization(method="ldp")


def tiny_tokenizer(vocab_size: int) -> bytes:
    """A word-level tokenizer.json: ids 0, 1, 2 are <unk>, <s>, </s>, then w3, w4, ... as far as the vocabulary goes."""
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, vocab_size)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words[:vocab_size])},
            "unk_token": "<unk>",
        },
    }
    return json.dumps(tokenizer, separators=(",", ":")).encode()


def random_metadata(architecture: Architecture, quantization: Quantization) -> RcpMetadata:
    """Metadata whose special tokens fit the vocabulary and tiny_tokenizer."""
    last = architecture.vocab_size - 1
    return RcpMetadata(
        architecture=architecture,
        quantization=quantization,
        tokenizer=TokenizerInfo(bos_id=min(1, last), eos_ids=(min(2, last),), add_bos=True, chat_template=None),
        generation={"temperature": 0.7, "top_p": 0.9},
        provenance={"base_model": "random", "license": "Apache-2.0"},
    )


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> NDArray[np.float64]:
    return low + rng.integers(0, 1 << 16, shape) * ((high - low) / 65535)


def random_model(architecture: Architecture, quantization: Quantization, seed: int) -> tuple[RcpMetadata, Tensors]:
    """(metadata, tensors by name). Weights have magnitudes that keep activations near 1."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, form in spec.expected_tensors(architecture, quantization).items():
        owner, _, part = name.rpartition(".")
        shape = tuple(size or 0 for size in form.shape)
        array: NDArray[Any]
        if part == "codes":
            n, k = spec.linear_shape(architecture, spec.linear_kind(owner))
            array = pack_codes(rng.integers(0, 4, (n, k), dtype=np.uint8))
        elif part == "levels":
            array = np.sort(rng.integers(-127, 128, shape, dtype=np.int8), axis=-1)
        elif part == "scale" and owner in (spec.EMBED, spec.HEAD):
            array = _uniform(rng, shape, 0.005, 0.01)
        elif part == "scale":
            columns = spec.linear_shape(architecture, spec.linear_kind(owner))[1]
            array = _uniform(rng, shape, 0.5, 1.5) / (64 * math.sqrt(columns))
        elif part == "bias":
            array = _uniform(rng, shape, -0.25, 0.25)
        elif part in ("act_clip", "kv_clip"):
            array = _uniform(rng, shape, 0.75, 1.0)
        elif part in ("q_norm", "k_norm", "gain"):
            array = _uniform(rng, shape, 0.5, 1.5)
        elif part == "weight" and form.dtype == "I8":
            array = rng.integers(-127, 128, shape, dtype=np.int8)
        elif part == "weight":
            array = _uniform(rng, shape, -1.0, 1.0)
        elif part == "signs":
            array = rng.integers(0, 2, shape, dtype=np.int8) * 2 - 1
        elif part == "inv_freq":
            array = 0.5 ** np.arange(shape[0])
        else:
            array = np.frombuffer(tiny_tokenizer(architecture.vocab_size), dtype=np.uint8)
        tensors[name] = array.astype(spec.DTYPES[form.dtype])
    return random_metadata(architecture, quantization), tensors


def sources(tensors: Mapping[str, NDArray[Any]]) -> dict[str, TensorSource]:
    """Arrays in the form that write_rcp takes."""
    return {name: lambda array=array: array for name, array in tensors.items()}  # type: ignore[misc]


def write_random(
    path: Path,
    architecture: Architecture = TINY,
    quantization: Quantization = LDP,
    seed: int = 0,
    **metadata_changes: Any,
) -> tuple[RcpMetadata, Tensors]:
    """Write a random model to `path`; returns what was written. metadata_changes: fields of RcpMetadata to replace."""
    metadata, tensors = random_model(architecture, quantization, seed)
    metadata = dataclasses.replace(metadata, **metadata_changes)
    write_rcp(path, metadata, sources(tensors))
    return metadata, tensors
