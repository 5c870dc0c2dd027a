"""Which files make up a checkpoint, and what every layout is read into. Knows nothing of what is inside the files."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.checkpoint.tensors import TensorStore
from rcpconv.errors import BadConfig, CheckpointNotFound, UnsupportedFormat
from rcpformat.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """How a folder holds a checkpoint: a configuration file, and weights in one file or in shards with an index."""

    name: str
    config: str
    single: str
    index: str | None = None

    def weight_file(self, names: Collection[str]) -> str | None:
        """Of a folder's file names, the one to open first: the index of the shards, the single file, or None."""
        return next((file for file in (self.index, self.single) if file in names), None)


HF_SAFETENSORS = Layout("hf-safetensors", "config.json", "model.safetensors", "model.safetensors.index.json")
HF_BIN = Layout("hf-bin", "config.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
META = Layout("meta", "params.json", "consolidated.00.pth")
LAYOUTS = (HF_SAFETENSORS, HF_BIN, META)
"""In order of preference."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The model itself: what it computes and with which numbers. Fields as in SourceModel."""

    architecture: Architecture
    tied_embeddings: bool
    inv_freq: NDArray[np.float64]
    tensors: TensorStore


def choose_layout(names: Collection[str], where: str) -> Layout:
    """The preferred layout that a folder's (or repository's) top-level files make up.

    Raises UnsupportedFormat for quantized checkpoints, adapters and GGUF files, CheckpointNotFound for anything else.
    """
    if quantized := {"quantize_config.json", "quant_config.json"} & set(names):
        raise UnsupportedFormat(f"{where}: {quantized.pop()}: already quantized; use the original float checkpoint")
    for layout in LAYOUTS:
        if layout.config in names and layout.weight_file(names):
            return layout
    if "adapter_config.json" in names:
        raise UnsupportedFormat(
            f"{where}: a LoRA adapter, not a whole model; merge it into its base model "
            "(peft: model.merge_and_unload()), save the result and convert that"
        )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        raise UnsupportedFormat(f"{where}: {gguf[0]} is a GGUF file; use the original Hugging Face or Meta checkpoint")
    known = " or ".join(f"{layout.config} with {layout.index or layout.single}" for layout in LAYOUTS)
    raise CheckpointNotFound(f"{where}: no checkpoint there: expected {known}; found {sorted(names)[:20]}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadConfig when it is missing, unreadable, or not an object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path}: expected a JSON file ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise BadConfig(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """As read_json; an empty object when there is no such file."""
    return read_json(path) if path.is_file() else {}
