"""Distillation losses against the formulas and against autograd, and the chunked head against the plain one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rcpconv.checkpoint import load_source
from rcpconv.layers import ComputeOptions
from rcpconv.prepare import Rotations, original_decoder, prepare, rotated_decoder, rotation_signs, student_decoder
from rcpconv.train import losses
from rcpconv.train.losses import (
    LEAST_ROWS,
    UNKNOWN,
    Distillation,
    Matching,
    chunk_rows,
    distill,
    teacher_confidence,
)
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint


def naive(kind: str, temperature: float, beta: float, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Sum over tokens, written as in the papers."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    teacher_first, student_first = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    squared = temperature**2
    if kind == "kl":
        return squared * teacher_first
    if kind == "cakld":
        return squared * (beta * student_first + (1 - beta) * teacher_first)
    known = target != UNKNOWN
    return 0.5 * squared * teacher_first + 0.5 * F.cross_entropy(student[known], target[known], reduction="sum")


@pytest.mark.parametrize("kind", ["kl", "cakld", "mix"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_and_their_gradients(kind: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(6, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 3 * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 10, UNKNOWN, 4, 4, UNKNOWN])
    expected = naive(kind, temperature, 0.3, student, teacher, target)
    expected.backward()
    loss, kl, gradient = Distillation(kind=kind, temperature=temperature, beta=0.3)(student.detach(), teacher, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert kl.item() == pytest.approx(naive("kl", temperature, 0, student, teacher, target).item(), rel=1e-10)
    assert student.grad is not None and torch.allclose(gradient, student.grad, atol=1e-10)


def test_cross_entropy_has_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 9, generator=generator)
    target = torch.tensor([0, 8, 4, UNKNOWN])
    kl, _, kl_gradient = Distillation(kind="kl")(student, teacher, target)
    cross, cross_gradient = losses.cross_entropy(student, target)
    loss, _, gradient = Distillation(kind="mix", mix_share=0.1)(student, teacher, target)
    torch.testing.assert_close(loss, 0.9 * kl + 0.1 * cross)
    torch.testing.assert_close(gradient, 0.9 * kl_gradient + 0.1 * cross_gradient)


@pytest.mark.parametrize("kind", ["kl", "cakld", "mix"])
def test_a_teacher_may_be_softened_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 9, generator=generator)
    target = torch.tensor([0, 8, 4, UNKNOWN])
    softened = Distillation(kind=kind, temperature=2.0, teacher_temperature=1.3)(student, teacher, target)
    torch.testing.assert_close(softened, Distillation(kind=kind, temperature=2.0)(student, teacher / 1.3, target))


def test_equal_distributions_have_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for kind in ("kl", "cakld"):
        loss, kl, gradient = Distillation(kind=kind)(logits, logits + 5, torch.full((4,), UNKNOWN))
        assert loss.abs() < 1e-5 and kl.abs() < 1e-5 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["llama32", "llama_bias"])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_head_in_chunks_gives_the_gradients_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: int
) -> None:
    """distill against autograd through the whole model, for one table and two."""
    make_tiny_checkpoint(kind, tmp_path)
    source = load_source(str(tmp_path))
    quantization = Quantization(method="ldp", head_bits=bits, embed_bits=bits)
    student = student_decoder(prepare(source, one_table=source.tied_embeddings), quantization, ComputeOptions())
    teacher = original_decoder(source)
    tokens = torch.randint(290, (2, 9), generator=torch.Generator().manual_seed(0))
    teacher_logits = teacher(tokens).flatten(0, 1)
    targets = F.pad(tokens[:, 1:], (0, 1), value=UNKNOWN).flatten()
    expected = naive("mix", 1.0, 0.0, student(tokens).flatten(0, 1), teacher_logits, targets) / 18
    (expected / 4).backward()
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    monkeypatch.setattr(losses, "CPU_CHUNK", 7 * 290)
    loss, kl = distill(student, teacher, tokens, Distillation(kind="mix"), weight=1 / 4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl.item() > 0
    for name, parameter in student.named_parameters():
        assert wanted[name] is not None and parameter.grad is not None, name
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5 * wanted[name].abs().max()), name
    # The next call adds to the gradients, as accumulation needs.
    before = student.head.weight.grad.clone()
    distill(student, teacher, tokens, Distillation(kind="mix"), weight=1 / 4)
    assert torch.allclose(student.head.weight.grad, 2 * before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("turned", [True, False])
def test_streams_are_matched(tmp_path: Path, turned: bool) -> None:
    """An unquantized student has no distance to the teacher; a quantized one has, with autograd's gradient."""
    make_tiny_checkpoint("llama1", tmp_path)
    source = load_source(str(tmp_path))
    prepared = prepare(source, rotations=Rotations(r1=turned), seed=3)
    teacher = original_decoder(source)
    signs = rotation_signs(source.architecture.hidden_size, 3).float() if turned else None
    matching = Matching(weight=0.5, signs=signs)
    tokens = torch.randint(290, (2, 9), generator=torch.Generator().manual_seed(0))
    taught = list(map(matching.turned, teacher.streams(tokens)))
    assert matching(list(rotated_decoder(prepared).streams(tokens)), taught) < 1e-8
    student = student_decoder(prepared, Quantization(method="ldp", r1=turned), ComputeOptions())
    distance = matching(list(student.streams(tokens)), taught)
    shares = [((s - t) ** 2).sum(-1) / (t**2).sum(-1) for s, t in zip(student.streams(tokens), taught, strict=True)]
    assert distance.item() == pytest.approx(0.5 * torch.stack(shares).mean().item(), rel=1e-5)
    kl = Distillation(kind="kl")
    found = []
    for extra in (None, matching):
        student.zero_grad(set_to_none=True)
        loss, _ = distill(student, teacher, tokens, kl, 0.25, extra)
        found.append((loss, student.layers[0].mlp.down.weight.grad.clone()))
    assert (found[1][0] - found[0][0]).item() == pytest.approx(distance.item(), rel=1e-4)
    (expected,) = torch.autograd.grad(0.25 * distance, student.layers[0].mlp.down.weight)
    torch.testing.assert_close(found[1][1] - found[0][1], expected, rtol=1e-3, atol=1e-6)


def test_teacher_confidence_is_the_mean_top_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_checkpoint("llama1", tmp_path)
    teacher = original_decoder(load_source(str(tmp_path)))
    batches = [torch.randint(290, (2, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected = torch.cat([teacher(tokens).softmax(-1).amax(-1) for tokens in batches]).mean().item()
    monkeypatch.setattr(losses, "CPU_CHUNK", 3 * 290)
    assert teacher_confidence(teacher, batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("vocab_size", "low_memory", "rows"), [(32_000, False, 4096), (32_000, True, 512)])
def test_chunks_of_a_gpu_are_of_one_size(vocab_size: int, low_memory: bool, rows: int) -> None:
    assert chunk_rows(16_384, vocab_size, torch.device("cuda"), low_memory) == rows


def test_a_large_vocabulary_has_chunks_of_as_many_tokens_as_make_up_for_reading_its_table() -> None:
    assert chunk_rows(16_384, 128_256, torch.device("cuda"), low_memory=True) == LEAST_ROWS
    assert chunk_rows(100, 128_256, torch.device("cuda"), low_memory=True) == 100
