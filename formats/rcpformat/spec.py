"""The one home of the format's facts: version, limits, metadata keys, tensor names, dtypes and shapes.

formats/SPEC.md states the same tables for people; a test parses them and compares. Knows nothing of bytes on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rcpformat.architecture import Architecture, Quantization
from rcpformat.errors import BadMetadata, brief

FORMAT_MAJOR = 1
FORMAT_MINOR = 0

WEIGHT_BITS = 2
LEVELS_PER_GROUP = 4
CODES_PER_BYTE = 4
LEVEL_LIMIT = 127
"""Levels and int8 table entries lie in -127..127; -128 is refused."""
SMALLEST_SCALE = 2.0**-126
"""Scales are normal float32 numbers, so that flush-to-zero hardware agrees."""
SMALLEST_CLIP = 2.0**-16
"""With this, the scale of a token's activations and its reciprocal are normal float32 numbers too."""

MAX_HEADER_BYTES = 32 << 20
MAX_METADATA_VALUE_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 64 << 20
MAX_JSON_DEPTH = 64
"""Arrays and objects inside one another, the outermost counted."""
MAX_JSON_NUMBER = 40
"""Characters in a JSON number."""
MAX_JSON_SEPARATORS = 1 << 20
"""`[`, `{` and `,` in a JSON text, strings included: they bound the objects that it becomes in memory."""
MAX_TOKENIZER_SEPARATORS = 4 << 20
"""The same in tokenizer.json: a vocabulary of 2^18 with twice as many merges has half of them."""
MAX_DIMENSIONS = 8
"""Entries in a tensor's shape."""
MAX_NAME = 256
"""Characters in a tensor's name."""

KEY_VERSION = "rcp.format_version"
KEY_REQUIRED = "rcp.required_features"
KEY_OPTIONAL = "rcp.optional_features"
KEY_ARCHITECTURE = "rcp.architecture"
KEY_QUANTIZATION = "rcp.quantization"
KEY_TOKENIZER = "rcp.tokenizer"
KEY_GENERATION = "rcp.generation"
KEY_PROVENANCE = "rcp.provenance"
KEY_SHA256 = "rcp.sha256"
KEY_METADATA_SHA256 = "rcp.metadata_sha256"
METADATA_KEYS = (
    KEY_VERSION,
    KEY_REQUIRED,
    KEY_OPTIONAL,
    KEY_ARCHITECTURE,
    KEY_QUANTIZATION,
    KEY_TOKENIZER,
    KEY_GENERATION,
    KEY_PROVENANCE,
    KEY_SHA256,
    KEY_METADATA_SHA256,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
}
"""The dtypes in use, by their safetensors name."""

GENERATION_LIMITS = {
    "temperature": (0, 100),
    "top_k": (0, 1 << 24),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.001, 100),
}
"""Least and largest value of each sampling default; top_k is an integer."""

EXTENSION_PREFIX = "x."
"""Tensors under this prefix are optional extensions: hashed and size-checked, otherwise ignored."""

TOKENIZER = "tokenizer.json"
INV_FREQ = "rope.inv_freq"
EMBED = "embed"
HEAD = "head"
ROTATION_SIGNS = "rotation.signs"
FINAL_GAIN = "final_norm.gain"
HEAD_MATRIX = "head_matrix.weight"

ATTENTION_LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP_LINEARS = ("mlp.gate", "mlp.up", "mlp.down")
LINEARS = ATTENTION_LINEARS + MLP_LINEARS
ACTIVATION_SITES = ("attention_input", "o_input", "mlp_input", "down_input")
"""Order of the entries of `layers.N.act_clip`."""
KV_SITES = ("key", "value")
"""Order of the entries of `layers.N.kv_clip`."""

KNOWN_FEATURES = ("a8", "bias", "head_matrix", "kv8", "qk_norm", "sliding_window", "tied_table")


@dataclass(frozen=True)
class TensorSpec:
    """The dtype (safetensors name) and shape that a tensor must have. A None dimension is free (tokenizer bytes)."""

    dtype: str
    shape: tuple[int | None, ...]


def layer_prefix(layer: int) -> str:
    """Name prefix of one decoder layer, with its trailing dot."""
    return f"layers.{layer}."


def linear_names(architecture: Architecture) -> list[str]:
    """Every 2-bit linear layer, in execution order: "layers.0.attn.q", ..."""
    return [layer_prefix(i) + kind for i in range(architecture.num_layers) for kind in LINEARS]


def linear_kind(name: str) -> str:
    """ "layers.7.attn.q" -> "attn.q"."""
    return name.split(".", 2)[2]


def linear_shape(architecture: Architecture, kind: str) -> tuple[int, int]:
    """(N, K) = (out_features, in_features) of a linear layer of this kind ("attn.q", ...)."""
    a = architecture
    return {
        "attn.q": (a.attention_size, a.hidden_size),
        "attn.k": (a.kv_size, a.hidden_size),
        "attn.v": (a.kv_size, a.hidden_size),
        "attn.o": (a.hidden_size, a.attention_size),
        "mlp.gate": (a.intermediate_size, a.hidden_size),
        "mlp.up": (a.intermediate_size, a.hidden_size),
        "mlp.down": (a.hidden_size, a.intermediate_size),
    }[kind]


def has_bias(architecture: Architecture, kind: str) -> bool:
    """Whether linear layers of this kind carry a `.bias` tensor."""
    if kind == "attn.o":
        return architecture.o_bias
    return architecture.qkv_bias if kind in ATTENTION_LINEARS else architecture.mlp_bias


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for positive integers."""
    return -(-a // b)


def linear_tensors(name: str, shape: tuple[int, int], group_size: int, bias: bool) -> dict[str, TensorSpec]:
    """The tensors that make up one 2-bit linear layer."""
    n, k = shape
    tensors = {
        f"{name}.codes": TensorSpec("U8", (n, ceil_div(k, CODES_PER_BYTE))),
        f"{name}.levels": TensorSpec("I8", (n, ceil_div(k, group_size), LEVELS_PER_GROUP)),
        f"{name}.scale": TensorSpec("F32", (n,)),
    }
    if bias:
        tensors[f"{name}.bias"] = TensorSpec("F32", (n,))
    return tensors


def table_tensors(name: str, rows: int, columns: int, bits: int) -> dict[str, TensorSpec]:
    """The tensors of an embedding or head table: int8 with a scale per row, or float16."""
    if bits == 16:
        return {f"{name}.weight": TensorSpec("F16", (rows, columns))}
    return {f"{name}.weight": TensorSpec("I8", (rows, columns)), f"{name}.scale": TensorSpec("F32", (rows,))}


def expected_tensors(architecture: Architecture, quantization: Quantization) -> dict[str, TensorSpec]:
    """Every tensor that a file of this architecture and quantization must hold, and may not hold more than.

    Raises BadMetadata when the two contradict each other (an override for a layer that is not there; one
    table with two different bit widths).
    """
    a, q = architecture, quantization
    names = linear_names(a)
    strangers = q.group_size_overrides.keys() - set(names)
    if strangers:
        raise BadMetadata(
            f"quantization.group_size_overrides: no linear layer is called {brief(min(strangers, key=str))}"
        )
    tensors: dict[str, TensorSpec] = {}
    for name in names:
        kind = linear_kind(name)
        tensors |= linear_tensors(name, linear_shape(a, kind), q.group_of(name), has_bias(a, kind))
    for i in range(a.num_layers):
        prefix = layer_prefix(i)
        tensors[prefix + "act_clip"] = TensorSpec("F32", (len(ACTIVATION_SITES),))
        tensors[prefix + "kv_clip"] = TensorSpec("F32", (len(KV_SITES),))
        if a.qk_norm:
            tensors[prefix + "attn.q_norm"] = TensorSpec("F32", (a.head_dim,))
            tensors[prefix + "attn.k_norm"] = TensorSpec("F32", (a.head_dim,))
    tensors |= table_tensors(EMBED, a.vocab_size, a.hidden_size, q.embed_bits)
    if a.tied_table:
        if q.head_bits != q.embed_bits:
            raise BadMetadata(
                f"quantization: one table serves embedding and head, so head_bits {q.head_bits} "
                f"must equal embed_bits {q.embed_bits}"
            )
        if a.head_matrix:
            tensors[HEAD_MATRIX] = TensorSpec("F16", (a.hidden_size, a.hidden_size))
        else:
            tensors[FINAL_GAIN] = TensorSpec("F32", (a.hidden_size,))
            if q.r1:
                tensors[ROTATION_SIGNS] = TensorSpec("I8", (a.hidden_size,))
    else:
        tensors |= table_tensors(HEAD, a.vocab_size, a.hidden_size, q.head_bits)
    tensors[INV_FREQ] = TensorSpec("F64", (a.head_dim // 2,))
    tensors[TOKENIZER] = TensorSpec("U8", (None,))
    return tensors


def required_features(architecture: Architecture, quantization: Quantization) -> list[str]:
    """The features, sorted, that a reader must know to run such a model; the file lists exactly these."""
    a, q = architecture, quantization
    used = {
        "a8": q.a_bits == 8,
        "bias": a.qkv_bias or a.o_bias or a.mlp_bias,
        "head_matrix": a.head_matrix,
        "kv8": q.kv_bits == 8,
        "qk_norm": a.qk_norm,
        "sliding_window": a.attention_window is not None,
        "tied_table": a.tied_table,
    }
    return sorted(name for name, value in used.items() if value)
