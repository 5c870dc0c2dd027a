"""Meta's original layout: equal to the Hugging Face model that it was written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rcpconv.checkpoint import load_source
from rcpconv.checkpoint.hf import hf_name
from rcpconv.errors import (
    BadConfig,
    BadTokenizer,
    ConversionError,
    CorruptCheckpoint,
    MissingTensor,
    UnexpectedTensor,
    UnsafeCheckpoint,
    UnsupportedArchitecture,
    WrongTensorShape,
)
from tiny_checkpoints import make_tiny_checkpoint, make_tiny_meta_checkpoint


def assert_same_model(folder: Path, model: PreTrainedModel) -> None:
    source = load_source(str(folder))
    state = model.state_dict()
    assert len(source.tensors.names()) == len(state) - source.tied_embeddings
    for name in source.tensors.names():
        assert torch.equal(source.tensors.get(name), state[hf_name(name)]), name
    a, config = source.architecture, model.config
    assert (a.vocab_size, a.hidden_size, a.intermediate_size) == (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
    )
    assert (a.num_layers, a.num_heads, a.num_kv_heads) == (2, 8, config.num_key_value_heads)
    assert (a.rms_norm_eps, a.max_position_embeddings) == (config.rms_norm_eps, config.max_position_embeddings)
    assert source.tied_embeddings == config.tie_word_embeddings
    theirs = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(torch.from_numpy(source.inv_freq).float(), theirs, rtol=1e-6, atol=0)
    assert source.provenance["layout"] == "meta"


@pytest.mark.parametrize(
    ("version", "shards"), [(1, 1), (2, 1), (2, 2), (2, 8), (3, 1), (3, 2), (3.1, 4), (3.1, 8), (3.2, 1), (3.2, 2)]
)
def test_every_release_loads(version: float, shards: int, tmp_path: Path) -> None:
    assert_same_model(tmp_path, make_tiny_meta_checkpoint(tmp_path, shards, version))


def _edit(folder: Path, **entries: Any) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | entries))


def test_rope_scale_factor_wins_over_the_guess(tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path, 1, 3.1)
    assert load_source(str(tmp_path)).inv_freq[-1] == pytest.approx(5e5 ** (-3 / 4) / 8, rel=1e-12)
    _edit(tmp_path, rope_scale_factor=32)
    assert load_source(str(tmp_path)).inv_freq[-1] == pytest.approx(5e5 ** (-3 / 4) / 32, rel=1e-12)


def test_output_stored_equal_to_the_embedding_is_tied(tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path, 1, 3.2)
    path = tmp_path / "consolidated.00.pth"
    weights = torch.load(path)
    torch.save(weights | {"output.weight": weights["tok_embeddings.weight"].clone()}, path)
    assert load_source(str(tmp_path)).tied_embeddings


@pytest.mark.parametrize(
    ("entries", "tokens"),
    [
        ({"norm_eps": 1e-6}, 2048),
        ({"norm_eps": 1e-5}, 4096),
        ({"rope_theta": 1e6}, 16384),
        ({"rope_theta": 5e5}, 8192),
        ({"use_scaled_rope": True}, 131072),
    ],
)
def test_context_length_by_release(entries: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path)
    _edit(tmp_path, **entries)
    assert load_source(str(tmp_path)).architecture.max_position_embeddings == tokens


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"dim": None}, BadConfig, "dim"),
        ({"n_heads": "8"}, BadConfig, "n_heads"),
        ({"n_layers": 3}, MissingTensor, r"layers\.2"),
        ({"n_layers": 1}, UnexpectedTensor, r"layers\.1"),
        ({"dim": 32}, WrongTensorShape, "FFN width 96"),
        ({"vocab_size": 400}, WrongTensorShape, "vocab_size 400.*352"),
        ({"multiple_of": 256}, WrongTensorShape, "FFN width 256.*176"),
        ({"n_kv_heads": 4}, WrongTensorShape, r"wk.*\(32, 64\).*\(64, 64\)"),
        ({"n_kv_heads": 3}, BadConfig, "num_kv_heads"),
        ({"norm_eps": 0}, BadConfig, "rms_norm_eps"),
        ({"vision_chunk_size": 448}, UnsupportedArchitecture, "vision_chunk_size"),
        ({"moe_args": {}}, UnsupportedArchitecture, "moe_args"),
    ],
)
def test_refused_parameters(
    entries: dict[str, Any], error: type[ConversionError], message: str, tmp_path: Path
) -> None:
    make_tiny_meta_checkpoint(tmp_path)
    _edit(tmp_path, **entries)
    with pytest.raises(error, match=message):
        load_source(str(tmp_path))


def test_missing_parts(tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path, 4)
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(WrongTensorShape, match="a part of the checkpoint is missing"):
        load_source(str(tmp_path))
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"expected consolidated\.01\.pth"):
        load_source(str(tmp_path))


def test_damaged_parts(tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path, 2)
    path = tmp_path / "consolidated.01.pth"
    weights, content = torch.load(path), path.read_bytes()
    path.write_bytes(content[:5000])
    with pytest.raises(CorruptCheckpoint, match="download it again"):
        load_source(str(tmp_path))
    torch.save({name: weights[name] for name in list(weights)[1:]}, path)
    with pytest.raises(CorruptCheckpoint, match=f"{next(iter(weights))} is in one part"):
        load_source(str(tmp_path))
    torch.save(weights | {"layers.0.attention.wq.weight": torch.zeros(32, 60)}, path)
    with pytest.raises(WrongTensorShape, match="do not fit together"):
        load_source(str(tmp_path))
    torch.save({"model": weights}, path)
    with pytest.raises(UnsafeCheckpoint, match="safetensors"):
        load_source(str(tmp_path))


def test_tokenizer_may_lie_one_folder_above(tmp_path: Path) -> None:
    folder = tmp_path / "7B"
    make_tiny_meta_checkpoint(folder, 1, 1)
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert load_source(str(folder)).tokenizer.info.bos_id == 1
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(BadTokenizer, match=r"tokenizer\.model"):
        load_source(str(folder))


def test_hugging_face_layout_is_preferred(tmp_path: Path) -> None:
    make_tiny_meta_checkpoint(tmp_path)
    make_tiny_checkpoint("llama1", tmp_path, layout="bin")
    assert load_source(str(tmp_path)).provenance["layout"] == "hf-bin"
    make_tiny_checkpoint("llama1", tmp_path)
    assert load_source(str(tmp_path)).provenance["layout"] == "hf-safetensors"
