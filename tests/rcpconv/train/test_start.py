"""Where training starts: error feedback against its definition, and what it does for a layer's output."""

from pathlib import Path

import pytest
import torch

from rcpconv.checkpoint import load_source
from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadOption
from rcpconv.layers import ComputeOptions, QuantLinear
from rcpconv.prepare import prepare, student_decoder
from rcpconv.quantizers import weight_quantizer
from rcpconv.quantizers.base import to_groups
from rcpconv.train.start import _inverse_factor, _start, start_from_data
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint

ROWS, COLUMNS = 24, 172


def layer(method: str) -> tuple[QuantLinear, torch.Tensor, torch.Tensor]:
    """A linear layer, its original weight, and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    quantizer = weight_quantizer(method, (ROWS, COLUMNS), 64)
    linear = QuantLinear((ROWS, COLUMNS), False, quantizer, ComputeOptions())
    weight = 0.05 * torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(400, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x += 20 * torch.randn(400, 1, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear, weight, x


@pytest.mark.parametrize("method", ["ldp", "lc", "seq", "r2q"])
@torch.no_grad()
def test_feedback_lowers_the_error_of_the_output_and_holds_the_levels(method: str) -> None:
    errors, levels = {}, {}
    for feedback in (False, True):
        linear, weight, x = layer(method)
        moment = (x.T @ x).double()
        _start(linear, moment.diagonal().float(), _inverse_factor(moment) if feedback else None)
        baked = linear.bake()
        errors[feedback] = ((weight - baked.weights()) @ x.T).square().mean().item()
        levels[feedback] = linear.quantizer.levels(to_groups(linear.weight, 64))
    assert errors[True] < 0.8 * errors[False]
    difference = (levels[True] - levels[False]).abs()
    assert difference.max() < 0.02 * levels[False].abs().max()  # a clip ratio has a largest value


@torch.no_grad()
def test_feedback_is_the_one_of_its_definition() -> None:
    """Column k is rounded after it has been moved by the errors before it, by the conditional mean (QuIP, eq. 2)."""
    linear, weight, x = layer("seq")
    moment = (x.T @ x).double()
    _start(linear, moment.diagonal().float(), _inverse_factor(moment))
    rounded = linear.bake().weights().double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    for k in (1, 63, 64, 100, COLUMNS - 1):
        after = slice(k, COLUMNS)  # what is free when columns before k are rounded
        moved = -torch.linalg.solve(damped[after, after], damped[after, :k] @ (rounded - weight.double())[:, :k].T).T
        torch.testing.assert_close(linear.weight[:, k].double(), weight[:, k] + moved[:, 0], rtol=1e-2, atol=2e-3)


@torch.no_grad()
def test_a_model_started_from_data_is_nearer_to_itself_unquantized(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama32", tmp_path)
    source = load_source(str(tmp_path))
    tokens = torch.randint(290, (8, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for feedback in (False, True):
        student = student_decoder(prepare(source), Quantization(method="ldp"), ComputeOptions())
        original = {name: p.clone() for name, p in student.named_parameters()}
        start_from_data(student, list(tokens.split(4)), feedback)
        changed = {name for name, p in student.named_parameters() if not torch.equal(p, original[name])}
        found.append({name.rsplit(".", 1)[1] for name in changed})
    assert found[0] <= {"beta", "gamma", "s1", "s2"} and found[1] == {"beta", "gamma", "s1", "s2", "weight"}


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"start": "feedback", "method": "uniform"}, "uniform"), ({"start": "data", "steps": 0}, "steps 0")],
)
def test_starts_that_cannot_be(settings: dict[str, object], word: str) -> None:
    with pytest.raises(BadOption, match=word):
        QuantizeConfig(model="m", **settings)  # type: ignore[arg-type]
