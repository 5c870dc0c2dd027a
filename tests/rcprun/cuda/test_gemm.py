"""Products of many tokens against the NumPy reference, exactly."""

import numpy as np
import pytest

from rcpformat import arithmetic
from tests.rcprun.cuda.test_linear import pack, padded_codes, poisoned, random_layer, reference, worst

pytestmark = pytest.mark.gpu


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
            gemm(packed, padded_codes(codes), cupy.asarray(scale[:, 0]), out, epilogue=epilogue)
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
    gemm(packed, codes, scale, whole, epilogue=epilogue)
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
    Gemm([packed], 50)(packed, padded_codes(codes), cupy.asarray(scale[:, 0]), out, epilogue=SWIGLU)
    expected = arithmetic.silu(reference(gate, codes, scale)) * reference(up, codes, scale)
    assert np.allclose(out.get(), expected, rtol=1e-6, atol=1e-30), worst(out.get(), expected)
