"""Quantizers in training: the numbers of rcpformat.arithmetic, those that are baked, and the gradients meant."""

import itertools
import math

import numpy as np
import pytest
import torch

from rcpconv.quantizers import METHODS, Learning, weight_quantizer
from rcpconv.quantizers.base import from_groups, to_groups
from rcpconv.quantizers.functional import (
    Quantized,
    fake_quantize_kv,
    integer_linear,
    integer_product,
    quantize_activations,
)
from rcpconv.quantizers.ldp import LDPQuantizer
from rcpconv.quantizers.levels import EvenLevels, steps
from rcpconv.quantizers.tables import fake_quantize_rows, int8_rows
from rcpconv.quantizers.uniform import rounded_finely
from rcpconv.scheme import UNQUANTIZED
from rcpformat import arithmetic, spec


def tokens(seed: int) -> np.ndarray:
    """Rows of many magnitudes, with an all-zero one, a tiny one, and outliers."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((40, 96)) * 10.0 ** random.uniform(-6, 4, (40, 1))
    rows[3] = 0
    rows[4] *= 1e-35
    rows[5, 0] = 1e4
    rows[6] = np.abs(rows[6])
    return rows.astype(np.float32)


@pytest.mark.parametrize(("bits", "clip"), [*itertools.product((4, 8), (0.61, 0.9, 1.0))])
def test_activation_codes_are_those_of_the_format(bits: int, clip: float) -> None:
    x = tokens(bits)
    expected_codes, expected_scale = arithmetic.quantize_activations(x, np.float32(clip), bits)
    found = quantize_activations(torch.from_numpy(x), torch.tensor([clip]), bits)
    assert np.array_equal(found.codes.numpy(), expected_codes)
    assert np.array_equal(found.scale.numpy(), expected_scale)


@pytest.mark.parametrize(("bits", "clip"), [*itertools.product((4, 8), (0.8, 0.95, 1.0))])
def test_kv_values_are_those_of_the_format(bits: int, clip: float) -> None:
    x = np.concatenate([tokens(bits), 1e6 * tokens(1)[:2], np.full((1, 96), 0.25, np.float32)])
    expected = arithmetic.quantize_kv(x, np.float32(clip), bits).dequantize()
    assert np.array_equal(fake_quantize_kv(torch.from_numpy(x), torch.tensor([clip]), bits).numpy(), expected)


@pytest.mark.parametrize("columns", [96, 17_000])
def test_linear_is_the_formats_exact_integer_product(columns: int) -> None:
    random = np.random.default_rng(columns)
    codes = random.integers(-8, 8, (5, columns)).astype(np.int8)
    integers = random.integers(-127, 128, (7, columns)).astype(np.int8)
    codes[0], integers[0] = -8, 127  # the largest sum there is
    scale, row_scale = random.random((5, 1), np.float32), random.random(7, np.float32)
    expected = arithmetic.scale_sums(arithmetic.integer_matmul(codes, integers), scale, row_scale)
    quantized = Quantized(torch.from_numpy(codes).float(), torch.from_numpy(scale), 4)
    found = integer_linear(quantized, torch.from_numpy(integers).float(), torch.from_numpy(row_scale), None, False)
    assert np.array_equal(found.numpy(), expected)


def test_long_products_are_split_and_stay_exact() -> None:
    a, b = torch.full((1, 50_000), -128.0), torch.full((1, 50_000), 127.0)
    assert integer_product(a, b, chunk=1000, half=False).item() == -128 * 127 * 50_000


def test_what_is_not_quantized_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=generator).requires_grad_()
    w = torch.randint(-127, 128, (7, 96), generator=generator).float().requires_grad_()
    assert fake_quantize_kv(x, 0.5, UNQUANTIZED) is x
    quantized = quantize_activations(x, 0.5, UNQUANTIZED)
    y = integer_linear(quantized, w, torch.full((7,), 0.25), None, False)
    plain = x @ w.T / 4
    torch.testing.assert_close(y, plain)
    downstream = torch.randn(5, 7, generator=generator)
    found, expected = (torch.autograd.grad((value * downstream).sum(), (x, w)) for value in (y, plain))
    torch.testing.assert_close(found, expected)


def test_activation_gradients() -> None:
    """x gets the gradient inside the grid and none outside; the clip gets that of the scale (PACT-like)."""
    x = torch.tensor([[1.0, -0.6, 0.3, 2.0]], requires_grad=True)
    clip = torch.tensor([0.5], requires_grad=True)
    codes, scale, _ = quantize_activations(x, clip, 4)
    assert codes.tolist() == [[7, -4, 2, 7]]  # scale 1/7: 7, -4.2, 2.1, 14
    (codes * scale * torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    assert x.grad is not None and clip.grad is not None
    assert torch.allclose(x.grad, torch.tensor([[1.0, 10.0, 100.0, 0.0]]))
    # d(code · scale)/d scale = code − x / scale inside, code outside; d scale / d clip = 2 / 7.
    inner = (7 - 7) * 1 + (-4 + 4.2) * 10 + (2 - 2.1) * 100 + 7 * 1000
    assert clip.grad.item() == pytest.approx(inner * 2 / 7, rel=1e-5)


def test_activation_clip_gradient_by_finite_differences() -> None:
    """Where every value lies outside or on a code, the function is smooth in the clip."""
    x = torch.tensor([[3.0, 3.0, -3.0, 0.0]])
    clip = torch.tensor([0.7], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 5.0, 7.0]])

    def value(c: torch.Tensor) -> torch.Tensor:
        codes, scale, _ = quantize_activations(x, c, 4)
        return (codes * scale * weight).sum()

    value(clip).backward()
    step = 1e-3
    numeric = (value(clip.detach() + step) - value(clip.detach() - step)) / (2 * step)
    assert clip.grad is not None
    assert clip.grad.item() == pytest.approx(numeric.item(), rel=1e-3)


def test_kv_gradient_passes_straight_through_inside_the_clip() -> None:
    x = torch.tensor([[0.0, 0.4, 0.5, 1.0]], requires_grad=True)
    clip = torch.tensor([0.7], requires_grad=True)
    fake_quantize_kv(x, clip, 4).sum().backward()
    assert x.grad is not None and clip.grad is not None
    assert torch.allclose(x.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]), atol=1e-3)
    assert clip.grad.item() > 0  # the value at the top follows the clip


def weights(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    w = 0.05 * torch.randn(rows, columns, generator=generator)
    match kind:
        case "zero":
            w.zero_()
        case "constant":
            w.fill_(0.25)
        case "positive":
            w.abs_()
        case "negative":
            w.abs_().neg_()
        case "mixed":  # a row of each
            w[0], w[1], w[2], w[3] = 0, -0.1, w[2].abs(), -w[3].abs()
            w[4] *= 1e-20
            w[5, :64] = 0
    return w


KINDS = ("normal", "zero", "constant", "positive", "negative", "mixed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "columns"), [*itertools.product(KINDS, (256, 172, 129, 5))])
def test_what_is_baked_is_what_is_trained(method: str, kind: str, columns: int) -> None:
    w = weights(kind, 12, columns)
    for group_size in (64, 128):
        quantizer = METHODS[method](12, columns, group_size)
        quantizer.initialise(w)
        with torch.no_grad():  # as after some training
            for i, parameter in enumerate(quantizer.parameters()):
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        integers, scale = quantizer(w)
        baked = quantizer.bake(w)
        assert torch.equal(baked.integers().float(), integers.detach())
        assert torch.equal(baked.scale_N, scale)
        assert torch.equal(baked.weights(), integers.detach() * scale[:, None])
        assert baked.levels_NG4.shape == (12, spec.ceil_div(columns, group_size), 4)
        assert bool((baked.levels_NG4[..., 1:] >= baked.levels_NG4[..., :-1]).all())
        assert bool((scale >= spec.SMALLEST_SCALE).all()) and bool(scale.isfinite().all())


GAUSSIAN_ERRORS = {
    "ldp": (0.10, 0.1175),  # the best four levels: 0.1175 σ² (Max, 1960), less for a group's own levels
    "ldp-udq": (0.105, 0.1188),  # the best equal steps: 0.1188 σ²
    "lc": (0.105, 0.1188),
    "seq": (0.115, 0.1200),  # the same for a whole row
    "r2q": (0.105, 0.1175),
    "uniform": (0.12, 0.19),
    "rtn": (0.19, 0.40),
}


@pytest.mark.parametrize(("method", "bound"), GAUSSIAN_ERRORS.items())
def test_initial_error_of_a_gaussian(method: str, bound: tuple[float, float]) -> None:
    w = torch.randn(64, 128 * 8, generator=torch.Generator().manual_seed(0))
    quantizer = METHODS[method](64, 128 * 8, 128)
    original = w.clone()
    quantizer.initialise(w)
    error = (quantizer.bake(w).weights() - original).square().mean()
    assert bound[0] < error.item() < bound[1]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"rtn"}))
def test_importance_moves_the_initial_levels_to_the_important_channels(method: str) -> None:
    original = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.where(torch.arange(128) < 16, 100.0, 1.0)
    errors = []
    for given in (None, importance):
        w, quantizer = original.clone(), METHODS[method](32, 128, 128)
        quantizer.initialise(w, given)
        errors.append(((quantizer.bake(w).weights() - original).square() * importance).mean().item())
    assert errors[1] < 0.98 * errors[0]


def round_straight(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def literal_ldp_udq(quantizer: torch.nn.Module, w: torch.Tensor) -> torch.Tensor:
    """The part that a weight is in, read back as a uniform level; inside a part, a line from one level to the next."""
    lo, hi = quantizer.beta.sigmoid() * w.detach().min(), quantizer.gamma.sigmoid() * w.detach().max()
    x = ((w - lo) / (hi - lo)).clamp(0, 1)
    outer, inner = quantizer.s1.sigmoid(), quantizer.s2.sigmoid()
    a, b = outer * inner, outer
    between = torch.where(x < a, x / a, torch.where(x < b, 1 + (x - a) / (b - a), 2 + (x - b) / (1 - b)))
    return lo + (hi - lo) * round_straight(between) / 3


def literal_lc(quantizer: torch.nn.Module, w: torch.Tensor) -> torch.Tensor:
    """Clip, then round to a grid (OmniQuant's learnable weight clipping, arXiv 2308.13137, without a zero point)."""
    lo, hi = quantizer.beta.sigmoid() * w.detach().min(), quantizer.gamma.sigmoid() * w.detach().max()
    return lo + (hi - lo) * round_straight(3 * ((w - lo) / (hi - lo)).clamp(0, 1)) / 3


def literal_min_max(quantizer: torch.nn.Module, w: torch.Tensor) -> torch.Tensor:
    s = (w.max() - w.min()) / 3
    z = (-round_straight(w.min() / s)).clamp(0, 3)
    return s * ((round_straight(w / s) + z).clamp(0, 3) - z)


def literal_seq(quantizer: torch.nn.Module, w: torch.Tensor) -> torch.Tensor:
    alpha = quantizer.log_alpha.exp()
    return alpha * (round_straight((w / alpha).clamp(-0.99, 0.99) * 2 - 0.5) + 0.5) / 2


def literal_r2q(quantizer: torch.nn.Module, w: torch.Tensor) -> torch.Tensor:
    """The weight's gradient is set apart: the sign's has none of its own."""
    first = quantizer.log_alpha.exp()
    second = first * quantizer.ratio_logit.sigmoid()
    fixed = w.detach()
    value = first * fixed.sign() + second * (fixed - first.detach() * fixed.sign()).sign()
    return value + torch.where(fixed.abs() <= first + second, w - fixed, 0.0)


LITERAL = {
    "ldp-udq": literal_ldp_udq,
    "lc": literal_lc,
    "uniform": literal_min_max,
    "rtn": literal_min_max,
    "seq": literal_seq,
    "r2q": literal_r2q,
}


@pytest.mark.parametrize("method", LITERAL)
def test_values_and_gradients_are_those_of_the_papers_formula(method: str) -> None:
    """One group, so that the formula can be written down as it stands; autograd in float64 gives its gradients."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    downstream = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    quantizer = METHODS[method](1, 64, 64)
    quantizer.initialise(w)
    quantizer.double()
    with torch.no_grad():  # away from the start, where parts are equal and nothing is beyond the clip
        for parameter in quantizer.parameters():
            parameter += torch.rand(parameter.shape, generator=generator) - 0.6
    inputs = [w.requires_grad_(), *quantizer.parameters()]
    integers, scale = quantizer(w)
    found = torch.autograd.grad((integers * scale[:, None] * downstream).sum(), inputs)
    expected_values = LITERAL[method](quantizer, w)
    expected = torch.autograd.grad((expected_values * downstream).sum(), inputs)
    assert (integers * scale[:, None] - expected_values).abs().max() <= 0.5 * scale.item() * 1.0001  # int8 levels
    for name, a, b in zip(["weight", *dict(quantizer.named_parameters())], found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (name, a, b)


@pytest.mark.parametrize("method", ["ldp", "ldp-udq", "lc", "seq", "r2q"])
@pytest.mark.parametrize("columns", [128, 172])
def test_parameter_gradients_by_finite_differences(method: str, columns: int) -> None:
    """Through fixed codes and unrounded levels, and with even levels through positions: what straight-through rounding
    stands for."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    quantizer = METHODS[method](6, columns, 64)
    quantizer.initialise(w)
    quantizer.double()
    downstream = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    integers, scale = quantizer(w)
    (integers * downstream).sum().backward()
    grouped = to_groups(w, 64)
    start = quantizer.levels(grouped).detach()
    codes = quantizer.codes(grouped, start).long()
    even = isinstance(quantizer, EvenLevels)
    before_position = quantizer.position(grouped, start).detach() if even else None

    def value() -> float:
        levels = quantizer.levels(grouped)
        chosen = torch.gather(levels, 2, codes)
        if even:
            chosen = chosen + steps(start)[1] * (quantizer.position(grouped, levels) - before_position)
        return (from_groups(chosen, columns) / scale[:, None] * downstream).sum().item()

    step = 1e-6
    for name, parameter in quantizer.named_parameters():
        flat = parameter.data.view(-1)
        assert parameter.grad is not None
        for i in range(0, len(flat), 5):
            before = flat[i].item()
            flat[i] = before + step
            above = value()
            flat[i] = before - step
            below = value()
            flat[i] = before
            numeric = (above - below) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-4), (name, i)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_reach_no_fill(method: str, kind: str) -> None:
    w = weights(kind, 12, 172).requires_grad_()
    quantizer = METHODS[method](12, 172, 128)
    quantizer.initialise(w)
    integers, scale = quantizer(w)
    (integers * scale[:, None]).square().sum().backward()
    for tensor in (w, *quantizer.parameters()):
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all())


def test_seq_is_exact_in_the_form() -> None:
    w = weights("normal", 12, 172)
    quantizer = METHODS["seq"](12, 172, 128)
    quantizer.initialise(w)
    assert bool((quantizer.bake(w).levels_NG4 == torch.tensor([-3, -1, 1, 3])).all())


@pytest.mark.parametrize("method", ["rtn", "uniform"])
def test_rounding_of_a_quotient_does_not_decide_the_levels_of_a_rows_largest_group(method: str) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    quantizer = weight_quantizer(method, (64, 512), 128)
    quantizer.initialise(w)
    levels = quantizer.levels(to_groups(w, 128))
    quotients = levels / quantizer.scale(levels)[:, None, None]
    largest = quotients.abs().amax(-1).argmax(-1)
    own = torch.take_along_dim(quotients, largest[:, None, None], 1)
    assert (own.abs().amax(-1).round() == spec.LEVEL_LIMIT).all()
    halves = (own - own.floor() - 0.5).abs()
    assert halves.min() > 0.05 and (own.abs() / own.abs().amax(-1, keepdim=True) == 0.5).any()


def test_clip_search_lowers_the_error() -> None:
    original = weights("normal", 12, 172)
    errors = {}
    for method in ("rtn", "uniform"):
        w, quantizer = original.clone(), METHODS[method](12, 172, 128)
        quantizer.initialise(w)
        errors[method] = (quantizer.bake(w).weights() - original).square().mean()
    assert errors["uniform"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize(("reach", "last"), [(0.0, 0.5), (0.5, 0.625), (1e9, 1.0)])
def test_ldp_weights_learn_as_far_as_the_reach(reach: float, last: float) -> None:
    w = torch.linspace(-1, 1, 64).repeat(2, 1).requires_grad_()
    quantizer = weight_quantizer("ldp", (2, 64), 64, Learning(reach=reach))
    with torch.no_grad():  # levels -1/2, -1/4, 1/4, 1/2
        quantizer.s1.fill_(math.log(3))
        quantizer.s2.fill_(-math.log(2))
    integers, scale = quantizer(w)
    (integers * scale[:, None]).sum().backward()
    assert torch.equal(w.grad != 0, w.detach().abs() <= last)


def test_residual_gradients_of_even_levels_are_those_of_lsq() -> None:
    """`ldp` with equal parts against `lc`, whose gradients are those of the formula with rounding as the identity."""
    w = weights("normal", 12, 172).requires_grad_()
    found = []
    for method, learning in (("lc", Learning()), ("ldp", Learning(residual_levels=True)), ("ldp", Learning())):
        quantizer = weight_quantizer(method, (12, 172), 128, learning)  # σ = ½ of either extreme, equal parts
        integers, scale = quantizer(w)
        loss = (integers * scale[:, None] * torch.linspace(-3, 5, w.numel()).sin().reshape(w.shape)).sum()
        found.append(torch.autograd.grad(loss, [w, quantizer.beta, quantizer.gamma]))
    for lsq, residual, exact in zip(*found, strict=True):
        assert (residual - lsq).norm() < 1e-3 * lsq.norm()
        torch.testing.assert_close(exact.isfinite(), lsq.isfinite())
    assert not torch.allclose(found[2][1], found[0][1], rtol=0.1)


@pytest.mark.parametrize("method", ["ldp", "ldp-udq", "lc"])
def test_a_fixed_range_stays_when_weights_move(method: str) -> None:
    w = weights("normal", 12, 172)
    moved = torch.where(w == w.amin(1, keepdim=True), 3 * w, w)
    for fixed in (True, False):
        quantizer = weight_quantizer(method, (12, 172), 128, Learning(fixed_range=fixed))
        quantizer.initialise(w.clone())
        before, after = quantizer.bake(w), quantizer.bake(moved)
        assert (
            torch.equal(
                before.levels_NG4 * before.scale_N[:, None, None], after.levels_NG4 * after.scale_N[:, None, None]
            )
            == fixed
        )


def test_ldp_weight_gradient_is_straight_through_inside_the_clip_range() -> None:
    w = torch.linspace(-1, 1, 64).repeat(2, 1).requires_grad_()
    quantizer = LDPQuantizer(2, 64, 64)
    with torch.no_grad():
        quantizer.beta.fill_(0.0)  # σ = ½: lo = −½, hi = ½
        quantizer.gamma.fill_(0.0)
    integers, scale = quantizer(w)
    (integers * scale[:, None]).sum().backward()
    assert w.grad is not None
    inside = w.detach().abs() <= 0.5
    assert torch.allclose(w.grad, inside.float())


@pytest.mark.parametrize("bits", [3, 4])
def test_finer_rounding_is_to_even_levels_of_a_group_and_passes_gradients_straight(bits: int) -> None:
    weight = torch.randn(5, 172, generator=torch.Generator().manual_seed(0)).requires_grad_()
    integers, scale = rounded_finely(weight, 64, bits)
    assert torch.equal(integers, integers.round()) and integers.abs().max() <= spec.LEVEL_LIMIT
    grouped, found = to_groups(weight, 64), to_groups(integers * scale[:, None], 64)
    step = (grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)) / (2**bits - 1)
    # Half a step, and half a multiple of the row scale that levels are rounded to.
    assert ((found - grouped).abs() <= 0.5001 * (step[..., None] + scale[:, None, None])).all()
    assert max(len(group.unique()) for group in found[:, :2].flatten(0, 1)) <= 2**bits
    (integers * scale[:, None]).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))


def test_tables() -> None:
    table = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    table[4] = 0
    integers, scale = int8_rows(table)
    assert integers.abs().max() == 127 and torch.equal(integers, integers.round())
    assert (integers * scale[:, None] - table).abs().max() <= scale.max() / 2 * 1.0001
    assert torch.equal(fake_quantize_rows(table, 8), integers * scale[:, None])
    assert torch.equal(fake_quantize_rows(table, 16), table.half().float())
