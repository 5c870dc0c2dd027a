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

import sentencepiece
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
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def make_sentencepiece_model(folder: Path) -> int:
    """Write a tokenizer.model as LLaMA 1 and 2 have it (byte-pair encoding, byte fallback); returns its vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        vocab_size=352,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return 352


def make_tiktoken_model(folder: Path) -> int:
    """Write a tokenizer.model as LLaMA-3 has it; returns the vocabulary, with the 256 special tokens that follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(map(byte_of.__getitem__, piece))).decode()} {rank}\n" for piece, rank in ranks]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_text("".join(lines))
    return len(ranks) + 256


_META_LAYERS = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
"""transformers' module -> (Meta's module, the axis over which ranks split its weight)."""


def make_tiny_meta_checkpoint(folder: Path, shards: int = 1, version: float = 2, seed: int = 0) -> PreTrainedModel:
    """Write a tiny model in Meta's layout, in 1, 2, 4 or 8 parts, and return the same model as transformers has it.

    version: 1 or 2 (sentencepiece, untied, embedding split by columns), 3, 3.1 or 3.2 (tiktoken, grouped queries,
    embedding split by rows; RoPE scaled from 3.1 on; tied in 3.2).
    """
    vocabulary = make_sentencepiece_model(folder) if version < 3 else make_tiktoken_model(folder)
    kv_heads = 8 if shards == 8 or version < 3 else 4
    theta = 1e4 if version < 3 else 5e5
    scaling = {"original_max_position_embeddings": 8192, "factor": 32.0 if version == 3.2 else 8.0}
    settings = _llama(64, 8, kv_heads, 176 if version < 3 else 224, theta) | {
        "vocab_size": vocabulary,
        "num_hidden_layers": 2,
        "max_position_embeddings": {1: 2048, 2: 4096, 3: 8192}.get(version, 131072),
        "rms_norm_eps": 1e-6 if version == 1 else 1e-5,
        "tie_word_embeddings": version == 3.2,
    }
    if version > 3:
        settings["rope_parameters"] = _llama3_scaling(0) | scaling
    model = randomize(LlamaForCausalLM(LlamaConfig(**settings)), seed)
    params = {"dim": 64, "n_heads": 8, "n_layers": 2, "norm_eps": settings["rms_norm_eps"], "multiple_of": 16}
    if version < 3:
        params |= {"vocab_size": -1}
    else:
        params |= {"vocab_size": vocabulary, "n_kv_heads": kv_heads, "ffn_dim_multiplier": 1.3, "rope_theta": theta}
    if version > 3:
        params["use_scaled_rope"] = True
    (folder / "params.json").write_text(json.dumps(params))
    for rank, part in enumerate(_meta_parts(model, shards, embedding_axis=1 if version < 3 else 0)):
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    return model


def _meta_parts(model: PreTrainedModel, shards: int, embedding_axis: int) -> list[dict[str, torch.Tensor]]:
    """A model's weights under Meta's names, q and k with neighbouring rows rotated together, cut for each rank."""
    state = model.state_dict()
    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], embedding_axis),
        "norm.weight": (state["model.norm.weight"], None),
        "rope.freqs": (torch.zeros(4), None),
    }
    if not model.config.tie_word_embeddings:
        whole["output.weight"] = (state["lm_head.weight"], 0)
    for layer in range(model.config.num_hidden_layers):
        whole[f"layers.{layer}.attention.inner_attention.rope.freqs"] = whole["rope.freqs"]
        for theirs, (name, axis) in _META_LAYERS.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if name in ("attention.wq", "attention.wk"):
                halves = weight.view(-1, 2, model.config.head_dim // 2, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            whole[f"layers.{layer}.{name}.weight"] = (weight, axis)
    return [
        {
            name: (weight if axis is None else weight.chunk(shards, axis)[rank]).clone()
            for name, (weight, axis) in whole.items()
        }
        for rank in range(shards)
    ]
