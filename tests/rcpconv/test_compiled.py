"""torch.compile changes how fast a layer trains, not what it learns."""

import dataclasses

import pytest
import torch

from rcpconv.checkpoint import load_source
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.prepare import prepare, student_decoder
from rcpconv.quantizers import METHODS, Learning, weight_quantizer
from rcpconv.train.compiling import distances, layer_gradients, rounding_noise
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def tiny_student(tmp_path, options: ComputeOptions) -> Decoder:
    make_tiny_checkpoint("llama3", tmp_path / "model")
    prepared = prepare(load_source(str(tmp_path / "model")))
    return student_decoder(prepared, Quantization(method="ldp"), options)


def compare(student: Decoder, compiled, x: torch.Tensor) -> None:
    """Compiled gradients are as near to eager ones as those are to each other when the input moves by a rounding."""
    eager = layer_gradients(student, student.layers[0], x)
    found, noise = distances(eager, layer_gradients(student, compiled, x)), rounding_noise(student, x, eager)
    far = [f"{n}: {found[n]:.2g}, noise {noise[n]:.2g}" for n in found if not found[n] <= 2 * noise[n] + 0.02]
    assert not far, "\n".join(far)


def test_a_layer_compiles_whole_and_gives_the_same_gradients(tmp_path) -> None:
    options = ComputeOptions()
    student = tiny_student(tmp_path, options)
    x = torch.randn(2, 24, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    compare(student, torch.compile(student.layers[0].forward, backend="aot_eager", fullgraph=True), x)


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
