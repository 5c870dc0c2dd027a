"""The size of a file, known beforehand: equal to a real file's, and the figures that the documentation states."""

import dataclasses
from pathlib import Path

import pytest

from rcpformat import Architecture, RcpFile, spec
from rcpformat.accounting import account
from shapes import LLAMA_2_7B, LLAMA_3_8B, LLAMA_32_1B
from tiny_rcp import LDP, TINY, write_random

TIED_1B = dataclasses.replace(LLAMA_32_1B, tied_table=True)
LLAMA_2_TOKENIZER, LLAMA_3_TOKENIZER = 1_842_767, 9_085_657


def test_ratios_to_float16() -> None:
    assert account(LLAMA_2_7B, LDP, LLAMA_2_TOKENIZER).ratio == pytest.approx(6.44, abs=0.01)
    assert account(LLAMA_3_8B, LDP, LLAMA_3_TOKENIZER).ratio == pytest.approx(5.30, abs=0.01)
    assert account(LLAMA_32_1B, LDP, tied_checkpoint=True).ratio == pytest.approx(3.08, abs=0.01)
    assert account(TIED_1B, LDP).ratio == pytest.approx(4.59, abs=0.01)


def test_original_parameters_are_the_published_numbers() -> None:
    assert account(LLAMA_2_7B, LDP).fp16_bytes == 2 * 6_738_415_616
    assert account(LLAMA_3_8B, LDP).fp16_bytes == 2 * 8_030_261_248
    assert account(TIED_1B, LDP).fp16_bytes == account(LLAMA_32_1B, LDP, tied_checkpoint=True).fp16_bytes
    assert account(TIED_1B, LDP).fp16_bytes == 2 * 1_235_814_400


def test_bits_per_weight() -> None:
    """2 of codes, 8·4/128 of levels, 32 a row of scale."""
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    bits = 2 + 0.25 + 32 * rows / (32 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert account(LLAMA_2_7B, LDP).bits_per_weight == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize(
    "architecture",
    [TINY, dataclasses.replace(TINY, num_layers=3, tied_table=True, qkv_bias=True, qk_norm=True, hidden_size=130)],
)
def test_equals_a_real_file(tmp_path: Path, architecture: Architecture) -> None:
    path = tmp_path / "model.rcp"
    write_random(path, architecture, LDP, provenance={}, generation={})
    with RcpFile.open(path) as file:
        tensors = file.header_tensors
    accounting = account(architecture, LDP, tensors[spec.TOKENIZER].nbytes)
    rows = {row.kind: row.nbytes for row in accounting.rows}
    for part, kind in (("codes", "codes"), ("levels", "levels")):
        assert rows[kind] == sum(entry.nbytes for name, entry in tensors.items() if name.endswith("." + part))
    assert rows["embedding"] == sum(entry.nbytes for name, entry in tensors.items() if name.startswith("embed."))
    assert rows["head"] == sum(entry.nbytes for name, entry in tensors.items() if name.startswith("head."))
    assert sum(rows.values()) - rows["header"] == sum(entry.nbytes for entry in tensors.values())
    assert abs(accounting.total_bytes - path.stat().st_size) < 100  # the special tokens in the metadata
