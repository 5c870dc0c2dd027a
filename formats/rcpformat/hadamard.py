"""Hadamard matrices and their fast transform, as formats/SPEC.md fixes them. Knows nothing of models.

Shapes: L = leading (batch) axes flattened, n = channels = copies * block, block = m * 2^s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PALEY_ORDER = 1024
"""The largest m of a Paley factor P_m; beyond it the dense m * m product would cost more than it brings."""

_MAX_FACTOR = 128
"""Sylvester parts up to this order are one dense product; larger ones are split into a Kronecker product."""

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64))


class HadamardError(ValueError):
    """A Hadamard matrix that is not defined here was asked for, or a transform of unfit data."""


@dataclass(frozen=True)
class HadamardPlan:
    """How n channels are transformed: n / block contiguous copies of H_block = P_m ⊗ Sylvester(block / m)."""

    n: int
    m: int
    block: int

    @property
    def copies(self) -> int:
        """The number of contiguous blocks, each transformed by the same H_block; 1 where H_n is defined."""
        return self.n // self.block

    @property
    def sylvester(self) -> int:
        """The order of the Sylvester factor, a power of two."""
        return self.block // self.m

    @property
    def norm(self) -> float:
        """1/√block in float64: the factor that makes the transform orthogonal."""
        return 1.0 / math.sqrt(self.block)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _paley_field(m: int) -> tuple[int, int, int] | None:
    """(type, p, k) of the Paley construction of order m, over GF(p^k); type 1 wins where both exist."""
    if m % 4 or m > MAX_PALEY_ORDER:
        return None
    for kind, q, residue in ((1, m - 1, 3), (2, m // 2 - 1, 1)):
        if q % 4 == residue and (field := _prime_power(q)):
            return kind, *field
    return None


@lru_cache(maxsize=256)
def hadamard_factor(n: int) -> HadamardPlan:
    """The plan for n channels.

    An order b is constructible when b = m * 2^s with P_m defined (see paley_matrix); of several m the
    smallest is taken, so a power of two always has m = 1. `block` is the largest constructible divisor of n:
    n itself where possible, and 1, the identity, at the least.
    """
    if n < 1:
        raise HadamardError(f"hadamard order: expected a positive number of channels, got {n}")
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    for block in [n // d for d in low] + low[::-1]:
        m = block // (block & -block)  # the odd part; m = odd, 2 * odd, 4 * odd, ...
        while m != 1 and m <= block and _paley_field(m) is None:
            m *= 2
        if m <= block:
            return HadamardPlan(n, m, block)
    raise AssertionError("1 is a constructible divisor")


def _monic(p: int, degree: int) -> list[tuple[int, ...]]:
    """The monic polynomials over GF(p), constant term first, in the order of their highest coefficients."""
    return [(*low[::-1], 1) for low in product(range(p), repeat=degree)]


def _smallest_irreducible(p: int, k: int) -> tuple[int, ...]:
    """The first monic polynomial of degree k, in the order of _monic, that is no product of smaller ones."""
    reducible = {
        tuple(int(c) % p for c in np.convolve(a, b))
        for d in range(1, k // 2 + 1)
        for a in _monic(p, d)
        for b in _monic(p, k - d)
    }
    return next(f for f in _monic(p, k) if f not in reducible)


def _jacobsthal(p: int, k: int) -> NDArray[np.int8]:
    """Q[i, j] = χ(a_i - a_j) over GF(p^k), as paley_matrix defines χ and the order of the elements."""
    q = p**k
    modulus = np.array(_smallest_irreducible(p, k))
    place = p ** np.arange(k)
    digits = np.arange(q)[:, None] // place % p
    squares = np.zeros((q, 2 * k - 1), np.int64)
    for i, j in product(range(k), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    for top in range(2 * k - 2, k - 1, -1):  # reduce: t^top = -(lower terms of the modulus) * t^(top - k)
        squares[:, top - k : top + 1] -= squares[:, top, None] % p * modulus
    character = np.full(q, -1, np.int8)
    character[squares[:, :k] % p @ place] = 1
    character[0] = 0
    difference = (digits[:, None] - digits) % p @ place
    return np.take(character, difference)


@lru_cache(maxsize=64)
def paley_matrix(m: int) -> NDArray[np.int8]:
    """P_m, the m x m matrix of ±1 with P_m · P_mᵀ = m · I; read-only. Normative:

    P_1 = [1]. For a multiple m of 4 with 4 ≤ m ≤ 1024:
      type I,  if q = m - 1 is a prime power (then q ≡ 3 mod 4);
      type II, if type I does not apply and q = m/2 - 1 is a prime power with q ≡ 1 (mod 4).
    Otherwise P_m is not defined.

    Field. q = p^k. GF(q) = GF(p)[t]/(f), f being the monic irreducible polynomial
    t^k + f_{k-1} t^{k-1} + … + f_0 with the smallest integer f_{k-1} p^{k-1} + … + f_1 p + f_0, coefficients
    taken in 0..p-1 (for k = 1, f = t: integers mod p). Element a_i, 0 ≤ i < q, is e_{k-1} t^{k-1} + … + e_0
    with e the base-p digits of i, i = Σ e_j p^j. χ(0) = 0; χ(a) = 1 for the square of a non-zero element;
    χ(a) = -1 for every other a. Q is the q x q matrix Q[i, j] = χ(a_i - a_j).

    Type I. S is the m x m matrix with S[0, 0] = 0, S[0, 1+j] = 1, S[1+i, 0] = -1, S[1+i, 1+j] = Q[i, j]
      (skew); P_m = I + S.
    Type II. C is the m/2 x m/2 matrix with C[0, 0] = 0, C[0, 1+j] = 1, C[1+i, 0] = 1, C[1+i, 1+j] = Q[i, j]
      (symmetric); P_m[2i + u, 2j + v] = C[i, j] · A[u, v] + δ_ij · B[u, v],
      A = [[1, 1], [1, -1]], B = [[1, -1], [-1, -1]]; that is C ⊗ A + I ⊗ B.
    """
    if m == 1:
        matrix = np.ones((1, 1), np.int8)
    else:
        if (found := _paley_field(m)) is None:
            raise HadamardError(f"P_{m}: no Paley matrix of this order up to {MAX_PALEY_ORDER}; see hadamard_factor")
        kind, p, k = found
        core = np.pad(_jacobsthal(p, k), ((1, 0), (1, 0)), constant_values=1)
        core[0, 0] = 0
        unit = np.eye(len(core), dtype=np.int8)
        if kind == 1:
            core[1:, 0] = -1
            matrix = unit + core
        else:
            a, b = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
            matrix = np.kron(core, a) + np.kron(unit, b)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=64)
def sylvester_matrix(order: int) -> NDArray[np.int8]:
    """The Sylvester matrix of a power of two: entry (b, c) is (-1)^popcount(b & c); symmetric, read-only."""
    if order < 1 or order & (order - 1):
        raise HadamardError(f"sylvester order: expected a power of two, got {order}")
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.flags.writeable = False
    return matrix


def transform_factors(plan: HadamardPlan, transpose: bool = False) -> list[tuple[NDArray[np.int8], int]]:
    """The dense factors of H_block (or its transpose) in the order of application, each with its stride.

    A factor F of order f and stride r acts on axis 1 of x viewed as (n / (f * r), f, r). The Sylvester part
    comes first, small strides before large ones, in near-equal powers of two up to 128; then P_m with stride
    block / m. Factors of order 1 are left out.
    """
    factors = []
    bits = plan.sylvester.bit_length() - 1
    parts = math.ceil(bits / (_MAX_FACTOR.bit_length() - 1))
    stride = 1
    for part in range(parts):
        f = 2 ** ((bits + part) // parts)
        factors.append((sylvester_matrix(f), stride))
        stride *= f
    if plan.m > 1:
        p_mm = paley_matrix(plan.m)
        factors.append((p_mm.T if transpose else p_mm, stride))
    return factors


@lru_cache(maxsize=256)
def _stages(
    plan: HadamardPlan, dtype: np.dtype[Any], transpose: bool
) -> tuple[list[tuple[NDArray[Any], int, int]], Any]:
    """The stages (factor, f, stride) in this dtype, factors of stride 1 transposed; and 1/√block."""
    if dtype not in _DTYPES:
        raise HadamardError(f"hadamard_transform: expected float32, float64 or int64, got {dtype}")
    stages = [
        (np.ascontiguousarray(matrix if stride > 1 else matrix.T, dtype), len(matrix), stride)
        for matrix, stride in transform_factors(plan, transpose)
    ]
    return stages, dtype.type(plan.norm) if dtype.kind == "f" else None


def hadamard_transform(
    x: NDArray[Any], plan: HadamardPlan | None = None, *, transpose: bool = False, normalized: bool = False
) -> NDArray[Any]:
    """y = H x along the last axis (Hᵀ x with `transpose`), any leading axes; float32, float64 or int64.

    The result is a new array of x's dtype, computed in that dtype: the Sylvester part first, then P_m.
    Integers are exact (the caller keeps n · max|x| < 2^63), and so are integer-valued floats while
    n · max|x| stays within the significand. Other floats may differ in the last bits from another order of
    summation, and between one vector and the same vector inside a batch. `normalized` multiplies once, at the
    end, by float64(1/√block) rounded to x's dtype; without it nothing is scaled.
    """
    if x.ndim == 0 or (plan is not None and plan.n != x.shape[-1]):
        raise HadamardError(f"hadamard_transform: array of shape {x.shape} does not fit {plan}")
    stages, norm = _stages(plan or hadamard_factor(x.shape[-1]), x.dtype, transpose)
    y = x
    for matrix, f, stride in stages:
        y = y.reshape(-1, f) @ matrix if stride == 1 else matrix @ y.reshape(-1, f, stride)
    y = x.copy() if y is x else y.reshape(x.shape)
    if normalized:
        if norm is None:
            raise HadamardError("hadamard_transform: an integer array cannot be normalized; transform a float array")
        y *= norm
    return y
