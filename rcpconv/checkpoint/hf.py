"""Hugging Face's layout: config.json beside safetensors or pytorch_model.bin files. Knows nothing of tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rcpconv.checkpoint.layout import HF_SAFETENSORS, Layout, Weights, read_json
from rcpconv.checkpoint.rope import rope_frequencies
from rcpconv.checkpoint.tensors import (
    LazyTensor,
    expected_shapes,
    iterate_shards,
    open_pickle,
    open_safetensors,
    select_tensors,
)
from rcpconv.errors import BadConfig, CorruptCheckpoint, UnsupportedArchitecture, UnsupportedFormat, UnsupportedRope
from rcpformat.architecture import Architecture
from rcpformat.errors import BadMetadata


@dataclass(frozen=True)
class _Family:
    """A transformers architecture: its configuration class and which linear layers have biases."""

    config: type[PreTrainedConfig]
    qkv_bias: Callable[[Any], bool]
    o_bias: Callable[[Any], bool]
    mlp_bias: Callable[[Any], bool]
    qk_norm: bool = False


def _never(config: Any) -> bool:
    return False


def _if_attention_bias(config: Any) -> bool:
    return bool(config.attention_bias)


_FAMILIES = {
    "LlamaForCausalLM": _Family(LlamaConfig, _if_attention_bias, _if_attention_bias, lambda config: config.mlp_bias),
    "MistralForCausalLM": _Family(MistralConfig, _never, _never, _never),
    "Qwen2ForCausalLM": _Family(Qwen2Config, lambda config: True, _never, _never),
    "Qwen3ForCausalLM": _Family(Qwen3Config, _if_attention_bias, _if_attention_bias, _never, qk_norm=True),
}

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
}
"""Configuration keys that change what a model computes, with the values under which they do not."""


def outline_hf(folder: Path, layout: Layout) -> tuple[Architecture, bool]:
    """(architecture, whether the embeddings may be tied) by config.json alone, before any weights are fetched.

    Raises the ConversionError that config.json gives cause for.
    """
    architecture, _, may_tie = _read_config(folder / layout.config)
    return architecture, may_tie


def read_hf_weights(folder: Path, layout: Layout) -> Weights:
    """Read config.json and open the weights of a Hugging Face folder.

    Raises a ConversionError that says what is wrong with the configuration or the files.
    """
    architecture, inv_freq, may_tie = _read_config(folder / layout.config)
    stored = _open_weights(folder, layout)
    tied = may_tie and not _separate_head(stored)
    tensors = select_tensors(
        stored,
        expected_shapes(architecture, tied_embeddings=tied),
        hf_name,
        lambda name: name.endswith("rotary_emb.inv_freq") or (tied and name == _HEAD),
        str(folder),
    )
    return Weights(architecture=architecture, tied_embeddings=tied, inv_freq=inv_freq, tensors=tensors)


def _read_config(path: Path) -> tuple[Architecture, NDArray[np.float64], bool]:
    """(architecture, RoPE frequencies, whether the head may be tied to the embedding) of a config.json."""
    config, family = _parse_config(read_json(path), path)
    architecture, inv_freq = _architecture(config, family)
    return architecture, inv_freq, bool(config.tie_word_embeddings)


def _parse_config(raw: Mapping[str, Any], path: Path) -> tuple[Any, _Family]:
    """The configuration as transformers reads it, once everything that this converter would ignore is ruled out."""
    by_type = {family.config.model_type: name for name, family in _FAMILIES.items()}
    names = raw.get("architectures") or [by_type.get(str(raw.get("model_type")))]
    family = _FAMILIES.get(str(names[0])) if isinstance(names, list) else None
    if family is None or raw.get("model_type", family.config.model_type) != family.config.model_type:
        raise UnsupportedArchitecture(
            f"{path}: expected one of the architectures {sorted(_FAMILIES)}, found {raw.get('architectures')} with "
            f"model_type {raw.get('model_type')!r}; other models cannot be converted"
        )
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
        raise UnsupportedFormat(
            f"{path}: the weights are already quantized (quantization_config: {method}); "
            "use the original float checkpoint"
        )
    for key, neutral in _NEUTRAL.items():
        if raw.get(key) not in neutral:
            raise UnsupportedArchitecture(
                f"{path}: {key} is {raw[key]!r}; models are supported only where it is absent or one of {list(neutral)}"
            )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    if isinstance(rope, Mapping) and any(isinstance(rule, Mapping) for rule in rope.values()):
        raise UnsupportedRope(f"{path}: expected one RoPE rule for all layers, found one for each of {sorted(rope)}")
    try:
        config: Any = family.config.from_dict(dict(raw))
    except Exception as error:  # its validators raise errors of many kinds
        reason = " ".join(str(error).split())
        raise BadConfig(f"{path}: not a valid {family.config.__name__}: {reason}; correct that entry") from error
    if config.hidden_act != "silu":
        raise UnsupportedArchitecture(
            f"{path}: hidden_act: only 'silu' (SwiGLU) is supported, found {config.hidden_act!r}"
        )
    splits = raw.get("pretraining_tp")  # how the original was trained: the tensors and the result are the same
    if splits is not None and (isinstance(splits, bool) or not isinstance(splits, int) or splits < 1):
        raise BadConfig(f"{path}: pretraining_tp: expected an integer of at least 1, found {splits!r}; set it to 1")
    return config, family


def _architecture(config: Any, family: _Family) -> tuple[Architecture, NDArray[np.float64]]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, attention_factor = rope_frequencies(config.rope_parameters, head_dim, config.max_position_embeddings)
    try:
        architecture = Architecture(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            attention_window=_attention_windows(config),
            rope_attention_factor=attention_factor,
            qkv_bias=family.qkv_bias(config),
            o_bias=family.o_bias(config),
            mlp_bias=family.mlp_bias(config),
            qk_norm=family.qk_norm,
        )
    except BadMetadata as error:
        raise BadConfig(f"config.json: {error}") from error
    return architecture, inv_freq


def _attention_windows(config: Any) -> tuple[int | None, ...] | None:
    """Each layer's sliding window, or None when no layer has one that a context of full length would notice.

    LLaMA has none. Mistral's is for every layer. Qwen's is for the layers that `layer_types` calls sliding_attention.
    """
    window = None if isinstance(config, LlamaConfig) else config.sliding_window
    if window is None or window >= config.max_position_embeddings:
        return None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if unknown := set(types) - {"sliding_attention", "full_attention"}:
        raise UnsupportedArchitecture(
            f"config.json: layer_types: expected sliding_attention and full_attention only, found {sorted(unknown)}"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else None


def _open_weights(folder: Path, layout: Layout) -> dict[str, LazyTensor]:
    reader = open_safetensors if layout == HF_SAFETENSORS else open_pickle
    if layout.index is None or not (folder / layout.index).is_file():
        return reader(folder / layout.single)
    return dict(iterate_shards(read_weight_map(folder / layout.index), reader))


def read_weight_map(index: Path) -> dict[str, Path]:
    """Tensor name -> shard beside the index. Raises CorruptCheckpoint unless every shard is a plain file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise CorruptCheckpoint(
            f"{index}: expected a weight_map from tensor names to file names in the same folder; download it again"
        )
    return {name: index.parent / file for name, file in weight_map.items()}


def _separate_head(stored: Mapping[str, LazyTensor]) -> bool:
    """Whether a head is stored that differs from the embedding, in which case it is not tied (as in transformers)."""
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if head is None or embedding is None:
        return False
    return head.shape != embedding.shape or not torch.equal(head.load(), embedding.load())


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GLOBAL_NAMES = {"embed.weight": _EMBEDDING, "final_norm.gain": "model.norm.weight", "head.weight": _HEAD}
_LAYER_NAMES = {"attn_norm.gain": "input_layernorm.weight", "mlp_norm.gain": "post_attention_layernorm.weight"}


def hf_name(name: str) -> str:
    """Canonical name -> name in a Hugging Face state dict."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    layers, number, rest = name.split(".", 2)
    if rest not in _LAYER_NAMES:
        rest = re.sub(r"^attn\.(q|k)_norm$", r"self_attn.\1_norm.weight", rest)
        rest = re.sub(r"^attn\.([qkvo])\.", r"self_attn.\1_proj.", rest)
        rest = re.sub(r"^mlp\.(gate|up|down)\.", r"mlp.\1_proj.", rest)
    return f"model.{layers}.{number}.{_LAYER_NAMES.get(rest, rest)}"
