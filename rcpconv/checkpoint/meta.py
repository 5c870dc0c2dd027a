"""Meta's original layout: params.json beside consolidated.NN.pth, one file for each model-parallel rank.

The ranks' parts are joined, and the rows of q and k are put into Hugging Face's order: Meta rotates neighbouring pairs
of a head, Hugging Face pairs half a head apart. Knows nothing of tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rcpconv.checkpoint.layout import META, Weights, read_json
from rcpconv.checkpoint.rope import rope_frequencies
from rcpconv.checkpoint.tensors import LazyTensor, expected_shapes, open_pickle, select_tensors
from rcpconv.errors import BadConfig, CorruptCheckpoint, MissingTensor, UnsupportedArchitecture, WrongTensorShape
from rcpformat.architecture import Architecture
from rcpformat.errors import BadMetadata

_EMBEDDING, _HEAD, _FIRST_GATE = "tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"
_GLOBAL_NAMES = {"embed.weight": _EMBEDDING, "final_norm.gain": "norm.weight", "head.weight": _HEAD}
_LAYER_NAMES = {
    "attn_norm.gain": "attention_norm.weight",
    "mlp_norm.gain": "ffn_norm.weight",
    "attn.q.weight": "attention.wq.weight",
    "attn.k.weight": "attention.wk.weight",
    "attn.v.weight": "attention.wv.weight",
    "attn.o.weight": "attention.wo.weight",
    "mlp.gate.weight": "feed_forward.w1.weight",
    "mlp.down.weight": "feed_forward.w2.weight",
    "mlp.up.weight": "feed_forward.w3.weight",
}

_KNOWN_PARAMETERS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "rope_scale_factor", "rope_scaling_factor", "rope_high_freq_factor"),
    *("max_batch_size", "max_seq_len"),
}
_CONTEXT_BY_THETA = {1e4: 4096, 5e5: 8192, 1e6: 16384}
"""RoPE base -> context length: LLaMA-2, LLaMA-3, CodeLlama."""


_UNSTATED_VOCABULARY = 32000
"""Of LLaMA-1 and 2, whose params.json does not state it."""


def outline_meta(folder: Path) -> tuple[Architecture, bool]:
    """(architecture, False) by params.json alone, before any weights are fetched; the vocabulary may differ a little.

    Raises the ConversionError that params.json gives cause for.
    """
    params, where = _read_params(folder)
    dim = _integer(params, "dim", where)
    vocabulary = _vocabulary(params, where) or _UNSTATED_VOCABULARY
    return _architecture(params, vocabulary, _ffn_size(params, dim) or 8 * dim // 3, where), False


def read_meta_weights(folder: Path) -> Weights:
    """Read params.json and open the consolidated files of a folder in Meta's layout.

    Raises a ConversionError that says what is wrong with the parameters or the files.
    """
    params, where = _read_params(folder)
    dim = _integer(params, "dim", where)
    stored = _join_ranks(_open_ranks(folder), dim, where)
    for name in (_EMBEDDING, _FIRST_GATE):
        if name not in stored:
            raise MissingTensor(f"{folder}: the weights lack {name}; download the checkpoint again")
    tied = _is_tied(stored)
    architecture = _architecture(
        params,
        _checked(stored[_EMBEDDING].shape[0], _vocabulary(params, where), "vocab_size", where),
        _checked(stored[_FIRST_GATE].shape[0], _ffn_size(params, dim), "FFN width", where),
        where,
    )
    rope = _rope_parameters(params, tied)
    inv_freq, _ = rope_frequencies(rope, architecture.head_dim, architecture.max_position_embeddings)
    for name, tensor in stored.items():
        if (
            name.endswith(("attention.wq.weight", "attention.wk.weight"))
            and tensor.shape[0] % architecture.head_dim == 0
        ):
            stored[name] = _half_rotation_rows(tensor, architecture.head_dim)
    tensors = select_tensors(
        stored,
        expected_shapes(architecture, tied_embeddings=tied),
        meta_name,
        lambda name: name.endswith("rope.freqs") or (tied and name == _HEAD),
        str(folder),
    )
    return Weights(architecture=architecture, tied_embeddings=tied, inv_freq=inv_freq, tensors=tensors)


def _read_params(folder: Path) -> tuple[dict[str, Any], str]:
    """(the checked params.json, its path)."""
    params = read_json(folder / META.config)
    where = str(folder / META.config)
    if unknown := sorted(set(params) - _KNOWN_PARAMETERS):
        raise UnsupportedArchitecture(
            f"{where}: {unknown}: not part of a LLaMA 1, 2 or 3 text model, and may change what the model computes; "
            "use the checkpoint in Hugging Face's layout if there is one"
        )
    for key, value in params.items():
        if isinstance(value, str | list | dict):
            raise BadConfig(f"{where}: {key}: expected a number, found {value!r}")
    return params, where


def _architecture(params: Mapping[str, Any], vocabulary: int, ffn_size: int, where: str) -> Architecture:
    dim, heads, layers = (_integer(params, key, where) for key in ("dim", "n_heads", "n_layers"))
    kv_heads = heads if params.get("n_kv_heads") is None else _integer(params, "n_kv_heads", where)
    try:
        return Architecture(
            model_type="llama",
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=ffn_size,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim // heads,
            rms_norm_eps=params.get("norm_eps", 1e-5),
            max_position_embeddings=_context_length(params),
        )
    except BadMetadata as error:
        raise BadConfig(f"{where}: {error}") from error


def meta_name(name: str) -> str:
    """Canonical name -> name in Meta's state dict."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    layers, number, rest = name.split(".", 2)
    return f"{layers}.{number}.{_LAYER_NAMES[rest]}"


def _open_ranks(folder: Path) -> list[dict[str, LazyTensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    for rank, path in enumerate(paths):
        if path.name != f"consolidated.{rank:02}.pth":
            raise CorruptCheckpoint(
                f"{folder}: expected consolidated.{rank:02}.pth, found {path.name}; a part is missing"
            )
    ranks = [open_pickle(path) for path in paths]
    for path, rank_tensors in zip(paths, ranks, strict=True):
        if different := sorted(set(rank_tensors) ^ set(ranks[0])):
            raise CorruptCheckpoint(f"{path}: {different[0]} is in one part and not in another; download it again")
    return ranks


def _join_ranks(ranks: list[dict[str, LazyTensor]], dim: int, where: str) -> dict[str, LazyTensor]:
    """The whole tensors. Vectors are the same on every rank; the embedding is split by columns before LLaMA-3."""
    joined: dict[str, LazyTensor] = {}
    for name, first in ranks[0].items():
        if len(first.shape) < 2 or len(ranks) == 1:
            joined[name] = first
            continue
        by_columns = re.search(r"\.(wo|w2)\.weight$", name) or (name == _EMBEDDING and first.shape[1] != dim)
        joined[name] = _concatenate(name, [rank[name] for rank in ranks], 1 if by_columns else 0, where)
    return joined


def _concatenate(name: str, parts: list[LazyTensor], axis: int, where: str) -> LazyTensor:
    first = parts[0]
    if any(part.shape[1 - axis] != first.shape[1 - axis] for part in parts):
        raise WrongTensorShape(f"{where}: {name}: its parts, {[part.shape for part in parts]}, do not fit together")
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return LazyTensor(tuple(shape), first.dtype, lambda: torch.cat([part.load() for part in parts], dim=axis))


def _half_rotation_rows(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Rows of q or k: within each head, the first of every neighbouring pair, then the second of every pair."""
    rows, columns = tensor.shape

    def load() -> torch.Tensor:
        pairs = tensor.load().view(rows // head_dim, head_dim // 2, 2, columns)
        return pairs.transpose(1, 2).reshape(rows, columns)

    return LazyTensor(tensor.shape, tensor.dtype, load)


def _is_tied(stored: Mapping[str, LazyTensor]) -> bool:
    """Whether the output is the embedding: not stored (LLaMA-3.2 1B and 3B), or stored with the same numbers."""
    head, embedding = stored.get(_HEAD), stored[_EMBEDDING]
    return head is None or (head.shape == embedding.shape and torch.equal(head.load(), embedding.load()))


def _rope_parameters(params: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """RoPE as config.json would state it.

    `use_scaled_rope` is the scaling of LLaMA-3.1, over 8192 tokens, with factor 8; LLaMA-3.2 has 32. params.json does
    not tell the two apart unless it gives `rope_scale_factor`; without that, a tied output means LLaMA-3.2.
    """
    theta = params.get("rope_theta", 1e4)
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    given = params.get("rope_scale_factor", params.get("rope_scaling_factor"))
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": (32.0 if tied else 8.0) if given is None else given,
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
        "original_max_position_embeddings": 8192,
    }


def _context_length(params: Mapping[str, Any]) -> int:
    """Tokens of context, which params.json does not state, from what sets the releases apart.

    LLaMA-1 has norm_eps 1e-6; its 65B has 1e-5, and is the only one of 80 layers without grouped queries.
    """
    if params.get("use_scaled_rope"):
        return 131072
    is_llama1 = params.get("norm_eps") == 1e-6 or (params["n_layers"] == 80 and params.get("n_kv_heads") is None)
    theta = params.get("rope_theta", 1e4)
    return 2048 if is_llama1 and theta == 1e4 else _CONTEXT_BY_THETA.get(theta, 4096)


def _integer(params: Mapping[str, Any], key: str, where: str) -> int:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadConfig(f"{where}: {key}: expected an integer of at least 1, found {value!r}")
    return value


def _vocabulary(params: Mapping[str, Any], where: str) -> int | None:
    """The stated vocabulary; LLaMA-1 and 2 state -1, "as the tokenizer has it"."""
    return None if params.get("vocab_size", -1) == -1 else _integer(params, "vocab_size", where)


def _ffn_size(params: Mapping[str, Any], dim: int) -> int | None:
    """FFN width by Meta's rule: 8/3 of the width, times ffn_dim_multiplier, rounded up to a multiple of multiple_of."""
    if not (multiple := params.get("multiple_of")):
        return None
    width = int(8 * dim / 3)
    if params.get("ffn_dim_multiplier"):
        width = int(params["ffn_dim_multiplier"] * width)
    return int(-(-width // multiple) * multiple)


def _checked(found: int, stated: int | None, what: str, where: str) -> int:
    """The width that the tensors have, which must be the stated one where there is one."""
    if stated not in (None, found):
        raise WrongTensorShape(
            f"{where}: {what} {stated} by these parameters, but the tensors have {found}; a part of the checkpoint is "
            "missing, or the parameters belong to another one"
        )
    return found
