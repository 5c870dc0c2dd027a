"""torch.compile changes how fast a layer trains, not what it learns."""

import dataclasses

import pytest
import torch

from rcpconv.checkpoint import load_source
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.prepare import prepare, student_decoder
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def tiny_student(tmp_path, options: ComputeOptions) -> Decoder:
    make_tiny_checkpoint("llama3", tmp_path / "model")
    prepared = prepare(load_source(str(tmp_path / "model")))
    return student_decoder(prepared, Quantization(method="ldp"), options)


def layer_gradients(student: Decoder, layer, x: torch.Tensor, options: ComputeOptions) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    student.zero_grad()
    y = layer(x, *student.rope(x.shape[1]), options)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).sin())
    gradients = {name: p.grad for name, p in student.layers[0].named_parameters()}
    return {"output": y.detach() - x.detach(), "input": x.grad} | gradients


def compare(eager: dict[str, torch.Tensor], compiled: dict[str, torch.Tensor]) -> None:
    for name, a in eager.items():
        b = compiled[name]
        assert torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0) > 0.98, name
        assert 0.9 < b.norm() / a.norm() < 1.1, name


def test_a_layer_compiles_whole_and_gives_the_same_gradients(tmp_path) -> None:
    options = ComputeOptions()
    student = tiny_student(tmp_path, options)
    x = torch.randn(2, 24, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    eager = layer_gradients(student, student.layers[0], x, options)
    compiled = torch.compile(student.layers[0].forward, backend="aot_eager", fullgraph=True)
    compare(eager, layer_gradients(student, compiled, x, options))


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_compiled_layer_on_the_gpu_gives_the_same_gradients(tmp_path, half: bool) -> None:
    options = ComputeOptions(half=half)
    student = tiny_student(tmp_path, options).cuda()
    x = torch.randn(4, 64, student.architecture.hidden_size, generator=torch.Generator().manual_seed(0)).cuda()
    eager = layer_gradients(student, student.layers[0], x, options)
    torch._dynamo.reset()
    compiled = torch.compile(student.layers[0].forward, fullgraph=True)
    compare(eager, layer_gradients(student, compiled, x, options))


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
