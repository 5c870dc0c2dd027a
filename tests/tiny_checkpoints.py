"""Makes tiny checkpoints of every supported family, as transformers and as Meta would write them. Random, seeded.

Every norm gain and bias is random too, so that nothing cancels by being one or zero, and the weights are large enough
for the logits to differ by several units.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BOS, EOS, END_OF_TURN = "<|begin|>", "<|end|>", "<|turn|>"
MAX_POSITIONS = 128

CORPUS = [
    "The rain had stopped before the carriage reached the gate, and nobody came out to meet it.",
    "He counted 12 stones, then 345, and wrote the sum in a small grey book.",
    "“Are you certain?” she asked; the captain only smiled and looked at the sea.",
    "    if x > 0:\n        return x * 2\n    raise ValueError('no')\n",
    "Ein Vogel sang über den Dächern; l'été était déjà fini.",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}" + END_OF_TURN + "\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """One family: transformers classes, configuration and tokenizer habits."""

    model: type[PreTrainedModel]
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    bos: bool = True
    chat: bool = False
    padding_token: bool = False
    extra_rows: int = 0
    """Rows of the embedding beyond the tokenizer's vocabulary."""


def _llama(hidden: int, heads: int, kv_heads: int, ffn: int, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    } | more


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

KINDS = {
    "llama1": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 4, 172, rms_norm_eps=1e-6)),
    "llama2": Kind(LlamaForCausalLM, LlamaConfig, _llama(80, 5, 5, 216)),
    "llama3": Kind(LlamaForCausalLM, LlamaConfig, _llama(96, 6, 2, 140, 5e5), chat=True),
    "llama31": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 2, 224, rope_parameters=_llama3_scaling(8.0))),
    "llama32": Kind(
        LlamaForCausalLM,
        LlamaConfig,
        _llama(64, 8, 2, 128, rope_parameters=_llama3_scaling(32.0), tie_word_embeddings=True),
        chat=True,
    ),
    "codellama_wizardcoder": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 4, 172, 1e6), extra_rows=16),
    "metamath": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 4, 172), padding_token=True),
    "tinyllama": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 8, 2, 176), chat=True),
    "mistral": Kind(MistralForCausalLM, MistralConfig, _llama(64, 4, 2, 112, sliding_window=8)),
    "qwen2": Kind(
        Qwen2ForCausalLM, Qwen2Config, _llama(56, 7, 1, 152, 1e6, tie_word_embeddings=True), bos=False, chat=True
    ),
    "qwen3": Kind(Qwen3ForCausalLM, Qwen3Config, _llama(48, 4, 2, 108, 1e6, head_dim=32), bos=False, chat=True),
    "llama_bias": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 2, 108, attention_bias=True, mlp_bias=True)),
    "yarn": Kind(LlamaForCausalLM, LlamaConfig, _llama(64, 4, 2, 140, rope_parameters=_YARN)),
}


@lru_cache
def byte_level_tokenizer(bos: bool, padding_token: bool) -> Tokenizer:
    """A byte-level BPE tokenizer of 290 tokens (291 with a padding token); adds BOS itself if told to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if padding_token:
        tokenizer.add_special_tokens(["[PAD]"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def _save_tokenizer(kind: Kind, folder: Path) -> int:
    """Write the tokenizer's files; returns the size of its vocabulary."""
    backend = byte_level_tokenizer(kind.bos, kind.padding_token)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if kind.bos else None,
        eos_token=END_OF_TURN if kind.chat else EOS,
        pad_token="[PAD]" if kind.padding_token else None,
        chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", "" if not kind.bos else "{{ bos_token }}")
        if kind.chat
        else None,
    )
    tokenizer.save_pretrained(folder)
    return backend.get_vocab_size()


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every parameter a random value from the seed: linear layers keep the scale of their input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name or "lm_head" in name:
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 2:
            parameter.copy_(1.2 * noise / parameter.shape[1] ** 0.5)
        elif name.endswith(".bias"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(1 + 0.3 * noise)
    return model.eval()


def make_tiny_checkpoint(
    kind: str,
    folder: Path,
    seed: int = 0,
    *,
    layout: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Write a tiny checkpoint of one of KINDS into a folder and return the model, in eval mode.

    layout: "safetensors", "sharded" (several safetensors files), "bin" or "sharded-bin". `changes` go to the
    configuration.
    """
    made = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _save_tokenizer(made, folder)
    settings = {
        "vocab_size": vocabulary + made.extra_rows,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0 if made.bos else None,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    model = randomize(made.model(made.config(**settings | made.settings | changes)), seed).to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=0 if made.bos else None,
        eos_token_id=[1, 2] if made.chat else 1,
        **({"do_sample": True, "temperature": 0.6, "top_p": 0.9} if made.chat else {}),
    )
    model.save_pretrained(folder, max_shard_size="64KB" if layout.startswith("sharded") else "1GB")
    if layout.endswith("bin"):
        _rewrite_as_bin(model, folder, sharded=layout == "sharded-bin")
    return model


def _rewrite_as_bin(model: PreTrainedModel, folder: Path, *, sharded: bool) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    state = dict(model.state_dict())
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = sorted(state)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in halves.items():
        torch.save({name: state[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
