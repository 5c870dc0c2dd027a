"""The torch transform is the numpy one, its gradient the transpose, and the merged rotations orthogonal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rcpconv.hadamard import apply_right, hadamard_transform
from rcpformat.hadamard import HadamardError, hadamard_factor
from rcpformat.hadamard import hadamard_transform as reference

WIDTHS = (1, 7, 64, 172, 192, 432, 896, 1408, 4096, 8192, 11008, 13696)


def random_signs(n: int) -> torch.Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)) * 2 - 1


def q_matrix(n: int, signs: torch.Tensor | None) -> torch.Tensor:
    """Q = diag(signs) · Hᵀ / √block, dense."""
    h_transposed = torch.from_numpy(reference(np.eye(n)))  # row i is H e_i
    q = h_transposed / hadamard_factor(n).block ** 0.5
    return q if signs is None else signs[:, None] * q


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", WIDTHS)
def test_torch_equals_numpy(n: int, transpose: bool) -> None:
    x = np.random.default_rng(n).integers(-100, 100, (2, 3, n))
    for dtype in (torch.float32, torch.float64):  # integers: exact in both
        y = hadamard_transform(torch.from_numpy(x).to(dtype), transpose=transpose)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.numpy(), reference(x, transpose=transpose))
    x32 = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    y32 = hadamard_transform(torch.from_numpy(x32), transpose=transpose, normalized=True)
    np.testing.assert_allclose(y32.numpy(), reference(x32, transpose=transpose, normalized=True), atol=1e-5)


@pytest.mark.parametrize("n", [172, 1408, 11008])
def test_bfloat16_stays_within_its_roundings(n: int) -> None:
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = hadamard_transform(x, normalized=True)
    assert y.dtype == torch.bfloat16
    exact = hadamard_transform(x.double(), normalized=True)
    # Each of at most three stages and the scaling rounds by at most 2^-9 relative.
    assert (y - exact).norm() < 4 * 2.0**-9 * exact.norm()


@pytest.mark.parametrize("n", [6, 7, 24])
def test_gradient_is_the_transpose(n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(n))
    for options in ({}, {"transpose": True}, {"normalized": True}):
        assert torch.autograd.gradcheck(lambda v, o=options: hadamard_transform(v, **o), x)
    assert torch.autograd.gradgradcheck(lambda v: hadamard_transform(v, normalized=True).square(), x)
    g = torch.randn(2, n, dtype=torch.float64)
    hadamard_transform(x).backward(g)
    torch.testing.assert_close(x.grad, hadamard_transform(g, transpose=True))


def test_the_result_is_no_alias_and_any_layout_is_read() -> None:
    x = torch.arange(7.0)
    hadamard_transform(x).zero_()  # H_7 is the identity
    assert x.tolist() == list(range(7))
    wide = torch.arange(48, dtype=torch.float64).reshape(12, 4)
    np.testing.assert_array_equal(hadamard_transform(wide.T).numpy(), reference(wide.numpy().T))
    assert hadamard_transform(torch.zeros(0, 12)).shape == (0, 12)


def test_factors_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        hadamard_transform(torch.ones(1, 3 * 4 * 8))
    x = torch.ones(1, 3 * 4 * 8, requires_grad=True)
    hadamard_transform(x).sum().backward()
    assert x.grad is not None


def test_autocast_does_not_lower_the_precision() -> None:
    x = torch.randn(4, 1408, requires_grad=True)
    plain = hadamard_transform(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hadamard_transform(x)
        inside.sum().backward()
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    assert inside.dtype == torch.float32


def test_lower_matmul_precision_is_left_as_it_was_set() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    x = torch.randn(64, 1408)
    plain, before = hadamard_transform(x), matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        torch.testing.assert_close(hadamard_transform(x), plain, rtol=0, atol=0)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("n", [192, 1408, 11008])
def test_cuda_is_true_float32_under_tf32(n: int) -> None:
    x = torch.randn(64, n, device="cuda")
    exact = hadamard_transform(x.double(), normalized=True)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        y = hadamard_transform(x.requires_grad_(), normalized=True)
        y.sum().backward()
        assert x.grad is not None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)  # TF32 would err by about 1e-3
    ones = torch.ones(1, n, device="cuda", dtype=torch.float64)
    grad = hadamard_transform(ones, transpose=True, normalized=True)
    torch.testing.assert_close(x.grad[:1].double(), grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", [1, 24, 28, 172, 192, 432])
@pytest.mark.parametrize("signed", [False, True])
def test_rotations_are_orthogonal_and_as_defined(n: int, signed: bool) -> None:
    signs = random_signs(n) if signed else None
    q = q_matrix(n, signs)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    w = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(apply_right(w, signs), w @ q)
    torch.testing.assert_close(apply_right(w[0], signs), q.T @ w[0])


def test_a_rotated_pair_of_layers_computes_the_same() -> None:
    n, signs = 432, random_signs(432)
    generator = torch.Generator().manual_seed(1)
    into, out = (torch.randn(*shape, generator=generator) for shape in ((n, 8), (6, n)))
    x = torch.randn(8, generator=generator).double()
    rotated = apply_right(out, signs) @ (apply_right(into.T, signs).T @ x)
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotated, out.double() @ (into.double() @ x))


@pytest.mark.parametrize("n", [24, 172, 192])
def test_a_merged_rotation_undoes_the_online_one(n: int) -> None:
    """had(x) and rot(x) as formats/SPEC.md has them, on the numpy side; P_12 is not symmetric."""
    w, x, signs = torch.randn(6, n).double(), torch.randn(n).double(), random_signs(n)
    had, rot = reference(x.numpy(), normalized=True), reference((x * signs).numpy(), normalized=True)
    torch.testing.assert_close(apply_right(w) @ torch.from_numpy(had), w @ x)
    torch.testing.assert_close(apply_right(w, signs) @ torch.from_numpy(rot), w @ x)
    torch.testing.assert_close(apply_right(x, signs), torch.from_numpy(rot))


@pytest.mark.parametrize(
    "x", [torch.zeros(8, dtype=torch.float16), torch.zeros(8, dtype=torch.int64), torch.tensor(1.0)]
)
def test_what_cannot_be_transformed_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(HadamardError, match="expected float32, float64 or bfloat16"):
        hadamard_transform(x)


@pytest.mark.parametrize("signs", [torch.ones(1), torch.ones(12).mul(2), torch.zeros(12), torch.ones(2, 12)])
def test_bad_signs_are_refused(signs: torch.Tensor) -> None:
    with pytest.raises(HadamardError, match="12 values of ±1"):
        apply_right(torch.zeros(3, 12), signs)
