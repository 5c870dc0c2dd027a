"""What `rcpconv inspect` shows: a file's metadata, sizes, and how its codes and levels are used. Knows no torch.

Shape suffixes: N rows, G groups of columns, 4 levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rcpformat import spec
from rcpformat.accounting import Accounting, account
from rcpformat.architecture import Architecture, Quantization
from rcpformat.codec import PackedLinear, unpack_codes
from rcpformat.reader import RcpFile

LEVEL_BINS = 17
"""Bins of the level histogram: 15 levels each, the middle one centred on zero."""
_BARS = " ▁▂▃▄▅▆▇█"


def model_size(
    architecture: Architecture,
    quantization: Quantization,
    provenance: Mapping[str, Any],
    tokenizer_bytes: int,
    file_bytes: int | None = None,
) -> Accounting:
    """Bytes by kind, against the float16 checkpoint that `provenance` tells of: with one table or two."""
    plain = account(architecture, quantization, tokenizer_bytes, file_bytes=file_bytes)
    tied = account(architecture, quantization, tokenizer_bytes, tied_checkpoint=True, file_bytes=file_bytes)
    return tied if tied.fp16_bytes == 2 * provenance.get("parameters", 0) else plain


def size_json(sizes: Accounting) -> dict[str, Any]:
    """An Accounting as JSON values."""
    return {
        "by_kind": {row.kind: row.nbytes for row in sizes.rows},
        "bytes": sizes.total_bytes,
        "fp16_bytes": sizes.fp16_bytes,
        "ratio": sizes.ratio,
        "linear_weights": sizes.linear_weights,
        "bits_per_linear_weight": sizes.bits_per_weight,
    }


def size_table(sizes: Mapping[str, Any]) -> Table:
    """Bytes and share by kind of tensor, the total, and the ratio to float16, from size_json."""
    table = Table("kind", "bytes", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, nbytes in sizes["by_kind"].items():
        if nbytes:
            table.add_row(kind, f"{nbytes:,}", f"{nbytes / sizes['bytes']:.1%}")
    table.add_section()
    table.add_row("file", f"{sizes['bytes']:,}", "100.0%", style="bold")
    table.add_row("original in FP16", f"{sizes['fp16_bytes']:,}", f"{sizes['ratio']:.2f}×")
    table.caption = f"{sizes['bits_per_linear_weight']:.3f} bits a weight in the 2-bit layers"
    return table


def inspect_file(path: Path) -> dict[str, Any]:
    """Everything that `rcpconv inspect` shows, as JSON values. Reads all codes and levels; raises FormatError."""
    with RcpFile.open(path) as file:
        metadata = file.metadata
        sizes = model_size(
            metadata.architecture,
            metadata.quantization,
            metadata.provenance,
            file.header_tensors[spec.TOKENIZER].nbytes,
            path.stat().st_size,
        )
        linears = spec.linear_names(file.architecture)
        parts = {f"{name}.{part}" for name in linears for part in ("codes", "levels", "scale")}
        return {
            "file": str(path),
            "file_bytes": path.stat().st_size,
            "architecture": metadata.architecture.to_json(),
            "quantization": metadata.quantization.to_json(),
            "required_features": metadata.required_features,
            "tokenizer": metadata.tokenizer.to_json(),
            "generation": dict(metadata.generation),
            "provenance": dict(metadata.provenance),
            "sizes": size_json(sizes),
            "linears": [_describe_linear(file.linear(name)) for name in linears],
            "other_tensors": [
                {"name": name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
                for name, entry in sorted(file.header_tensors.items())
                if name not in parts
            ],
        }


def _describe_linear(linear: PackedLinear) -> dict[str, Any]:
    n, k = linear.shape
    nbytes = linear.codes.nbytes + linear.levels.nbytes + linear.scale.nbytes
    levels = np.bincount(linear.levels.reshape(-1) + np.int16(spec.LEVEL_LIMIT), minlength=2 * spec.LEVEL_LIMIT + 1)
    return {
        "name": linear.name,
        "shape": [n, k],
        "group_size": linear.group_size,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (n * k),
        "code_shares": (code_counts(linear.codes, k) / (n * k)).tolist(),
        "level_shares": [float(part.sum() / levels.sum()) for part in np.array_split(levels, LEVEL_BINS)],
        "scale_range": [float(linear.scale.min()), float(linear.scale.max())],
    }


def code_counts(packed: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
    """How often each code 0..3 occurs in packed rows (N, ceil(K/4)); padding is not counted."""
    codes_of_byte = unpack_codes(np.arange(256, dtype=np.uint8)[:, None], spec.CODES_PER_BYTE)
    bytes_seen = np.bincount(packed.reshape(-1), minlength=256)
    counts = np.array([bytes_seen @ (codes_of_byte == code).sum(axis=1) for code in range(spec.LEVELS_PER_GROUP)])
    counts[0] -= len(packed) * (packed.shape[1] * spec.CODES_PER_BYTE - k)
    return counts


def bars(shares: Sequence[float]) -> str:
    """A histogram as one character a bin, the tallest full height; a bin that is not empty shows."""
    top = max(shares)
    return "".join(_BARS[max(1, round(8 * share / top))] if share else _BARS[0] for share in shares)


def render(report: Mapping[str, Any], console: Console) -> None:
    """Print what inspect_file found. `bits` are bits a weight; `0–3` is how often each code is used."""
    console.print(f"[bold]{report['file']}[/bold]: {report['file_bytes']:,} bytes", highlight=False, soft_wrap=True)
    for title in ("architecture", "quantization", "tokenizer", "generation", "provenance"):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for key, value in report[title].items():
            table.add_row(key, _short(value))
        if report[title]:
            console.print(table)
    table = _plain_table("2-bit linear layers", "layer", "shape", "bytes", "bits", "0–3", "levels −127…127")
    for linear in report["linears"]:
        table.add_row(
            linear["name"],
            "×".join(map(str, linear["shape"])),
            f"{linear['bytes']:,}",
            f"{linear['bits_per_weight']:.3f}",
            bars(linear["code_shares"]),
            bars(linear["level_shares"]),
        )
    console.print(table)
    table = _plain_table("other tensors", "tensor", "shape", "bytes", "dtype")
    for tensor in report["other_tensors"]:
        table.add_row(tensor["name"], "×".join(map(str, tensor["shape"])), f"{tensor['bytes']:,}", tensor["dtype"])
    console.print(table)
    console.print(size_table(report["sizes"]))


def _plain_table(title: str, *headings: str) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("bytes", "bits") else "left")
    return table


def _short(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text)} characters)"
