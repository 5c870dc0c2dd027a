"""The Paley matrices are Hadamard and as SPEC.md words them; the fast transform is the matrix it claims."""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest

from rcpformat.hadamard import (
    MAX_PALEY_ORDER,
    HadamardError,
    HadamardPlan,
    hadamard_factor,
    hadamard_transform,
    paley_matrix,
    sylvester_matrix,
    transform_factors,
)

# n -> (m, block): the widths of the models that we know, and the shapes that have no Hadamard matrix here.
WIDTHS = {
    192: (12, 192),
    432: (108, 432),
    512: (1, 512),
    896: (28, 896),
    1152: (36, 1152),
    1408: (44, 1408),
    3072: (12, 3072),
    3584: (28, 3584),
    4096: (1, 4096),
    4864: (76, 4864),
    5120: (20, 5120),
    5632: (44, 5632),
    6656: (52, 6656),
    8192: (1, 8192),
    8960: (140, 8960),
    9728: (76, 9728),
    11008: (344, 11008),
    13824: (108, 13824),
    14336: (28, 14336),
    17408: (68, 17408),
    17920: (140, 17920),
    18944: (148, 18944),
    22016: (344, 22016),
    25600: (100, 25600),
    27648: (108, 27648),
    28672: (28, 28672),
    29568: (924, 29568),
    53248: (52, 53248),
    172: (1, 4),
    8320: (52, 1664),  # P_1040 exists, but lies beyond MAX_PALEY_ORDER
    13696: (1, 128),
}

SMALL = (1, 2, 3, 4, 6, 8, 9, 12, 20, 24, 28, 36, 40, 44, 60, 72, 84, 96, 104, 172, 192, 200, 256, 432, 512)


def dense(plan: HadamardPlan) -> np.ndarray:
    """The n x n matrix of a plan, straight from its definition."""
    block = np.kron(paley_matrix(plan.m), sylvester_matrix(plan.sylvester)).astype(np.int64)
    return np.kron(np.eye(plan.copies, dtype=np.int64), block)


def is_prime_power(q: int) -> bool:
    smallest = next(d for d in range(2, q + 1) if q % d == 0)
    while q % smallest == 0:
        q //= smallest
    return q == 1


def paley_orders() -> list[int]:
    """Every order that the text defines, found without the code under test."""
    return [
        m
        for m in range(4, MAX_PALEY_ORDER + 1, 4)
        if is_prime_power(m - 1) or ((m // 2 - 1) % 4 == 1 and is_prime_power(m // 2 - 1))
    ]


def from_the_text(m: int, p: int, k: int) -> np.ndarray:
    """P_m by another road: f has no root (k ≤ 3), χ is Euler's criterion, all in plain Python."""
    q = p**k

    def digits(i: int) -> list[int]:
        return [i // p**j % p for j in range(k)]

    def times(a: list[int], b: list[int]) -> list[int]:
        c = [0] * (2 * k - 1)
        for i, j in product(range(k), repeat=2):
            c[i + j] += a[i] * b[j]
        for top in range(2 * k - 2, k - 1, -1):
            for j in range(k):
                c[top - k + j] -= c[top] * f[j]
        return [x % p for x in c[:k]]

    def power(a: list[int], e: int) -> list[int]:
        result = digits(1)
        for bit in bin(e)[2:]:
            result = times(result, result)
            if bit == "1":
                result = times(result, a)
        return result

    def has_root(low: list[int]) -> bool:
        return any((sum(c * x**j for j, c in enumerate(low)) + x**k) % p == 0 for x in range(p))

    f = [0] if k == 1 else next(low for low in map(digits, range(q)) if not has_root(low))
    chi = {tuple(digits(i)): 1 if power(digits(i), (q - 1) // 2) == digits(1) else -1 for i in range(1, q)}
    chi[(0,) * k] = 0

    order = q + 1
    s = np.zeros((order, order), np.int64)
    s[0, 1:] = 1
    s[1:, 0] = -1 if m == order else 1
    for i, j in product(range(q), repeat=2):
        s[1 + i, 1 + j] = chi[tuple((a - b) % p for a, b in zip(digits(i), digits(j), strict=True))]
    if m == order:
        return np.eye(m, dtype=np.int64) + s
    result = np.zeros((m, m), np.int64)
    a, b = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
    for i, j, u, v in product(range(order), range(order), range(2), range(2)):
        result[2 * i + u, 2 * j + v] = s[i, j] * a[u][v] + (i == j) * b[u][v]
    return result


@pytest.mark.parametrize(("n", "expected"), WIDTHS.items())
def test_plan_of_known_widths(n: int, expected: tuple[int, int]) -> None:
    plan = hadamard_factor(n)
    assert (plan.m, plan.block) == expected
    assert plan.copies * plan.sylvester * plan.m == n


def test_plan_is_the_rule_for_every_width_up_to_2000() -> None:
    defined = {1, *paley_orders()}

    def smallest_m(order: int) -> int | None:
        fits = [m for m in defined if order % m == 0 and (order // m) & (order // m - 1) == 0]
        return min(fits, default=None)

    m_of = {order: smallest_m(order) for order in range(1, 2001)}
    for n in range(1, 2001):
        block = max(d for d in range(1, n + 1) if n % d == 0 and m_of[d] is not None)
        assert hadamard_factor(n) == HadamardPlan(n, m_of[block] or 0, block)


def test_every_paley_matrix_is_hadamard() -> None:
    orders = paley_orders()
    assert {12, 20, 28, 36, 44, 52, 68, 76, 100, 108, 140, 148, 344, 924} <= set(orders)
    for m in [1] + [m for m in orders if m <= 420 or m in (580, 724, 924, 1020)]:
        p = paley_matrix(m)
        assert p.dtype == np.int8 and p.shape == (m, m) and np.all(np.abs(p) == 1)
        product_mm = p.astype(np.float32) @ p.T.astype(np.float32)  # sums of at most 1024 terms of ±1 are exact
        np.testing.assert_array_equal(product_mm, m * np.eye(m), err_msg=f"P_{m}")


def test_the_other_orders_are_refused() -> None:
    defined = {1, *paley_orders()}
    for m in [*range(-1, 65), 1032, 1040, 2048]:
        if m not in defined:
            with pytest.raises(HadamardError, match=f"P_{m}"):
                paley_matrix(m)


@pytest.mark.parametrize(
    ("m", "p", "k"),
    [
        (12, 11, 1),
        (20, 19, 1),
        (28, 3, 3),
        (36, 17, 1),
        (44, 43, 1),
        (52, 5, 2),
        (100, 7, 2),
        (148, 73, 1),
        (344, 7, 3),
    ],
)
def test_paley_matrix_follows_the_text(m: int, p: int, k: int) -> None:
    np.testing.assert_array_equal(paley_matrix(m), from_the_text(m, p, k))


def test_paley_matrices_never_change() -> None:
    """A file's meaning rests on these entries: SHA-256 of the int8 matrices, row by row."""
    digests = {m: hashlib.sha256(paley_matrix(m).tobytes()).hexdigest()[:16] for m in (12, 28, 52, 100, 344, 924)}
    assert digests == {
        12: "db7478025ce74776",
        28: "3ec6c53133760a03",
        52: "f50db5d0f93762d3",
        100: "89d400ecb6ea82c8",
        344: "14fa999a81e32bda",
        924: "43a042d7e9d59369",
    }


def test_matrices_are_shared_and_read_only() -> None:
    assert paley_matrix(44) is paley_matrix(44)
    for matrix in (paley_matrix(44), sylvester_matrix(16)):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 7


def test_sylvester_matrix_is_the_parity_of_and() -> None:
    expected = [[(-1) ** (b & c).bit_count() for c in range(64)] for b in range(64)]
    np.testing.assert_array_equal(sylvester_matrix(64), expected)
    with pytest.raises(HadamardError, match="power of two"):
        sylvester_matrix(12)


def test_worked_example_of_the_specification() -> None:
    x = np.arange(24)
    h_x = "276 -12 48 0 8 0 56 0 16 0 -24 0 -64 0 -16 0 32 0 80 0 40 0 88 0"
    ht_x = "-274 10 -38 -2 10 -2 -30 -2 18 -2 66 -2 114 -2 74 -2 34 -2 -6 -2 42 -2 2 -2"
    assert hadamard_transform(x).tolist() == [int(y) for y in h_x.split()]
    assert hadamard_transform(x, transpose=True).tolist() == [int(y) for y in ht_x.split()]


@pytest.mark.parametrize("n", SMALL)
def test_transform_equals_the_dense_matrix(n: int) -> None:
    h = dense(hadamard_factor(n))
    x = np.random.default_rng(n).integers(-100, 100, (5, n))
    np.testing.assert_array_equal(hadamard_transform(x), x @ h.T)
    np.testing.assert_array_equal(hadamard_transform(x, transpose=True), x @ h)
    np.testing.assert_array_equal(h @ h.T, hadamard_factor(n).block * np.eye(n))


@pytest.mark.parametrize("n", WIDTHS)
def test_transform_at_full_size(n: int) -> None:
    """Hᵀ(H x) = H(Hᵀ x) = block · x in integers, and sampled rows of H agree with the definition."""
    plan = hadamard_factor(n)
    rng = np.random.default_rng(n)
    x = rng.integers(-1000, 1000, n)
    y, z = hadamard_transform(x), hadamard_transform(x, transpose=True)
    np.testing.assert_array_equal(hadamard_transform(y, transpose=True), plan.block * x)
    np.testing.assert_array_equal(hadamard_transform(z), plan.block * x)
    p, c = paley_matrix(plan.m).astype(np.int64), np.arange(plan.sylvester)
    for i in rng.integers(0, n, 8):
        start, (a, b) = i // plan.block * plan.block, divmod(i % plan.block, plan.sylvester)
        parity = 1 - 2 * (np.bitwise_count(b & c) % 2).astype(np.int64)
        x_block = x[start : start + plan.block]
        assert y[i] == np.kron(p[a], parity) @ x_block
        assert z[i] == np.kron(p[:, a], parity) @ x_block


@pytest.mark.parametrize("n", [192, 432, 1408, 4096, 13696])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_keep_their_type_and_are_exact_on_integers(n: int, dtype: type) -> None:
    x = np.random.default_rng(n).integers(-127, 128, (2, 3, n))  # n * 127 < 2^24
    y = hadamard_transform(x.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, hadamard_transform(x))


@pytest.mark.parametrize("n", [172, 512, 1408, 11008])
def test_float32_error_and_normalization(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((4, n))
    exact = hadamard_transform(x, normalized=True)
    np.testing.assert_allclose(np.linalg.norm(exact, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)
    y = hadamard_transform(x.astype(np.float32), normalized=True)
    assert y.dtype == np.float32
    # A sum of n terms errs by about √n ulps of its partial sums, of unit size once normalized.
    np.testing.assert_allclose(y, exact, atol=1e-5)
    plain = hadamard_transform(x.astype(np.float32))
    np.testing.assert_array_equal(y, plain * np.float32(hadamard_factor(n).norm))


def test_any_layout_is_read_and_nothing_is_written_to_the_input() -> None:
    for n in (24, 7):
        base = np.random.default_rng(0).integers(-9, 9, (n, 2, 3)).astype(np.float64)
        x = base.transpose(1, 2, 0)
        before = x.copy()
        y = hadamard_transform(x, normalized=True)
        np.testing.assert_allclose(y, before @ dense(hadamard_factor(n)).T / np.sqrt(hadamard_factor(n).block))
        np.testing.assert_array_equal(x, before)
        assert not np.shares_memory(x, y)
    assert hadamard_transform(np.zeros((0, 24), np.float32)).shape == (0, 24)


def test_a_given_plan_is_used() -> None:
    x = np.arange(48.0)
    np.testing.assert_array_equal(
        hadamard_transform(x, HadamardPlan(48, 12, 24)), hadamard_transform(x.reshape(2, 24)).reshape(48)
    )


def test_factors_are_applied_with_small_strides_first() -> None:
    assert [(len(f), stride) for f, stride in transform_factors(hadamard_factor(53248))] == [
        (32, 1),
        (32, 32),
        (52, 1024),
    ]
    assert [(len(f), stride) for f, stride in transform_factors(hadamard_factor(8192))] == [
        (64, 1),
        (128, 64),
    ]
    assert transform_factors(hadamard_factor(7)) == []


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros(8, np.int32), {}, "int32"),
        (np.zeros(8, np.float16), {}, "float16"),
        (np.zeros(8, ">f4"), {}, ">f4"),
        (np.float32(1), {}, "shape"),
        (np.zeros((2, 0), np.float32), {}, "positive"),
        (np.zeros(8, np.int64), {"normalized": True}, "integer"),
        (np.zeros(8, np.float32), {"plan": HadamardPlan(4, 1, 4)}, "does not fit"),
    ],
)
def test_what_cannot_be_transformed_is_refused(x: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(HadamardError, match=message):
        hadamard_transform(x, **options)
