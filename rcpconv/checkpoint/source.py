"""A checkpoint as the rest of the converter sees it, and the one function that finds and reads one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.repocard import metadata_load
from numpy.typing import NDArray
from yaml import YAMLError  # type: ignore[import-untyped]

from rcpconv.checkpoint.download import download_checkpoint
from rcpconv.checkpoint.hf import outline_hf, read_hf_weights
from rcpconv.checkpoint.layout import (
    HF_SAFETENSORS,
    META,
    Layout,
    Weights,
    choose_layout,
    read_json,
    read_optional_json,
)
from rcpconv.checkpoint.meta import outline_meta, read_meta_weights
from rcpconv.checkpoint.tensors import TensorStore
from rcpconv.checkpoint.tokenizer import TokenizerFiles, read_hf_tokenizer, read_meta_tokenizer
from rcpconv.errors import CheckpointNotFound, UnsupportedFormat
from rcpformat.architecture import Architecture
from rcpformat.spec import GENERATION_LIMITS

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
    """JSON values for the file's metadata: base_model, revision, license, layout, dtype, parameters."""


Judge = Callable[[Architecture, bool], None]
"""Sees the architecture of a Hub model, and whether its embeddings may be tied, before its weights are fetched."""


def load_source(
    model: str, *, revision: str | None = None, cache_dir: str | Path | None = None, judge: Judge | None = None
) -> SourceModel:
    """Find a checkpoint and open it; the weights stay on disk until they are asked for.

    model: "demo" (the bundled model; write ./demo for a folder of that name), a local folder, or a Hub id "org/name",
    downloaded to cache_dir (default: the Hub's cache) at a revision (branch, tag or commit), unless `judge` raises.
    Raises ConversionError with the remedy for whatever cannot be loaded.
    """
    folder, commit = _find(model, revision, cache_dir, judge)
    layout = choose_layout([path.name for path in folder.iterdir()], str(folder))
    if layout is META:
        weights = read_meta_weights(folder)
        llama31 = bool(read_json(folder / META.config).get("use_scaled_rope"))
        tokenizer = read_meta_tokenizer(folder, weights.architecture.vocab_size, llama31=llama31)
    else:
        weights = read_hf_weights(folder, layout)
        tokenizer = read_hf_tokenizer(folder, weights.architecture.vocab_size)
    return SourceModel(
        name=model,
        folder=folder,
        architecture=weights.architecture,
        tied_embeddings=weights.tied_embeddings,
        inv_freq=weights.inv_freq,
        tensors=weights.tensors,
        tokenizer=tokenizer,
        generation=_sampling_defaults(read_optional_json(folder / "generation_config.json")),
        provenance=_provenance(model, commit, folder, layout, weights),
    )


def outline_source(model: str) -> tuple[Architecture, bool] | None:
    """Architecture, and whether embeddings may be tied, of a local folder that holds a configuration but no weights."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        return None
    if (folder / HF_SAFETENSORS.config).is_file():
        return outline_hf(folder, HF_SAFETENSORS)
    return outline_meta(folder) if (folder / META.config).is_file() else None


def _find(
    model: str, revision: str | None, cache_dir: str | Path | None, judge: Judge | None
) -> tuple[Path, str | None]:
    """(folder, commit if it came from the Hub) of a checkpoint."""
    if model == DEMO:
        return Path(str(resources.files("rcpconv") / "demo" / "model")), None
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix == ".gguf":
            raise UnsupportedFormat(f"{model}: a GGUF file; use the original Hugging Face or Meta checkpoint")
        raise CheckpointNotFound(f"{model}: a file; give the folder that holds the checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise CheckpointNotFound(f"{model}: no such folder; give a folder, a Hub id such as org/name, or {DEMO!r}")

    def check(folder: Path, layout: Layout) -> None:
        architecture, tied = outline_meta(folder) if layout is META else outline_hf(folder, layout)
        if judge is not None:
            judge(architecture, tied)

    folder = download_checkpoint(model, revision=revision, cache_dir=cache_dir, check=check)
    return folder, folder.name


_OTHER_NAMES = {"repeat_penalty": "repetition_penalty"}
"""The file's name of a sampling setting -> generation_config.json's, where they differ."""


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The valid sampling settings of a generation_config.json, under the names of the file's metadata.

    None of them when it says `do_sample: false`: then they are left-overs that transformers ignores.
    """
    if generation.get("do_sample") is False:
        return {}
    settings: dict[str, float] = {}
    for name, (low, high) in GENERATION_LIMITS.items():
        value = generation.get(_OTHER_NAMES.get(name, name))
        kinds = int if name == "top_k" else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high:
            settings[name] = value
    return settings


def _provenance(model: str, commit: str | None, folder: Path, layout: Layout, weights: Weights) -> dict[str, Any]:
    names = weights.tensors.names()
    return {
        "base_model": model,
        "revision": commit,
        "license": _license(folder),
        "layout": layout.name,
        "dtype": str(weights.tensors.dtype(names[0])).removeprefix("torch."),
        "parameters": sum(math.prod(weights.tensors.shape(name)) for name in names),
    }


def _license(folder: Path) -> str | None:
    """The licence that README.md's front matter names, else the name of a licence file, else None."""
    readme = folder / "README.md"
    try:
        card = (metadata_load(readme) if readme.is_file() else None) or {}
    except (YAMLError, ValueError):  # a README that nobody can parse is not worth a refusal
        card = {}
    if stated := card.get("license_name") or card.get("license"):
        return str(stated)
    return next((path.name for path in sorted(folder.glob("LICENSE*"))), None)
