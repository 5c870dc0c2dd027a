"""A checkpoint as the rest of the converter sees it, and the one function that finds and reads one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.checkpoint.hf import read_hf_weights
from rcpconv.checkpoint.layout import Weights, read_optional_json
from rcpconv.checkpoint.tensors import TensorStore
from rcpconv.checkpoint.tokenizer import TokenizerFiles, read_hf_tokenizer
from rcpconv.errors import CheckpointNotFound
from rcpformat.architecture import Architecture

DEMO = "demo"
"""The name of the small model that comes with the package."""


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A float checkpoint: what the model computes, its tensors (read when asked for), tokenizer and origin."""

    name: str
    """What the user typed: a folder, a repository id, or "demo"."""
    folder: Path
    architecture: Architecture
    """`tied_table` is always False here: whether the file keeps one table is decided later."""
    tied_embeddings: bool
    """The head is the embedding, so there is no `head.weight`."""
    inv_freq: NDArray[np.float64]
    """RoPE frequencies with any static scaling applied, (head_dim/2,)."""
    tensors: TensorStore
    """Canonical names; linear weights (out, in); q and k rows in the order of rotate-half RoPE (SPEC.md §10)."""
    tokenizer: TokenizerFiles
    generation: dict[str, float]
    """Sampling defaults: any of temperature, top_k, top_p, min_p, repeat_penalty."""
    provenance: dict[str, Any]
    """base_model, revision, license, layout, dtype, parameters: JSON values, for the file's metadata."""


def load_source(model: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> SourceModel:
    """Find a checkpoint and open it; the weights stay on disk until they are asked for.

    model: "demo" (the bundled model; write ./demo for a folder of that name), a local folder, or a Hub id "org/name",
    downloaded to cache_dir (default: the Hub's cache) at a revision (branch, tag or commit).
    Raises ConversionError with the remedy for whatever cannot be loaded.
    """
    folder = _find(model, revision, cache_dir)
    weights = read_hf_weights(folder)
    return SourceModel(
        name=model,
        folder=folder,
        architecture=weights.architecture,
        tied_embeddings=weights.tied_embeddings,
        inv_freq=weights.inv_freq,
        tensors=weights.tensors,
        tokenizer=read_hf_tokenizer(folder, weights.architecture.vocab_size),
        generation=sampling_defaults(read_optional_json(folder / "generation_config.json")),
        provenance=_provenance(model, revision, folder, weights),
    )


def _find(model: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    if model == DEMO:
        return Path(str(resources.files("rcpconv") / "demo" / "model"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    raise CheckpointNotFound(f"{model}: no such folder")


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The sampling settings of a generation_config.json that are valid, under the names of the file's metadata.

    Empty when it says `do_sample: false`: the model then decodes greedily and the settings are left-overs.
    """
    if generation.get("do_sample") is False:
        return {}
    settings: dict[str, float] = {}
    for source, name, valid in (
        ("temperature", "temperature", lambda x: x >= 0),
        ("top_k", "top_k", lambda x: x >= 0 and isinstance(x, int)),
        ("top_p", "top_p", lambda x: 0 < x <= 1),
        ("min_p", "min_p", lambda x: 0 <= x <= 1),
        ("repetition_penalty", "repeat_penalty", lambda x: x > 0),
    ):
        value = generation.get(source)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and valid(value):
            settings[name] = value
    return settings


def _provenance(model: str, revision: str | None, folder: Path, weights: Weights) -> dict[str, Any]:
    names = weights.tensors.names()
    return {
        "base_model": model,
        "revision": revision,
        "layout": weights.layout,
        "dtype": str(weights.tensors.dtype(names[0])).removeprefix("torch."),
        "parameters": sum(math.prod(weights.tensors.shape(name)) for name in names),
    }
