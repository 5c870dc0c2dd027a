"""Learning rates: who gets which, and when."""

from pathlib import Path

import pytest
import torch

from rcpconv.checkpoint import load_source
from rcpconv.config import QuantizeConfig
from rcpconv.layers import ComputeOptions, QuantLinear
from rcpconv.prepare import prepare, student_decoder
from rcpconv.train.optimizer import make_optimizer, rate_factor, set_rates
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def test_schedule_rises_then_follows_a_cosine_to_its_floor() -> None:
    factors = [rate_factor(step, 100, 0.1, 0.05) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(0.05)
    assert rate_factor(55, 101, 0.1, 0.0) == pytest.approx(0.5)


def test_schedule_may_be_a_line() -> None:
    factors = [rate_factor(step, 101, 0.0, 0.2, "linear") for step in range(101)]
    assert factors == pytest.approx([1 - 0.8 * step / 100 for step in range(101)])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.5), (3, 0.0)])
def test_short_schedules(steps: int, warmup: float) -> None:
    factors = [rate_factor(step, steps, warmup, 0.1) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors) and factors[0 if warmup in (0.0, 1.0) else 1] > 0.09


def test_every_parameter_has_its_rate_and_only_weights_decay(tmp_path: Path) -> None:
    make_tiny_checkpoint("qwen3", tmp_path, attention_bias=True)
    source = load_source(str(tmp_path))
    student = student_decoder(prepare(source), Quantization(method="ldp"), ComputeOptions())
    config = QuantizeConfig(model="m", lr=1.0, quantizer_lr=2.0, clip_lr=3.0, weight_decay=0.5)
    optimizer = make_optimizer(student, config)
    set_rates(optimizer, 0.5)
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: groups.pop(id(parameter)) for name, parameter in student.named_parameters()}
    assert not groups
    layer = "layers.1."
    assert found["embed.weight"] == found["head.weight"] == found[layer + "mlp.down.weight"] == (0.5, 0.5)
    for part in ("beta", "gamma", "s1", "s2"):
        assert found[f"{layer}attn.q.quantizer.{part}"] == (1.0, 0.0)
    for part in ("attn.input_quantizer", "mlp.down_quantizer", "attn.key_quantizer"):
        assert found[f"{layer}{part}.clip_logit"] == (1.5, 0.0)
    assert found[layer + "attn.q.bias"] == found[layer + "attn.q_norm"] == (0.5, 0.0)


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_frozen_weights_are_those_of_2_bit_layers(tmp_path: Path, scale: str) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    student = student_decoder(prepare(load_source(str(tmp_path))), Quantization(method="ldp"), ComputeOptions())
    rates = {"lr": 1.0, "quantizer_lr": 2.0, "clip_lr": 3.0, "lr_scale": scale}
    optimizer = make_optimizer(student, QuantizeConfig(model="m", **rates))
    set_rates(optimizer, 0.5, frozen=True)
    stay = {id(p) for group in optimizer.param_groups for p in group["params"] if not group["lr"]}
    assert stay == {id(m.weight) for m in student.modules() if isinstance(m, QuantLinear)}


def test_rates_in_proportion_to_weights_tables_apart_and_muon(tmp_path: Path) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    student = student_decoder(prepare(load_source(str(tmp_path))), Quantization(method="ldp"), ComputeOptions())
    with torch.no_grad():
        student.layers[0].mlp.down.weight *= 10
    rates = {"lr": 1.0, "quantizer_lr": 2.0, "clip_lr": 3.0, "table_lr": 0.25, "lr_scale": "relative"}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(student, QuantizeConfig(model="m", optimizer=name, **rates))
        set_rates(optimizer, 1.0)
        found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == len(list(student.parameters()))
        assert found[id(student.embed.weight)] == found[id(student.head.weight)] == 0.25
        weights = [layer.mlp.down.weight for layer in student.layers]
        expected = weights[0].square().mean().sqrt() / weights[1].square().mean().sqrt()
        assert found[id(weights[0])] / found[id(weights[1])] == pytest.approx(expected.item(), rel=1e-4)
