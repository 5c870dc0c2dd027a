"""Hugging Face folders: tensors, architecture and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcpconv.checkpoint import load_source
from rcpconv.errors import (
    BadConfig,
    CheckpointNotFound,
    ConversionError,
    CorruptCheckpoint,
    MissingTensor,
    UnexpectedTensor,
    UnsafeCheckpoint,
    UnsupportedArchitecture,
    UnsupportedFormat,
    UnsupportedRope,
    WrongTensorShape,
)
from tiny_checkpoints import KINDS, make_tiny_checkpoint

MODULES = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def state_name(canonical: str) -> str:
    """The name in transformers' state dict, by a rule of its own."""
    if canonical == "final_norm.gain":
        return "model.norm.weight"
    if not canonical.startswith("layers."):
        module, kind = canonical.rsplit(".", 1)
        return f"{MODULES[module]}.{kind}"
    _, layer, rest = canonical.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest in ("attn_norm.gain", "mlp_norm.gain"):
        return prefix + {"attn": "input", "mlp": "post_attention"}[rest.split("_")[0]] + "_layernorm.weight"
    if rest in ("attn.q_norm", "attn.k_norm"):
        return f"{prefix}self_attn.{rest[5:]}.weight"
    module, kind = rest.rsplit(".", 1)
    return f"{prefix}{MODULES[module]}.{kind}"


def assert_tensors_equal(source: Any, model: torch.nn.Module) -> None:
    state = model.state_dict()
    names = source.tensors.names()
    used = {state_name(name) for name in names} | ({"lm_head.weight"} if source.tied_embeddings else set())
    assert used == set(state)
    for name in names:
        expected = state[state_name(name)]
        assert source.tensors.shape(name) == tuple(expected.shape), name
        assert source.tensors.dtype(name) == expected.dtype, name
        assert torch.equal(source.tensors.get(name), expected), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_checkpoint("llama2", folder)
    return folder


@pytest.fixture
def edited(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the LLaMA checkpoint with some configuration entries changed."""

    def edit(**entries: Any) -> Path:
        folder = shutil.copytree(llama, tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
        return folder

    return edit


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_loads_as_transformers_has_it(kind: str, tmp_path: Path) -> None:
    model = make_tiny_checkpoint(kind, tmp_path)
    source = load_source(str(tmp_path))
    config, a = model.config, source.architecture
    assert_tensors_equal(source, model)
    assert (a.hidden_size, a.num_layers, a.num_heads) == (config.hidden_size, 2, config.num_attention_heads)
    assert (a.num_kv_heads, a.intermediate_size) == (config.num_key_value_heads, config.intermediate_size)
    assert (a.vocab_size, a.rms_norm_eps) == (config.vocab_size, config.rms_norm_eps)
    assert a.max_position_embeddings == 128
    assert not a.tied_table
    assert source.tied_embeddings == (kind in ("llama32", "qwen2"))
    assert a.attention_window == ((8, 8) if kind == "mistral" else None)
    assert a.qk_norm == (kind == "qwen3")
    assert (a.qkv_bias, a.o_bias, a.mlp_bias) == {
        "qwen2": (True, False, False),
        "llama_bias": (True, True, True),
    }.get(kind, (False, False, False))
    rotary = model.model.rotary_emb
    assert source.inv_freq.dtype == "float64"
    torch.testing.assert_close(torch.from_numpy(source.inv_freq).float(), rotary.inv_freq, rtol=5e-7, atol=0)
    assert a.rope_attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert source.provenance["parameters"] == sum(p.numel() for p in model.parameters())
    json.dumps(source.provenance)


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded-bin"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_every_layout_of_the_weights(kind: str, layout: str, tmp_path: Path) -> None:
    model = make_tiny_checkpoint(kind, tmp_path, layout=layout)
    source = load_source(str(tmp_path))
    assert_tensors_equal(source, model)
    assert source.provenance["layout"] == ("hf-bin" if "bin" in layout else "hf-safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_their_dtype_unless_asked(dtype: torch.dtype, tmp_path: Path) -> None:
    make_tiny_checkpoint("tinyllama", tmp_path, dtype=dtype)
    tensors = load_source(str(tmp_path)).tensors
    name = "layers.1.mlp.down.weight"
    assert tensors.dtype(name) == tensors.get(name).dtype == dtype
    assert tensors.get(name, torch.float64).dtype == torch.float64


def test_a_tensor_may_be_changed_without_changing_the_source(llama: Path) -> None:
    tensors = load_source(str(llama)).tensors
    before = tensors.get("final_norm.gain")
    tensors.get("final_norm.gain").zero_()
    assert torch.equal(tensors.get("final_norm.gain"), before)


def test_configurations_as_older_releases_wrote_them(edited: Callable[..., Path]) -> None:
    folder = edited()
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    inv_freq = load_source(str(folder)).inv_freq
    assert inv_freq[0] == 0.25
    assert inv_freq[1] == pytest.approx(5e5 ** (-1 / 8) / 4, rel=1e-15)


def test_entries_that_change_nothing_are_accepted(edited: Callable[..., Path]) -> None:
    folder = edited(pretraining_tp=2, sliding_window=None, final_logit_softcapping=None, partial_rotary_factor=1.0)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors")
    assert "head.weight" in load_source(str(folder)).tensors


@pytest.mark.parametrize(
    ("entries", "windows"),
    [
        ({"sliding_window": None}, None),
        ({"sliding_window": 128}, None),
        ({"sliding_window": 127}, (127, 127)),
    ],
)
def test_mistral_windows(entries: dict[str, Any], windows: Any, tmp_path: Path) -> None:
    make_tiny_checkpoint("mistral", tmp_path, **entries)
    assert load_source(str(tmp_path)).architecture.attention_window == windows


@pytest.mark.parametrize(
    ("entries", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (None, 16)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, None),
        (
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            (16, None),
        ),
    ],
)
def test_qwen_windows(entries: dict[str, Any], windows: Any, tmp_path: Path) -> None:
    make_tiny_checkpoint("qwen3", tmp_path, **entries)
    assert load_source(str(tmp_path)).architecture.attention_window == windows


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, UnsupportedArchitecture, "Qwen3ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, UnsupportedArchitecture, "LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, UnsupportedArchitecture, "model_type 'llama'"),
        ({"architectures": None, "model_type": None}, UnsupportedArchitecture, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, UnsupportedArchitecture, "silu"),
        ({"partial_rotary_factor": 0.5}, UnsupportedArchitecture, "partial_rotary_factor is 0.5"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedArchitecture, "softcapping"),
        ({"num_local_experts": 8}, UnsupportedArchitecture, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedFormat, "gptq"),
        ({"pretraining_tp": 0}, BadConfig, "pretraining_tp"),
        ({"num_attention_heads": 7}, BadConfig, "heads"),
        ({"num_key_value_heads": 3}, BadConfig, "num_kv_heads"),
        ({"rms_norm_eps": "tiny"}, BadConfig, "rms_norm_eps"),
        ({"vocab_size": 300}, WrongTensorShape, r"embed_tokens.*\(300, 80\).*\(290, 80\)"),
        ({"num_hidden_layers": 3}, MissingTensor, r"layers\.2"),
        ({"num_hidden_layers": 1}, UnexpectedTensor, r"layers\.1"),
        ({"attention_bias": True}, MissingTensor, r"q_proj\.bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, UnsupportedRope, "llama3"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, BadConfig, "factor"),
        ({"rope_parameters": {"rope_theta": 1.0}}, BadConfig, "rope_theta"),
    ],
)
def test_refused_configurations(
    entries: dict[str, Any], error: type[ConversionError], message: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=message):
        load_source(str(edited(**entries)))


def test_rope_by_layer_type_is_refused(tmp_path: Path) -> None:
    make_tiny_checkpoint("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedRope, match="full_attention"):
        load_source(str(tmp_path))


def test_tied_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama32", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.randn(weights["model.embed_tokens.weight"].shape)
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    source = load_source(str(tmp_path))
    assert not source.tied_embeddings
    assert torch.equal(source.tensors.get("head.weight"), head)


def test_quantized_integers_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedFormat, match=r"up_proj.*before quantization"):
        load_source(str(folder))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "sharded-bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "download it again"),
        (Path.unlink, "missing|no checkpoint"),
        (_pointer, "git lfs pull"),
        (lambda path: path.write_bytes(b"<html>"), "download it again"),
    ],
    ids=["truncated", "missing", "lfs-pointer", "html"],
)
def test_damaged_weight_files(layout: str, damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path, layout=layout)
    damage(sorted([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")])[-1])
    with pytest.raises((CorruptCheckpoint, CheckpointNotFound), match=message):
        load_source(str(tmp_path))


def test_index_that_promises_too_much_or_leaves_the_folder(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path, layout="sharded")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = next(iter(index["weight_map"].values()))
    for entry, message in [
        ({"model.extra.weight": shard}, "promises model.extra"),
        ({"a": "../x.safetensors"}, "same"),
    ]:
        path.write_text(json.dumps({"weight_map": index["weight_map"] | entry}))
        with pytest.raises(CorruptCheckpoint, match=message):
            load_source(str(tmp_path))


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path, layout="bin")
    torch.save({"model.norm.weight": Path("/")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="safetensors"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, UnsupportedFormat, "merge_and_unload"),
        ({"model-q4.gguf": ""}, UnsupportedFormat, "GGUF"),
        ({"config.json": "{}", "quantize_config.json": "{}", "m.safetensors": ""}, UnsupportedFormat, "original float"),
        ({"config.json": "{}", "notes.txt": ""}, CheckpointNotFound, "model.safetensors"),
        ({"config.json": "[", "model.safetensors": ""}, BadConfig, "JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, BadConfig, "object"),
    ],
)
def test_folders_without_a_checkpoint(
    files: dict[str, str], error: type[ConversionError], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_source(str(tmp_path))


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, error, message in [
        (tmp_path / "model.gguf", UnsupportedFormat, "GGUF"),
        (tmp_path / "model.safetensors", CheckpointNotFound, "folder"),
        (tmp_path / "nothing", CheckpointNotFound, "no such folder"),
        ("llama", CheckpointNotFound, "org/name"),
        ("./org/name", CheckpointNotFound, "no such folder"),
    ]:
        with pytest.raises(error, match=message):
            load_source(str(name))


def test_sampling_defaults_and_licence(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "copy")
    settings = {"temperature": 0.7, "top_k": 40, "top_p": 1.5, "repetition_penalty": 1.1, "min_p": "x"}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("---\nlicense: llama2\n---\nA model.\n")
    source = load_source(str(folder))
    assert source.generation == {"temperature": 0.7, "top_k": 40, "repeat_penalty": 1.1}
    assert source.provenance["license"] == "llama2"
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 0.0005, "top_k": 40.0}))
    assert load_source(str(folder)).generation == {}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False}))
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    (folder / "LICENSE.txt").write_text("")
    source = load_source(str(folder))
    assert source.generation == {}
    assert source.provenance["license"] == "LICENSE.txt"


def test_the_demo_model_carries_the_projects_licence() -> None:
    source = load_source("demo")
    assert source.provenance["license"] == "apache-2.0"
    assert sum(path.stat().st_size for path in source.folder.iterdir()) < 4_000_000
