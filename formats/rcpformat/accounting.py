"""What a `.rcp` file of a given shape weighs, and against what, without the file. Knows nothing of its contents."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from rcpformat import spec
from rcpformat.architecture import Architecture, Quantization, TokenizerInfo
from rcpformat.header import lay_out, serialize_header
from rcpformat.metadata import RcpMetadata

_KINDS = ("codes", "levels", "scales", "norms, biases, clips", "embedding", "head", "tokenizer", "header")
_LINEAR_PARTS = {"codes": "codes", "levels": "levels", "scale": "scales"}
_FP16_BYTES = 2


@dataclass(frozen=True)
class AccountingRow:
    """Bytes of all tensors of one kind ("codes", "levels", "embedding", ...)."""

    kind: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """The size of a file, by kind of tensor, and of the float16 checkpoint it replaces."""

    rows: tuple[AccountingRow, ...]
    linear_weights: int
    """Weights in the 2-bit linear layers."""
    fp16_bytes: int
    """All parameters of the original model, a tied embedding counted once, at 2 bytes each."""

    @property
    def total_bytes(self) -> int:
        """Size of the file, without provenance and chat template."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Bits that the linear layers take (codes, levels, scales), per weight in them."""
        return 8 * sum(row.nbytes for row in self.rows if row.kind in _LINEAR_PARTS.values()) / self.linear_weights

    @property
    def ratio(self) -> float:
        """How many times smaller than the float16 checkpoint the file is."""
        return self.fp16_bytes / self.total_bytes


def _kind(name: str) -> str:
    if name == spec.TOKENIZER:
        return "tokenizer"
    if name == spec.HEAD_MATRIX:
        return "head"
    owner, _, part = name.rpartition(".")
    if owner in (spec.EMBED, spec.HEAD):
        return {spec.EMBED: "embedding", spec.HEAD: "head"}[owner]
    return _LINEAR_PARTS.get(part, "norms, biases, clips")


def _original_parameters(architecture: Architecture, tied: bool) -> int:
    a = architecture
    shapes = {kind: spec.linear_shape(a, kind) for kind in spec.LINEARS}
    linears = sum(n * k + n * spec.has_bias(a, kind) for kind, (n, k) in shapes.items())
    norms = 2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0)
    tables = a.vocab_size * a.hidden_size * (1 if tied else 2)
    return a.num_layers * (linears + norms) + a.hidden_size + tables


def account(
    architecture: Architecture,
    quantization: Quantization,
    tokenizer_bytes: int = 0,
    *,
    tied_checkpoint: bool | None = None,
    file_bytes: int | None = None,
) -> Accounting:
    """Bytes by kind for a model of this shape.

    tied_checkpoint: whether the original has one table for embedding and head. None: as the file has it; say True
    for a tied model that is stored with two tables. file_bytes: the size of the file, where there is one: its header is
    what the tensors leave of it. None: a header without provenance and chat template.
    """
    forms = {
        name: spec.TensorSpec(form.dtype, tuple(tokenizer_bytes if size is None else size for size in form.shape))
        for name, form in spec.expected_tensors(architecture, quantization).items()
    }
    entries = lay_out(forms)
    metadata = RcpMetadata(
        architecture=architecture,
        quantization=quantization,
        tokenizer=TokenizerInfo(bos_id=None, eos_ids=(), add_bos=False),
        generation={},
        provenance={},
    )
    nbytes: Counter[str] = Counter()
    for name, entry in entries.items():
        nbytes[_kind(name)] += entry.nbytes
    header = len(serialize_header(metadata.to_entries(dict.fromkeys(entries, "0" * 64)), entries))
    nbytes["header"] = header if file_bytes is None else file_bytes - nbytes.total()
    tied = architecture.tied_table if tied_checkpoint is None else tied_checkpoint
    return Accounting(
        rows=tuple(AccountingRow(kind, nbytes[kind]) for kind in _KINDS),
        linear_weights=architecture.num_layers
        * sum(math.prod(spec.linear_shape(architecture, kind)) for kind in spec.LINEARS),
        fp16_bytes=_FP16_BYTES * _original_parameters(architecture, tied),
    )
