"""torch.compile changes how fast a layer trains, not what it learns."""

import dataclasses

import pytest
import torch

from rcpconv.checkpoint import load_source
from rcpconv.errors import BadCompiler
from rcpconv.layers import ComputeOptions, QuantTable
from rcpconv.model import Decoder, DecoderLayer
from rcpconv.prepare import prepare, student_decoder
from rcpconv.quantizers import METHODS, Learning, weight_quantizer
from rcpconv.train import compiling
from rcpconv.train.compiling import Comparison, layer_gradients
from rcpconv.train.memory import narrow_weights
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def tiny_student(tmp_path, options: ComputeOptions, method: str = "ldp") -> Decoder:
    make_tiny_checkpoint("llama3", tmp_path / "model")
    prepared = prepare(load_source(str(tmp_path / "model")))
    return student_decoder(prepared, Quantization(method=method), options)


def compare(student: Decoder, compiled, x: torch.Tensor) -> None:
    """Compiled gradients are as near to eager ones as those are to each other when the input moves by a rounding."""
    far = []
    for name, found in compiling.compare(student, compiled, x).items():
        difference, noise = found.relative(found.difference), found.relative(found.noise)
        if not difference <= 2 * noise + 0.02:
            far.append(f"{name}: {difference:.2g}, noise {noise:.2g}")
    assert not far, "\n".join(far)


def test_a_layer_compiles_whole_and_gives_the_same_gradients(tmp_path) -> None:
    options = ComputeOptions()
    student = tiny_student(tmp_path, options)
    x = torch.randn(2, 24, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    compare(student, torch.compile(student.layers[0].forward, backend="aot_eager", fullgraph=True), x)


def test_gradients_that_are_wrong_are_told_from_other_rounding(tmp_path) -> None:
    student = tiny_student(tmp_path, ComputeOptions())
    x = torch.randn(2, 24, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    gradients = layer_gradients(student, student.layers[0].forward, x, 0)

    def fault(name: str, factor: float, noise: float = 0.01) -> str:
        gradient = gradients[name]
        comparison = Comparison(gradient.numel())
        comparison.add(gradient, gradient * factor, gradient * (1 + noise))
        return comparison.fault()

    clip, weight = "attn.input_quantizer.clip_logit", "mlp.down.weight"
    for name in (clip, weight):
        assert [fault(name, factor) for factor in (1.0, 1.2, 0.0)] == ["", "", "differs by 100% from"]
    assert [fault(clip, factor, noise=0.9) for factor in (1.0, -0.9, 0.0)] == ["", "", "is 0 times"]
    assert fault(clip, float("nan")) == fault(weight, float("nan")) == "is not finite, unlike"


def uniform_with_ties(tmp_path) -> Decoder:
    """In every group of keys and values, a zero point half way between two integers, as min = -max makes it."""
    student = tiny_student(tmp_path, ComputeOptions(), method="uniform")
    with torch.no_grad():
        for linear in (student.layers[0].attn.k, student.layers[0].attn.v):
            ends = linear.weight.abs().amax(1, keepdim=True)
            linear.weight.copy_(linear.weight.clamp(-0.9 * ends, 0.9 * ends))
            linear.weight[:, :1], linear.weight[:, 1:2] = ends, -ends
    return student


@pytest.mark.parametrize("narrow", [False, True])
def test_levels_that_rounding_decides_are_no_fault(tmp_path, narrow: bool) -> None:
    student = uniform_with_ties(tmp_path)
    layer = student.layers[0]
    if narrow:
        narrow_weights(student)

    def otherwise_rounded(x: torch.Tensor, *rest) -> torch.Tensor:
        with compiling._moved_weights(layer, seed=100):
            return layer.forward(x, *rest)

    x = torch.randn(2, 24, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    found = compiling.compare(student, otherwise_rounded, x)
    keys = found["attn.k.weight"]
    assert keys.relative(keys.noise) > 0.1
    assert narrow or keys.relative(keys.difference) > 0.1
    assert [name for name, comparison in found.items() if comparison.fault()] == []


def test_weights_are_moved_by_a_rounding_and_put_back(tmp_path) -> None:
    layer = tiny_student(tmp_path, ComputeOptions(), method="uniform").layers[0]
    weight = layer.attn.k.weight
    before = weight.detach().clone()
    with compiling._moved_weights(layer, seed=0):
        move = (layer.attn.k.weight - before).abs().amax(1) / before.abs().amax(1)
        assert 0 < move.max() < 8 * compiling.ROUNDING
        equal = before[:, :, None] == before[:, None, :]
        moved = layer.attn.k.weight.detach()
        assert torch.equal(moved[:, :, None] == moved[:, None, :], equal), "clipped weights stay equal"
    assert layer.attn.k.weight is weight and torch.equal(weight, before)


def test_a_compiler_that_loses_gradients_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(tmp_path, ComputeOptions())
    tokens = torch.randint(student.architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))

    def compiled_wrongly(self: DecoderLayer, *arguments, **more) -> None:
        self._compiled_call_impl = lambda x, *rest: self.forward(x, *rest).detach() + x * 0

    monkeypatch.setattr(DecoderLayer, "compile", compiled_wrongly)
    with pytest.raises(BadCompiler, match=r"layers\.0\.input a gradient that differs by 100% from the one without"):
        compiling.compile_layers(student, student, tokens)


@pytest.mark.parametrize("lost", ["input", "weight"])
def test_a_compiler_that_loses_gradients_of_the_head_is_refused(
    tmp_path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    student = tiny_student(tmp_path, ComputeOptions())
    tokens = torch.randint(student.architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))

    def compiled_wrongly(self: QuantTable, *arguments, **more) -> None:
        def call(x, quantized):
            weight, scale = quantized
            x, weight = (x.detach() + 0 * x, weight) if lost == "input" else (x, weight.detach() + 0 * weight)
            return self.logits(x, (weight, scale))

        self._compiled_call_impl = call

    monkeypatch.setattr(DecoderLayer, "compile", lambda self: None)
    monkeypatch.setattr(QuantTable, "compile", compiled_wrongly)
    with pytest.raises(BadCompiler, match=rf"head\.{lost} a gradient that differs by 100% from the one without"):
        compiling.compile_layers(student, student, tokens)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_head_compiles_whole_and_passes(tmp_path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    student = tiny_student(tmp_path, ComputeOptions())
    tokens = torch.randint(student.architecture.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    student.head.compile(backend=backend, fullgraph=True)
    compiling._compare_head(student.head, tokens, low_memory=False)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("aot_eager", "cpu"),
        pytest.param("inductor", "cpu", marks=pytest.mark.slow),
        pytest.param("inductor", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(
    ("method", "learning"),
    [
        *((method, Learning()) for method in METHODS),
        ("ldp", Learning(reach=0.5, residual_levels=True, fixed_range=True)),
    ],
)
def test_every_weight_quantizer_compiles_whole_and_gives_the_same(
    method: str, learning: Learning, backend: str, device: str
) -> None:
    w = 0.05 * torch.randn(8, 172, generator=torch.Generator().manual_seed(0)).to(device)
    quantizer = weight_quantizer(method, (8, 172), 128, learning).to(device)
    quantizer.initialise(w)
    torch._dynamo.reset()
    inputs, found = [w.requires_grad_(), *quantizer.parameters()], []
    for quantize in (quantizer, torch.compile(quantizer.forward, backend=backend, fullgraph=True)):
        integers, scale = quantize(w)
        gradients = torch.autograd.grad((integers * scale[:, None]).square().sum(), inputs)
        found.append((integers, scale, *gradients))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_compiled_layer_on_the_gpu_gives_the_same_gradients(tmp_path, half: bool) -> None:
    options = ComputeOptions(half=half)
    student = tiny_student(tmp_path, options).cuda()
    x = torch.randn(4, 64, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0)).cuda()
    torch._dynamo.reset()
    compare(student, torch.compile(student.layers[0].forward, fullgraph=True), x)


@pytest.mark.gpu
def test_bfloat16_products_of_integers_are_exact(tmp_path) -> None:
    single = tiny_student(tmp_path, ComputeOptions())
    linear, options = single.layers[0].mlp.down.cuda(), single.options
    generator = torch.Generator().manual_seed(0)
    shape = (33, linear.weight.shape[1])
    x = single.layers[0].mlp.down_quantizer.cuda()(torch.randn(shape, generator=generator).cuda())
    exact = linear(x)
    linear.options = dataclasses.replace(options, half=True)
    assert torch.equal(linear(x), exact)
