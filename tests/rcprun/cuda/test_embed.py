"""Embedding on the GPU: equal to NumPy's, bit for bit."""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("vocabulary", "width"), [(300, 4096), (7, 5), (1000, 1001), (64, 192)])
@pytest.mark.parametrize("half", [False, True])
def test_rows_are_exact(vocabulary: int, width: int, half: bool) -> None:
    import cupy

    from rcprun.backends.cuda.embed import embed

    rng = np.random.default_rng(width)
    for tokens in (1, 8, 300):
        ids = rng.integers(0, vocabulary, tokens, dtype=np.int32)
        ids[-1] = vocabulary - 1
        if half:
            table, scale = rng.normal(size=(vocabulary, width)).astype(np.float16), None
            expected = table[ids].astype(np.float32)
        else:
            table = rng.integers(-127, 128, (vocabulary, width), dtype=np.int8)
            scale = rng.uniform(0.1, 1, vocabulary).astype(np.float32)
            expected = table[ids].astype(np.float32) * scale[ids][:, None]
        x = cupy.full((tokens, width), np.nan, dtype=np.float32)
        embed(cupy.asarray(ids), cupy.asarray(table), None if scale is None else cupy.asarray(scale), x)
        np.testing.assert_array_equal(x.get(), expected)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_id_out_of_range_gives_nan(wrong: int) -> None:
    import cupy

    from rcprun.backends.cuda.embed import embed

    x = cupy.zeros((2, 40), dtype=np.float32)
    table = cupy.ones((10, 40), dtype=np.float16)
    embed(cupy.asarray(np.array([wrong, 3], dtype=np.int32)), table, None, x)
    assert np.isnan(x.get()[0]).all()
    assert (x.get()[1] == 1).all()
