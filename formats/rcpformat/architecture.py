"""What a model is (`Architecture`) and how it was quantized (`Quantization`), as the file's metadata states them.

Frozen, validated on construction, and the same on both sides of the file. Knows nothing of tensors or bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from rcpformat.errors import BadMetadata, brief

MAX_LAYERS = 1024
MAX_DIMENSION = 1 << 20
MAX_VOCABULARY = 1 << 24
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-126, 2.0**127
"""Real numbers in the architecture are normal and finite after rounding to float32."""


def _integer(owner: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadMetadata(f"{owner}.{name}: expected an integer from {low} to {high}, found {brief(value)}")


def _boolean(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise BadMetadata(f"{owner}.{name}: expected true or false, found {brief(value)}")


def _one_of(owner: str, name: str, value: object, known: tuple[int, ...]) -> None:
    if type(value) is not int or value not in known:
        raise BadMetadata(f"{owner}.{name}: expected one of {list(known)}, found {brief(value)}")


def _positive(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST_FACTOR <= value <= LARGEST_FACTOR:
        raise BadMetadata(f"{owner}.{name}: expected a number from 2^-126 to 2^127, found {brief(value)}")


class _JsonRecord:
    """to_json / from_json for frozen dataclasses whose fields are JSON values or tuples of them.

    Unknown keys are ignored on reading: anything that changes the meaning of a file is announced
    by a required feature instead (SPEC.md, "Compatibility").
    """

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready values; tuples become lists."""
        out: dict[str, Any] = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            out[item.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Build and validate from parsed JSON. Raises BadMetadata naming the key."""
        if not isinstance(value, Mapping):
            raise BadMetadata(f"{cls.__name__}: expected a JSON object, found {type(value).__name__}")
        arguments: dict[str, Any] = {}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name in value:
                found = value[item.name]
                arguments[item.name] = tuple(found) if isinstance(found, list) else found
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                raise BadMetadata(f"{cls.__name__}.{item.name}: expected this key, found none")
        return cls(**arguments)


@dataclass(frozen=True, kw_only=True)
class Architecture(_JsonRecord):
    """A LLaMA-family decoder: everything a runtime needs to know beside the tensors.

    RMSNorm gains are folded into the linear layers, so none is listed. RoPE frequencies are a tensor
    (`rope.inv_freq`), which makes every static scaling rule (linear, llama3, yarn) look alike here.
    """

    model_type: str
    """Where it came from ("llama", "mistral", "qwen2", "qwen3"). Informational: never branch on it."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    """The context length, in tokens, that the model was trained for."""
    attention_window: tuple[int | None, ...] | None = None
    """Sliding window per layer in tokens (a query at i sees keys j with i - j < window); None = all of them."""
    rope_attention_factor: float = 1.0
    """Multiplies cos and sin (yarn)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Per-head RMSNorm with gain on q and k before RoPE (Qwen3)."""
    tied_table: bool = False
    """One table serves embedding and head (SPEC.md, "One table")."""
    head_matrix: bool = False
    """With one table: a matrix of its own turns what the head takes, for rotations that are no Hadamard ones."""

    def to_json(self) -> dict[str, Any]:
        """As _JsonRecord.to_json, without what files had no word for before it is used."""
        out = super().to_json()
        if not self.head_matrix:
            del out["head_matrix"]
        return out

    def __post_init__(self) -> None:
        owner = "architecture"
        if not isinstance(self.model_type, str):
            raise BadMetadata(f"{owner}.model_type: expected a string, found {brief(self.model_type)}")
        _integer(owner, "vocab_size", self.vocab_size, 1, MAX_VOCABULARY)
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            _integer(owner, name, getattr(self, name), 1, MAX_DIMENSION)
        _integer(owner, "num_layers", self.num_layers, 1, MAX_LAYERS)
        _integer(owner, "max_position_embeddings", self.max_position_embeddings, 1, 1 << 32)
        _positive(owner, "rms_norm_eps", self.rms_norm_eps)
        _positive(owner, "rope_attention_factor", self.rope_attention_factor)
        for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_table", "head_matrix"):
            _boolean(owner, name, getattr(self, name))
        if self.head_matrix and not self.tied_table:
            raise BadMetadata(
                f"{owner}.head_matrix: true, but tied_table is false; leave head_matrix out, or have one table"
            )
        if self.head_dim % 2:
            raise BadMetadata(f"{owner}.head_dim: expected an even number (RoPE works on pairs), found {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise BadMetadata(
                f"{owner}.num_heads: expected a multiple of num_kv_heads {self.num_kv_heads}, found {self.num_heads}"
            )
        for name, width in (("num_heads * head_dim", self.attention_size), ("num_kv_heads * head_dim", self.kv_size)):
            if width > MAX_DIMENSION:
                raise BadMetadata(f"{owner}: {name} is {width}, the limit is {MAX_DIMENSION}")
        if self.attention_window is not None:
            if not isinstance(self.attention_window, tuple) or len(self.attention_window) != self.num_layers:
                raise BadMetadata(
                    f"{owner}.attention_window: expected one entry for each of {self.num_layers} layers, "
                    f"found {brief(self.attention_window)}"
                )
            for window in self.attention_window:
                if window is not None:
                    _integer(owner, "attention_window", window, 1, 1 << 32)

    @property
    def attention_size(self) -> int:
        """num_heads * head_dim: rows of q_proj, columns of o_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """num_kv_heads * head_dim: rows of k_proj and of v_proj."""
        return self.num_kv_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens, or None when it attends to everything before it."""
        return None if self.attention_window is None else self.attention_window[layer]


@dataclass(frozen=True, kw_only=True)
class Quantization(_JsonRecord):
    """Bit widths, group sizes and online rotations."""

    ACTIVATION_BITS: ClassVar[tuple[int, ...]] = (4, 8)
    """What a_bits and kv_bits can be."""

    method: str
    """How the codes were found ("ldp", "rtn", ...). Informational: all methods give the same tensors."""
    group_size: int = 128
    group_size_overrides: Mapping[str, int] = field(default_factory=dict)
    """Linear layer name -> group size, where it differs from group_size."""
    a_bits: int = 4
    kv_bits: int = 4
    head_bits: int = 8
    embed_bits: int = 8
    r1: bool = True
    """Residual stream rotated. Merged into the weights; only a model with one table needs to know."""
    r2: bool = True
    """Value heads rotated. Merged into the weights: informational."""
    r3: bool = True
    """Hadamard over head_dim on q and k after RoPE, online."""
    r4: bool = True
    """Hadamard over intermediate_size on down_proj's input, online."""

    def __post_init__(self) -> None:
        owner = "quantization"
        if not isinstance(self.method, str):
            raise BadMetadata(f"{owner}.method: expected a string, found {brief(self.method)}")
        _one_of(owner, "group_size", self.group_size, (64, 128))
        if not isinstance(self.group_size_overrides, Mapping):
            raise BadMetadata(
                f"{owner}.group_size_overrides: expected a JSON object, found {brief(self.group_size_overrides)}"
            )
        for name, size in self.group_size_overrides.items():
            _one_of(owner, f"group_size_overrides[{brief(name)}]", size, (64, 128))
        _one_of(owner, "a_bits", self.a_bits, self.ACTIVATION_BITS)
        _one_of(owner, "kv_bits", self.kv_bits, self.ACTIVATION_BITS)
        _one_of(owner, "head_bits", self.head_bits, (8, 16))
        _one_of(owner, "embed_bits", self.embed_bits, (8, 16))
        for name in ("r1", "r2", "r3", "r4"):
            _boolean(owner, name, getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        """As _JsonRecord.to_json, with the overrides as a plain dict."""
        return super().to_json() | {"group_size_overrides": dict(self.group_size_overrides)}

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Every group size that there is, the common one first."""
        return tuple(dict.fromkeys((self.group_size, *self.group_size_overrides.values())))

    def group_of(self, linear: str) -> int:
        """Group size along K of one linear layer, in weights."""
        return self.group_size_overrides.get(linear, self.group_size)


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo(_JsonRecord):
    """What generation needs beside tokenizer.json."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends a generation (LLaMA-3 has several); may be empty."""
    add_bos: bool
    """Whether plain-text prompts start with bos_id."""
    chat_template: str | None = None
    """A jinja2 template in the transformers dialect; it is data, run in a sandbox."""

    def __post_init__(self) -> None:
        owner = "tokenizer"
        if self.bos_id is not None:
            _integer(owner, "bos_id", self.bos_id, 0, MAX_VOCABULARY)
        if not isinstance(self.eos_ids, tuple):
            raise BadMetadata(f"{owner}.eos_ids: expected a list of token ids, found {brief(self.eos_ids)}")
        for token in self.eos_ids:
            _integer(owner, "eos_ids", token, 0, MAX_VOCABULARY)
        _boolean(owner, "add_bos", self.add_bos)
        if self.add_bos and self.bos_id is None:
            raise BadMetadata(f"{owner}.add_bos: true, but there is no bos_id")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise BadMetadata(f"{owner}.chat_template: expected a string or null, found {brief(self.chat_template)}")
