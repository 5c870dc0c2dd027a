"""2-bit linear layers on the GPU against the NumPy reference: integer sums exactly, and what is fused around them."""

from typing import Any

import numpy as np
import pytest

from rcpformat import arithmetic, pack_codes
from rcpformat.codec import PackedLinear

pytestmark = pytest.mark.gpu


def random_layer(rng: np.random.Generator, n: int, k: int, group: int, bias: bool) -> PackedLinear:
    return PackedLinear(
        name="layer",
        shape=(n, k),
        group_size=group,
        codes=pack_codes(rng.integers(0, 4, (n, k), dtype=np.uint8)),
        levels=np.sort(rng.integers(-127, 128, (n, -(-k // group), 4), dtype=np.int8), axis=-1),
        scale=rng.uniform(0.5, 1.5, n).astype(np.float32) / (64 * np.float32(k) ** 0.5),
        bias=rng.normal(size=n).astype(np.float32) if bias else None,
    )


def reference(layer: PackedLinear, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    y = arithmetic.scale_sums(arithmetic.integer_matmul(codes, layer.integers()), scale, layer.scale)
    return y if layer.bias is None else y + layer.bias


def pack(*layers: PackedLinear, interleave: bool = False) -> Any:
    from rcprun.backends.cuda.linear import UnitLinear

    return UnitLinear(layers, interleave=interleave)


def padded_codes(codes: np.ndarray) -> Any:
    import cupy

    from rcprun.backends.cuda.linear import padded

    out = np.zeros((len(codes), padded(codes.shape[1])), dtype=np.int8)
    out[:, : codes.shape[1]] = codes
    return cupy.asarray(out)


def poisoned(shape: tuple[int, ...]) -> Any:
    import cupy

    return cupy.full(shape, np.nan, dtype=np.float32)


def worst(found: np.ndarray, expected: np.ndarray) -> str:
    difference = np.abs(found.astype(np.float64) - expected)
    at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    return f"worst at {tuple(map(int, at))}: found {found[at]!r}, expected {expected[at]!r}"


SHAPES = [(16, 128), (4096, 4096), (40, 300), (4096, 11008), (5, 4), (1000, 1408), (300, 172), (2112, 192)]


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes_in_are_exact(n: int, k: int, group: int, hopper: bool) -> None:
    import cupy

    from rcprun.backends.cuda.linear import CODES, STORE, linear

    rng = np.random.default_rng(n + k)
    layer = random_layer(rng, n, k, group, bias=n % 3 == 0)
    packed = pack(layer)
    for m in (1, 2, 7, 8):
        for bits in (4, 8):
            codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (m, k), dtype=np.int8)
            scale = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32)
            out = poisoned((m, n))
            device_codes, device_scale = padded_codes(codes), cupy.asarray(scale[:, 0])
            linear(
                packed,
                device_codes,
                out,
                prologue=CODES,
                epilogue=STORE,
                a_bits=bits,
                x_scale=device_scale,
                hopper=hopper,
            )
            expected = reference(layer, codes, scale)
            assert np.array_equal(out.get(), expected), f"m {m}, bits {bits}: {worst(out.get(), expected)}"


def test_several_layers_share_tiles() -> None:
    import cupy

    from rcprun.backends.cuda.linear import CODES, STORE, linear

    rng = np.random.default_rng(1)
    layers = [random_layer(rng, n, 192, 128, bias) for n, bias in ((192, True), (40, False), (13, True))]
    packed = pack(*layers)
    codes, scale = rng.integers(-8, 8, (3, 192), dtype=np.int8), np.ones((3, 1), dtype=np.float32)
    out = poisoned((3, 245))
    linear(packed, padded_codes(codes), out, prologue=CODES, epilogue=STORE, a_bits=4, x_scale=cupy.ones(3, np.float32))
    expected = np.concatenate([reference(layer, codes, scale) for layer in layers], axis=1)
    assert np.array_equal(out.get(), expected), worst(out.get(), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [192, 4096, 173, 5120, 11008])
def test_quantize_and_add(k: int, bits: int) -> None:
    """Equal floats give equal codes, so the whole is exact."""
    import cupy

    from rcprun.backends.cuda.linear import ADD, QUANTIZE, linear

    rng = np.random.default_rng(k)
    layer = random_layer(rng, 333, k, 128, bias=False)
    packed = pack(layer)
    for magnitude in (0, 1e-35, 1e-20, 1, 1e10):
        x = (rng.normal(size=(1, k)) * magnitude).astype(np.float32)
        before = rng.normal(size=(1, 333)).astype(np.float32)
        out = cupy.asarray(before)
        linear(packed, cupy.asarray(x), out, prologue=QUANTIZE, epilogue=ADD, a_bits=bits, clip=np.float32(0.87))
        expected = before + reference(layer, *arithmetic.quantize_activations(x, np.float32(0.87), bits))
        assert np.array_equal(out.get(), expected), f"magnitude {magnitude}: {worst(out.get(), expected)}"


@pytest.mark.parametrize("k", [192, 4096, 173])
def test_several_tokens_are_added(k: int) -> None:
    import cupy

    from rcprun.backends.cuda.linear import ADD, CODES, linear

    rng = np.random.default_rng(k)
    layer = random_layer(rng, 333, k, 128, bias=True)
    for m in (3, 8):
        codes, scale = rng.integers(-8, 8, (m, k), dtype=np.int8), rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32)
        before = rng.normal(size=(m, 333)).astype(np.float32)
        out, device_scale = cupy.asarray(before), cupy.asarray(scale[:, 0])
        linear(pack(layer), padded_codes(codes), out, prologue=CODES, epilogue=ADD, a_bits=4, x_scale=device_scale)
        expected = before + reference(layer, codes, scale)
        assert np.array_equal(out.get(), expected), f"m {m}: {worst(out.get(), expected)}"


def test_codes_that_do_not_fit_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of 192 columns, where shared memory holds the codes of four, or of two."""
    import cupy

    from rcprun.backends.cuda import linear as module
    from rcprun.backends.cuda.linear import CODES, STORE, linear

    rng = np.random.default_rng(5)
    layer = random_layer(rng, 333, 192, 128, bias=False)
    packed = pack(layer)
    codes, scale = rng.integers(-8, 8, (7, 192), dtype=np.int8), rng.uniform(0.01, 0.1, (7, 1)).astype(np.float32)
    least = module._LEAST_SLOTS * module._piece_bytes(packed)
    for at_once in (4, 2):
        room = least + module._shared(packed, at_once)
        monkeypatch.setattr(module, "_shared_at_most", lambda room=room: room)
        assert module._tokens_at_once(packed) == at_once
        out, device_scale = poisoned((7, 333)), cupy.asarray(scale[:, 0])
        linear(packed, padded_codes(codes), out, prologue=CODES, epilogue=STORE, a_bits=4, x_scale=device_scale)
        expected = reference(layer, codes, scale)
        assert np.array_equal(out.get(), expected), f"{at_once} at once: {worst(out.get(), expected)}"


@pytest.mark.parametrize("k", [192, 4096, 173])
def test_normalize_and_swiglu(k: int) -> None:
    """Of small integers the mean square is exact in any order, so the codes are; exp differs in its last bits."""
    import cupy

    from rcprun.backends.cuda.linear import NORMALIZE, SWIGLU, linear

    rng = np.random.default_rng(k)
    gate, up = (random_layer(rng, 1413, k, 128, bias) for bias in (True, False))
    packed = pack(gate, up, interleave=True)
    x = rng.integers(-9, 10, size=(1, k)).astype(np.float32)
    out, again = poisoned((1, 1413)), poisoned((1, 1413))
    options = {"prologue": NORMALIZE, "epilogue": SWIGLU, "a_bits": 4, "clip": np.float32(0.9), "eps": 1e-5}
    for to in (out, again):
        linear(packed, cupy.asarray(x), to, **options)
    quantized = arithmetic.quantize_activations(arithmetic.rms_normalize(x, 1e-5), np.float32(0.9), 4)
    expected = arithmetic.silu(reference(gate, *quantized)) * reference(up, *quantized)
    assert np.array_equal(out.get(), again.get())
    assert np.allclose(out.get(), expected, rtol=1e-6, atol=1e-30), worst(out.get(), expected)


def test_gate_and_up_of_several_tokens() -> None:
    import cupy

    from rcprun.backends.cuda.linear import CODES, SWIGLU, linear

    rng = np.random.default_rng(3)
    gate, up = (random_layer(rng, 1413, 192, 128, bias) for bias in (True, False))
    codes, scale = rng.integers(-8, 8, (5, 192), dtype=np.int8), rng.uniform(0.01, 0.1, (5, 1)).astype(np.float32)
    out, packed, device_scale = poisoned((5, 1413)), pack(gate, up, interleave=True), cupy.asarray(scale[:, 0])
    linear(packed, padded_codes(codes), out, prologue=CODES, epilogue=SWIGLU, a_bits=4, x_scale=device_scale)
    expected = arithmetic.silu(reference(gate, codes, scale)) * reference(up, codes, scale)
    assert np.allclose(out.get(), expected, rtol=1e-6, atol=1e-30), worst(out.get(), expected)


def test_groups_of_64_and_128_share_tiles() -> None:
    import cupy

    from rcprun.backends.cuda.linear import CODES, STORE, linear

    rng = np.random.default_rng(2)
    layers = [random_layer(rng, 48, 256, group, bias=False) for group in (128, 64)]
    codes = rng.integers(-8, 8, (2, 256), dtype=np.int8)
    out = poisoned((2, 96))
    linear(
        pack(*layers),
        padded_codes(codes),
        out,
        prologue=CODES,
        epilogue=STORE,
        a_bits=4,
        x_scale=cupy.ones(2, np.float32),
    )
    expected = np.concatenate([reference(layer, codes, np.ones((2, 1), np.float32)) for layer in layers], axis=1)
    assert np.array_equal(out.get(), expected), worst(out.get(), expected)
