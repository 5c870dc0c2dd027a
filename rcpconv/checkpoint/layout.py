"""What every checkpoint layout is read into. Knows nothing of a particular layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcpconv.checkpoint.tensors import TensorStore
from rcpconv.errors import BadConfig
from rcpformat.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The model itself: what it computes and with which numbers. Fields as in SourceModel."""

    layout: str
    architecture: Architecture
    tied_embeddings: bool
    inv_freq: NDArray[np.float64]
    tensors: TensorStore


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
