"""The NumPy backend against SPEC.md written plainly (reference.py), and the parts it is made of.

Shape suffixes: M tokens, K columns, N rows, G KV heads, D head_dim.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcpformat import Architecture, Quantization
from rcpformat.arithmetic import integer_matmul, quantize_kv
from rcpformat.reader import RcpFile
from rcprun.backends.numpy import NumpyBackend, attention, backend
from rcprun.backends.numpy.kvcache import KEY, VALUE, KVCache
from rcprun.backends.numpy.matrix import IntegerMatrix
from rcprun.backends.numpy.reference import ReferenceModel
from tiny_rcp import LDP, TINY, write_random

# Both sides are float32 and quantize what they compute: the last bits of a reduction differ, and unless that moves a
# value over a rounding boundary, nothing else does. Logits are about 10 in size, so this is some 10 last bits. float16
# heads round their input to 11 bits, so there a last bit may become 2**-11 of one input. With a matrix before such a
# head, one of its inputs of up to 3 moves all 172 of the head's by 2**-11 of that, and a logit by sqrt(172) times as
# much: 0.02, and two of them by 0.04.
TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-3
MATRIX_TOLERANCE = 4e-2

BASE = replace(
    TINY,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    hidden_size=172,  # a short last group, a block Hadamard, and padding in the last byte of a row of down_proj
    intermediate_size=210,
    max_position_embeddings=640,
)
VARIANTS = {
    "plain": (BASE, LDP),
    "one table": (replace(BASE, tied_table=True), LDP),
    "one table, matrix": (replace(BASE, tied_table=True, head_matrix=True), LDP),
    "one 16-bit table, matrix": (
        replace(BASE, tied_table=True, head_matrix=True),
        replace(LDP, head_bits=16, embed_bits=16),
    ),
    "one table, r1 off": (replace(BASE, tied_table=True), replace(LDP, r1=False)),
    "no online rotation": (BASE, replace(LDP, r1=False, r2=False, r3=False, r4=False)),
    "sliding window": (replace(BASE, attention_window=(5, None)), LDP),
    "qk_norm and biases": (replace(BASE, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True), LDP),
    "a8 kv8": (replace(BASE, hidden_size=1100), replace(LDP, a_bits=8, kv_bits=8)),  # more columns than exact at once
    "group 64": (BASE, replace(LDP, group_size=64, group_size_overrides={"layers.1.mlp.up": 128})),
    "multi-query, yarn": (replace(BASE, num_kv_heads=1, rope_attention_factor=1.1), LDP),
    "16-bit tables": (BASE, replace(LDP, head_bits=16, embed_bits=16)),
    "one 16-bit table": (replace(BASE, tied_table=True), replace(LDP, head_bits=16, embed_bits=16)),
}


def open_model(path: Path, architecture: Architecture, quantization: Quantization, seed: int = 3) -> RcpFile:
    write_random(path / "m.rcp", architecture, quantization, seed=seed)
    return RcpFile.open(path / "m.rcp")


def all_logits(model: NumpyBackend, tokens: list[int]) -> np.ndarray:
    model.truncate(0)
    return np.concatenate(list(model.forward_all(tokens)))


def random_tokens(count: int, vocabulary: int) -> list[int]:
    return np.random.default_rng(5).integers(0, vocabulary, count).tolist()


@pytest.mark.parametrize(("architecture", "quantization"), VARIANTS.values(), ids=VARIANTS.keys())
def test_prefill_and_decode_follow_the_specification(
    architecture: Architecture, quantization: Quantization, tmp_path: Path
) -> None:
    file = open_model(tmp_path, architecture, quantization)
    tokens = random_tokens(20, architecture.vocab_size)
    expected = ReferenceModel(file).logits(tokens)
    assert expected.std() > 1  # a model that says something
    tolerance = TOLERANCE if quantization.head_bits == 8 else HALF_TOLERANCE
    if architecture.head_matrix and quantization.head_bits == 16:  # rounded to float16 twice, with a sum in between
        tolerance = MATRIX_TOLERANCE
    model = NumpyBackend(file, 32)
    np.testing.assert_allclose(all_logits(model, tokens), expected, rtol=0, atol=tolerance)
    model.truncate(0)
    one_by_one = np.stack([model.forward([token]) for token in tokens])
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=tolerance)
    model.truncate(7)
    np.testing.assert_allclose(model.forward(tokens[7:]), expected[-1], rtol=0, atol=tolerance)


def test_one_linear_layer_gives_the_references_bits(tmp_path: Path) -> None:
    """From equal floats: equal codes, equal sums, the same float operations after them."""
    from rcprun.backends.numpy.layers import Linear

    file = open_model(tmp_path, *VARIANTS["qk_norm and biases"])
    x_MK = np.random.default_rng(0).standard_normal((9, BASE.hidden_size)).astype(np.float32)
    x_MK[4] = 0
    fused = Linear(file, ["layers.0.attn.q", "layers.0.attn.v"])(x_MK, np.float32(0.9))
    reference = ReferenceModel(file)
    parts = [reference.linear(f"layers.0.attn.{which}", x_MK, np.float32(0.9)) for which in "qv"]
    np.testing.assert_array_equal(fused, np.concatenate(parts, axis=1))


def test_blocks_of_tokens_and_of_scratch_memory_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = replace(BASE, attention_window=(40, None))
    file = open_model(tmp_path, architecture, LDP)
    tokens = random_tokens(90, architecture.vocab_size)
    whole = all_logits(NumpyBackend(file, 90), tokens)
    monkeypatch.setattr(backend, "BLOCK_TOKENS", 32)
    monkeypatch.setattr(backend, "_LOGITS_BYTES", 4 * architecture.vocab_size * 10)
    monkeypatch.setattr(attention, "_SCRATCH_BYTES", 1 << 12)
    blocks = list(NumpyBackend(file, 90).forward_all(tokens))
    assert {len(block) for block in blocks} == {10, 2, 6}
    # One code in some 500,000 may fall to the other side of a rounding boundary, so a few rows may differ a little.
    far = np.abs(np.concatenate(blocks) - whole).max(axis=1) > TOLERANCE
    assert far.mean() < 0.1


def test_the_same_backend_twice_gives_the_same_bits(tmp_path: Path) -> None:
    file = open_model(tmp_path, *VARIANTS["plain"])
    tokens = random_tokens(300, BASE.vocab_size)  # more than one block
    first, second = NumpyBackend(file, 320), NumpyBackend(file, 320)
    np.testing.assert_array_equal(all_logits(first, tokens), all_logits(second, tokens))
    np.testing.assert_array_equal(first.forward([3]), second.forward([3]))


def test_last_logits_are_the_last_row_of_all(tmp_path: Path) -> None:
    """With an integer head, whatever the number of rows, the bits are the same."""
    model = NumpyBackend(open_model(tmp_path, *VARIANTS["plain"]), 32)
    tokens = random_tokens(20, BASE.vocab_size)
    rows = all_logits(model, tokens)
    model.truncate(0)
    np.testing.assert_array_equal(model.forward(tokens), rows[-1])


@pytest.mark.parametrize(
    ("largest_code", "columns"),
    [(8, 172), (8, 16_512), (8, 40_000), (128, 1032), (128, 1033), (128, 5000), (127, 4096)],
)
def test_integer_products_are_exact(largest_code: int, columns: int) -> None:
    """Random codes, and the worst case: all of them at their limits with one sign."""
    rng = np.random.default_rng(columns)
    integers_NK = rng.integers(-127, 128, (37, columns)).astype(np.int8)
    integers_NK[0], integers_NK[1] = 127, -127
    codes_MK = rng.integers(-largest_code, min(largest_code, 127) + 1, (3, columns)).astype(np.int8)
    codes_MK[0] = -largest_code
    sums_MN = IntegerMatrix(integers_NK, largest_code=largest_code).product(codes_MK.astype(np.float32))
    expected_MN = integer_matmul(codes_MK, integers_NK)
    np.testing.assert_array_equal(sums_MN, expected_MN.astype(np.float32))
    if abs(expected_MN).max() <= 1 << 24:
        np.testing.assert_array_equal(sums_MN.astype(np.int64), expected_MN)


@pytest.mark.parametrize("bits", [4, 8])
def test_cache_reads_back_what_was_quantized(bits: int) -> None:
    architecture = replace(BASE, num_layers=2)
    cache = KVCache(architecture, bits, context=600)
    rng = np.random.default_rng(bits)
    x_MGD = (rng.standard_normal((300, 2, 16)) * 3).astype(np.float32)
    expected = quantize_kv(x_MGD, np.float32(0.9), bits)
    cache.write(1, VALUE, 0, x_MGD[:200], np.float32(0.9))
    cache.reserve(300)  # growing keeps what is there
    cache.write(1, VALUE, 200, x_MGD[200:], np.float32(0.9))
    cache.write(1, KEY, 0, -x_MGD, np.float32(0.5))
    read = cache.read(1, VALUE, slice(1, 2), slice(150, 300))
    np.testing.assert_array_equal(read[0], expected.dequantize()[150:, 1])


@pytest.mark.parametrize(("bits", "bytes_per_vector"), [(4, 16 // 2 + 4), (8, 16 + 4)])
def test_cache_memory_is_that_of_the_codes(bits: int, bytes_per_vector: int) -> None:
    """Codes in bits/8 bytes each, and two float16 a vector; capacity doubles up to the context."""
    cache = KVCache(replace(BASE, num_layers=3), bits, context=600)
    for length, capacity in ((1, 256), (257, 512), (513, 600), (600, 600)):
        cache.reserve(length)
        assert cache.capacity == capacity
        assert cache.nbytes == 3 * 2 * 2 * capacity * bytes_per_vector


def test_memory_of_a_model(tmp_path: Path) -> None:
    """int8 weights and head, one float32 scale a row; the cache at its first capacity."""
    model = NumpyBackend(open_model(tmp_path, *VARIANTS["plain"]), 32)
    qkv, o, gate_up, down = (128, 172), (172, 64), (420, 172), (172, 210)
    weights = 2 * sum(n * (k + 4) for n, k in (qkv, o, gate_up, down)) + BASE.vocab_size * (172 + 4)
    assert model.memory().weights == weights
    assert model.memory().kv_cache == 2 * 2 * 2 * 32 * 12


def test_a_window_hides_what_is_behind_it(tmp_path: Path) -> None:
    """One layer with window W: a token's logits depend on the last W tokens, itself included, and on no earlier one."""
    file = open_model(tmp_path, replace(BASE, num_layers=1, attention_window=(4,)), LDP)
    tokens = random_tokens(12, BASE.vocab_size)
    changed = [*tokens[:7], (tokens[7] + 1) % BASE.vocab_size, *tokens[8:]]
    model = NumpyBackend(file, 32)
    same = (all_logits(model, tokens) == all_logits(model, changed)).all(axis=1)
    assert same.tolist() == [True] * 7 + [False] * 4 + [True]


def test_reference_takes_int8_rows_at_their_word(write_model: Callable[..., Path]) -> None:
    """The reference's own embedding and head against the formulas, by hand, for one token."""
    file = RcpFile.open(write_model())
    reference = ReferenceModel(file)
    row = file.tensor("embed.weight")[5].astype(np.float32) * file.tensor("embed.scale")[5]
    np.testing.assert_array_equal(reference.embed([5])[0], row)
    h = row / np.sqrt(np.mean(row**2) + np.float32(1e-5))
    scale = np.abs(h).max() / 127
    logits = (file.tensor("head.weight").astype(np.int64) @ np.rint(h / scale).astype(np.int64)) * scale
    np.testing.assert_allclose(reference.head(row[None])[0], logits * file.tensor("head.scale"), rtol=1e-4, atol=1e-3)


def test_cache_survives_a_growth_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(TINY, bits=4, context=1024)
    capacity, nbytes = cache.capacity, cache.nbytes

    def explode(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(np, "empty", explode)
        cache.reserve(1000)
    assert (cache.capacity, cache.nbytes) == (capacity, nbytes)
    cache.reserve(1000)
    assert cache.capacity == 1000
