"""Products of many tokens against the NumPy reference, exactly, and what makes codes of their sums."""

from typing import Any

import numpy as np
import pytest

from rcpformat import arithmetic
from tests.rcprun.cuda.test_linear import pack, padded_codes, poisoned, random_layer, reference, worst

pytestmark = pytest.mark.gpu


def product(gemm: Any, packed: Any, codes: Any, scale: Any, out: Any, epilogue: int) -> None:
    gemm.multiply(packed, codes)
    gemm.rescale(packed, 0, scale, out, epilogue=epilogue)


@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (40, 300), (5, 4), (1002, 1408), (333, 173)])
def test_many_tokens_are_exact(n: int, k: int, group: int) -> None:
    import cupy

    from rcprun.backends.cuda.gemm import Gemm
    from rcprun.backends.cuda.linear import ADD, STORE

    rng = np.random.default_rng(n + k)
    layer = random_layer(rng, n, k, group, bias=n % 2 == 1)
    packed = pack(layer)
    gemm = Gemm([packed], 300)
    for m in (9, 64, 300):
        codes = rng.integers(-8, 8, (m, k), dtype=np.int8)
        scale = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32)
        before = rng.normal(size=(m, n)).astype(np.float32)
        expected = reference(layer, codes, scale)
        for epilogue, out, wanted in (
            (STORE, poisoned((m, n)), expected),
            (ADD, cupy.asarray(before), before + expected),
        ):
            product(gemm, packed, padded_codes(codes), cupy.asarray(scale[:, 0]), out, epilogue)
            assert np.array_equal(out.get(), wanted), f"m {m}: {worst(out.get(), wanted)}"


@pytest.mark.parametrize("interleave", [False, True])
def test_sums_are_rescaled_in_parts(interleave: bool) -> None:
    """The same bits as at once."""
    import cupy

    from rcprun.backends.cuda.gemm import Gemm
    from rcprun.backends.cuda.linear import STORE, SWIGLU

    rng, epilogue = np.random.default_rng(1), SWIGLU if interleave else STORE
    packed = pack(*(random_layer(rng, 300, 192, 128, bias=True) for _ in range(1 + interleave)), interleave=interleave)
    codes = padded_codes(rng.integers(-8, 8, (27, 192), dtype=np.int8))
    scale = cupy.asarray(rng.uniform(0.01, 0.1, 27).astype(np.float32))
    whole, parts, gemm = poisoned((27, 300)), poisoned((27, 300)), Gemm([packed], 30)
    product(gemm, packed, codes, scale, whole, epilogue)
    gemm.multiply(packed, codes)
    for first in range(0, 27, 10):
        part = slice(first, min(first + 10, 27))
        gemm.rescale(packed, first, scale[part], parts[part], epilogue=epilogue)
    assert np.array_equal(parts.get(), whole.get()), worst(parts.get(), whole.get())


@pytest.mark.parametrize("n", [480, 1413])
def test_gate_and_up(n: int) -> None:
    """exp differs in its last bits."""
    import cupy

    from rcprun.backends.cuda.gemm import Gemm
    from rcprun.backends.cuda.linear import SWIGLU

    rng = np.random.default_rng(n)
    gate, up = (random_layer(rng, n, 192, 128, bias) for bias in (True, False))
    packed = pack(gate, up, interleave=True)
    codes, scale = rng.integers(-8, 8, (50, 192), dtype=np.int8), rng.uniform(0.01, 0.1, (50, 1)).astype(np.float32)
    out = poisoned((50, n))
    product(Gemm([packed], 50), packed, padded_codes(codes), cupy.asarray(scale[:, 0]), out, SWIGLU)
    expected = arithmetic.silu(reference(gate, codes, scale)) * reference(up, codes, scale)
    assert np.allclose(out.get(), expected, rtol=1e-6, atol=1e-30), worst(out.get(), expected)


def sums_of(packed: Any, codes: np.ndarray, tokens: int) -> Any:
    from rcprun.backends.cuda.gemm import Gemm

    return Gemm([packed], tokens).multiply(packed, padded_codes(codes))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [4096, 480, 173])
def test_sums_are_added_and_normalized(n: int, bits: int) -> None:
    """The same bits as by two kernels."""
    import cupy

    from rcprun.backends.cuda.gemm import Gemm
    from rcprun.backends.cuda.linear import ADD
    from rcprun.backends.cuda.norm import add_norm_quantize, norm_quantize

    rng, m = np.random.default_rng(n), 20
    packed = pack(random_layer(rng, n, 192, 128, bias=n % 2 == 1))
    codes, x_scale = rng.integers(-8, 8, (m, 192), dtype=np.int8), rng.uniform(0.01, 0.1, m).astype(np.float32)
    before = rng.normal(size=(m, n)).astype(np.float32)
    how = {"eps": np.float32(1e-5), "clip": np.float32(0.9), "bits": bits}
    apart, together = cupy.asarray(before), cupy.asarray(before)
    product(Gemm([packed], m), packed, padded_codes(codes), cupy.asarray(x_scale), apart, ADD)
    found, expected = ((cupy.zeros((m, -(-n // 128) * 128), np.int8), cupy.asarray(x_scale)) for _ in range(2))
    norm_quantize(apart, *expected, **how)
    add_norm_quantize(sums_of(packed, codes, m), packed.scale_R, packed.bias_R, together, *found, **how)
    assert np.array_equal(together.get(), apart.get())
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.get(), other.get())


@pytest.mark.parametrize("n", [11008, 14336, 1408, 480, 192])
def test_sums_of_gate_and_up_are_rotated(n: int) -> None:
    """As by two kernels, but for the last bits of sums in another order: the scale to 2e-6, few codes, each by one."""
    import cupy

    from rcprun.backends.cuda.gemm import Gemm
    from rcprun.backends.cuda.hadamard import Transform
    from rcprun.backends.cuda.linear import SWIGLU

    rng, m = np.random.default_rng(n), 20
    packed = pack(*(random_layer(rng, n, 192, 128, bias=n == 480) for _ in range(2)), interleave=True)
    codes, x_scale = rng.integers(-8, 8, (m, 192), dtype=np.int8), rng.uniform(0.01, 0.1, m).astype(np.float32)
    x_scale[:4] = 1e-20, 1e-10, 1e7, 0  # peaks from below 2^-100 to above 2^50, which terms have to be brought to
    z, transform = poisoned((m, n)), Transform(n)
    product(Gemm([packed], m), packed, padded_codes(codes), cupy.asarray(x_scale), z, SWIGLU)
    found, expected = ((cupy.full((m, -(-n // 128) * 128), 77, np.int8), cupy.asarray(x_scale)) for _ in range(2))
    workspace = cupy.empty((m, n), np.float32)
    how = {"clip": np.float32(0.9), "bits": 4}
    transform.quantize(z, *expected, workspace_MN=workspace, **how)
    transform.quantize_swiglu(sums_of(packed, codes, m), packed.scale_R, packed.bias_R, *found, **how)
    np.testing.assert_allclose(found[1].get(), expected[1].get(), rtol=2e-6)
    difference = np.abs(found[0].get().astype(int) - expected[0].get())
    assert difference.max() <= 1 and np.count_nonzero(difference) <= 1 + m * n / 10_000
