"""Small models with a byte-level tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byte_model import BYTE_VOCABULARY, CHAT_TEMPLATE, byte_level_json, info
from rcpformat import Architecture, Quantization, write_rcp
from rcprun.model import Model, load
from rcprun.tokenizer import Tokenizer
from tiny_rcp import LDP, TINY, random_model, sources


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_json(), info())


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """write_model(name="m.rcp", architecture=…, …, scale=of all linear layers, **tokenizer fields) -> its path."""

    def write(
        name: str = "m.rcp",
        architecture: Architecture = TINY,
        quantization: Quantization = LDP,
        generation: dict[str, Any] | None = None,
        scale: float | None = None,
        **tokenizer_fields: Any,
    ) -> Path:
        architecture = replace(architecture, vocab_size=BYTE_VOCABULARY)
        metadata, tensors = random_model(architecture, quantization, seed=1)
        metadata = replace(metadata, tokenizer=info(**tokenizer_fields), generation=generation or {})
        tensors["tokenizer.json"] = np.frombuffer(byte_level_json(), dtype=np.uint8)
        if scale is not None:
            for tensor in (tensors[key] for key in tensors if key.startswith("layers.") and key.endswith(".scale")):
                tensor[:] = scale
        path = tmp_path / name
        write_rcp(path, metadata, sources(tensors), force=True)
        return path

    return write


@pytest.fixture
def model(write_model: Callable[..., Path]) -> Model:
    return load(write_model(chat_template=CHAT_TEMPLATE))
