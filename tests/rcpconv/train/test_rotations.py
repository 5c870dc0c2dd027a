"""Learned rotations: they change no logits of the unquantized model, fit the quantized one, and survive a kill."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rcpconv.prepare as preparing
import rcpconv.train.beginning as beginning
from rcpconv.baking import baked_decoder
from rcpconv.checkpoint import load_source
from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadOption, BadRun, NotSaved, TrainingDiverged
from rcpconv.evaluate import tokenize
from rcpconv.export import export
from rcpconv.heldout import read_text
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.prepare import original_decoder, prepare, rotated_decoder, student_decoder
from rcpconv.quantizers.base import to_groups
from rcpconv.report.measure import measure
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import CHECKPOINTS, ROTATIONS, Run, copy_file, unfinished
from rcpconv.train.rotations import _FollowingLevels, learn_rotations
from rcpconv.train.stopping import Interrupted
from rcpformat.architecture import Quantization
from rcpformat.reader import RcpFile
from rcprun.backends.numpy.reference import ReferenceModel
from tiny_checkpoints import CORPUS, make_tiny_checkpoint
from tiny_trainings import assert_same_result, in_child, resume, train, wait_for_line

STATE = f"{CHECKPOINTS}/rotations.pt"
STEPS = 12


def random_rotations(model: Decoder, *, r1: bool = True) -> LearnedRotations:
    a, generator = model.architecture, torch.Generator().manual_seed(0)

    def orthogonal(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q

    return LearnedRotations(
        r1_CC=orthogonal(a.hidden_size, a.hidden_size) if r1 else None,
        r2_LDD=orthogonal(a.num_layers, a.head_dim, a.head_dim),
    )


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("llama_bias", {}),
        ("llama32", {"one_table": True}),
        ("llama32", {"one_table": True, "head_matrix": True}),
        ("qwen3", {}),
    ],
)
@torch.no_grad()
def test_any_rotation_leaves_the_logits_of_the_unquantized_model(
    kind: str, tables: dict[str, bool], tmp_path: Path
) -> None:
    make_tiny_checkpoint(kind, tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    original = original_decoder(source)
    tokens = torch.arange(40)[None] % source.architecture.vocab_size
    rotations = random_rotations(original, r1=tables != {"one_table": True})
    turned = rotated_decoder(prepare(source, learned=rotations, **tables))
    assert (turned(tokens) - original(tokens)).abs().max() < 1e-3
    plain = rotated_decoder(prepare(source, **tables))
    assert not torch.allclose(plain.layers[0].attn.o.weight, turned.layers[0].attn.o.weight, atol=1e-2)
    for (name, a), b in zip(plain.named_parameters(), turned.parameters(), strict=True):
        torch.testing.assert_close(rotations.turned(name, a).float(), b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama_bias", "qwen3"])
def test_tensors_are_turned_where_they_are(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the meta device nothing can be computed anywhere else, as nothing should of a GPU's."""
    monkeypatch.setitem(preparing._BLOCK_ELEMENTS, "meta", 1 << 18)
    monkeypatch.setattr(preparing, "apply_right", lambda rows, signs=None: rows if signs is None else rows * signs)
    make_tiny_checkpoint(kind, tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    learned = random_rotations(original_decoder(source))
    prepared = prepare(source, one_table=False, learned=learned).on("meta")
    moved = prepared.learned
    assert moved is not None and moved.r1_CC is not None and moved.r1_CC.is_meta
    found = dict(prepared.tensors())
    assert {(value.device.type, value.dtype) for value in found.values()} == {("meta", torch.float32)}
    assert {moved.turned(name, value).device.type for name, value in found.items()} == {"meta"}
    assert rotated_decoder(prepared).inv_freq.is_meta


@pytest.fixture(scope="module")
def learned(checkpoint: Path) -> dict[str, Any]:
    """Rotations that were learned, twice, and what was said of it."""
    source = load_source(str(checkpoint))
    teacher = original_decoder(source)
    student = student_decoder(prepare(source), Quantization(method="ldp"), ComputeOptions())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    ids = torch.tensor(tokenize(source.tokenizer.json, "\n".join(CORPUS))[:96]).reshape(4, 24)
    said: list[list[str]] = []
    parameters = list(student.parameters())

    def learn(*, recompute: bool = False, **which: Any) -> LearnedRotations:
        said.append([])
        student.options.checkpoint_layers = recompute
        return learn_rotations(
            student, teacher, lambda step: [ids[:2], ids[2:]], steps=STEPS, rate=3e-3, tell=said[-1].append, **which
        )

    return {
        "both": [learn(r1=True, r2=True), learn(r1=True, r2=True, recompute=True)],
        "r2": learn(r1=False, r2=True),
        "said": said,
        "before": before,
        "student": student,
        "parameters": parameters,
    }


def test_learning_lowers_the_divergence_and_leaves_the_student_alone(learned: dict[str, Any]) -> None:
    for said, share in zip(learned["said"], (0.9, 0.9, 1.0), strict=True):
        first, last = (float(line.rpartition(" ")[2]) for line in (said[0], said[-1]))
        assert last < share * first
        assert said[-1].startswith(f"rotations: step {STEPS} of {STEPS}, KL ")
    after = learned["student"].state_dict()
    assert after.keys() == learned["before"].keys()
    assert all(torch.equal(after[name], value) for name, value in learned["before"].items())
    for parameter, same in zip(learned["student"].parameters(), learned["parameters"], strict=True):
        assert parameter is same and parameter.requires_grad and parameter.grad is None


def test_what_is_learned_is_orthogonal_and_the_same_every_time_and_with_layers_computed_twice(
    learned: dict[str, Any],
) -> None:
    one, two = learned["both"]
    for a, b in ((one.r1_CC, two.r1_CC), (one.r2_LDD, two.r2_LDD)):
        assert torch.equal(a, b)
        identity = torch.eye(a.shape[-1], dtype=torch.float64)
        assert (a.mT @ a - identity).abs().max() < 1e-12
        assert (a - identity).abs().max() > 1e-3
    assert learned["r2"].r1_CC is None and learned["r2"].r2_LDD is not None


def test_gradients_go_through_levels_exactly_and_straight_through_the_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 100, generator=generator, dtype=torch.float64).requires_grad_()
    wanted = torch.randn(3, 100, generator=generator, dtype=torch.float64)
    quantizer = _FollowingLevels(weight, 64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        """Of levels before they are rounded to 8 bits, which gradients pass straight."""
        levels = quantizer.levels(to_groups(value, 64))
        found = quantizer.select(to_groups(value, 64), levels, levels, torch.ones(3))
        difference = found.flatten(1)[:, :100] - wanted
        inside = (value >= levels.amin(-1).repeat_interleave(64, 1)[:, :100]) & (
            value <= levels.amax(-1).repeat_interleave(64, 1)[:, :100]
        )
        straight.append(torch.where(inside, 2 * difference, 0.0).detach())
        return (difference**2).sum()

    straight: list[torch.Tensor] = []
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    gradient -= straight[0]
    moved = torch.randn(3, 100, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        difference = (loss(weight + 1e-6 * moved) - loss(weight - 1e-6 * moved)) / 2e-6
    assert float((gradient * moved).sum()) == pytest.approx(float(difference), rel=1e-4)


def test_a_run_with_learned_rotations_is_exact_and_survives_a_kill(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """With matched streams, which need the rotation after a resume too."""
    settings: dict[str, Any] = {"rotation_steps": 6, "rotation_lr": 0.3, "tables": "two", "hidden_loss": 0.5}
    settings |= {"steps": 6, "checkpoint_every": 2}
    whole = train(checkpoint, text, tmp_path / "whole", **settings)
    assert export(whole, tmp_path / "model.rcp").nbytes > 0  # compares the file's weights with the trained ones
    rotations = LearnedRotations.load(whole.folder / ROTATIONS)
    assert rotations.r1_CC is not None and rotations.r1_CC.dtype == torch.float64
    found = measure(
        whole,
        load_source(str(checkpoint)),
        read_text(text),
        max_tokens=200,
        generations=0,
        generation_tokens=1,
        device=torch.device("cpu"),
        tell=lambda what: None,
    )
    assert found.outputs_after["layers.0.attn.o"] < 0.8, "of a stream turned by another rotation it is 1.5"

    def begin() -> int:
        train(checkpoint, text, tmp_path / "killed", **settings)
        return 0

    child = in_child(begin, tmp_path / "log")
    wait_for_line(tmp_path / "killed", 3, child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert_same_result(resume(tmp_path / "killed"), whole)


SHORT: dict[str, Any] = {"rotation_share": 0.25, "steps": 24}
"""Of them 6 for the rotations."""


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rcpconv.plan.LEAST_ROTATION_STEPS", 4)
        run = train(checkpoint, text, tmp_path_factory.mktemp("rotations") / "whole", **SHORT)
    assert run.config.rotation_steps == 6 and run.architecture.head_matrix
    assert not (run.folder / STATE).exists()
    return run


def interrupted(monkeypatch: pytest.MonkeyPatch, lines: int, number: int) -> list[str]:
    """Send this process a signal when that many lines were said of rotations; gives what is said."""
    learn, told = beginning.learn_rotations, []

    def learning(*args: Any, **how: Any) -> LearnedRotations:
        def tell(line: str) -> None:
            told.append(line)
            if len(told) == lines:
                os.kill(os.getpid(), number)

        return learn(*args, **how | {"tell": tell})

    monkeypatch.setattr("rcpconv.plan.LEAST_ROTATION_STEPS", 4)
    monkeypatch.setattr(beginning, "learn_rotations", learning)
    return told


@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_that_is_stopped_while_it_learns_rotations_goes_on_from_there(
    steps: int, uninterrupted: Run, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = interrupted(monkeypatch, steps, signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"Stopped after step [2-6] of 6 of the rotations"):
        train(checkpoint, text, folder, **SHORT | {"checkpoint_every": 0})
    assert (folder / STATE).exists() and not (folder / ROTATIONS).exists()
    before = len(told)
    assert_same_result(resume(folder), uninterrupted)
    after = int(told[before].split()[5])
    assert steps <= after <= 6 and told[before] == f"rotations: going on after step {after} of 6"
    assert not list((folder / CHECKPOINTS).iterdir())


def test_a_run_that_is_killed_while_it_learns_rotations_goes_on_from_what_it_saved(
    uninterrupted: Run, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"

    def begin() -> int:
        interrupted(monkeypatch, 5, signal.SIGKILL)
        train(checkpoint, text, folder, **SHORT | {"checkpoint_every": 3})
        return 0

    _, status = os.waitpid(in_child(begin, tmp_path / "log"), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    saved = (folder / STATE).read_bytes()
    unfinished(folder / STATE).write_bytes(saved)
    (folder / STATE).write_bytes(saved[:1000])
    with pytest.raises(BadRun, match=r"rotations\.pt: cannot be read .*; delete it to begin anew with rcpconv"):
        resume(folder)
    torch.save({"step": 3, "rotations": {}}, folder / STATE)
    with pytest.raises(BadRun, match=r"rotations\.pt: is of another model or version .*; delete it to begin anew"):
        resume(folder)
    (folder / STATE).write_bytes(saved)
    told = interrupted(monkeypatch, 0, 0)
    assert_same_result(resume(folder), uninterrupted)
    assert told[0] == "rotations: going on after step 4 of 6"
    assert not list((folder / CHECKPOINTS).iterdir())


def test_what_learning_goes_on_from_is_deleted_also_after_a_kill_in_between(
    uninterrupted: Run, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = interrupted(monkeypatch, 2, signal.SIGTERM)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(checkpoint, text, folder, **SHORT | {"checkpoint_every": 0})
    copy_file(uninterrupted.folder / ROTATIONS, folder / ROTATIONS)
    told.clear()
    assert_same_result(resume(folder), uninterrupted)
    assert not told and not list((folder / CHECKPOINTS).iterdir())


def test_a_full_disk_while_rotations_are_learned(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rcpconv.plan.LEAST_ROTATION_STEPS", 4)
    monkeypatch.setattr(torch, "save", full)
    expected = r"rotations\.pt: .*No space left on device.* saved before, if anything, is intact: continue with rcpconv"
    with pytest.raises(NotSaved, match=expected):
        train(checkpoint, text, tmp_path / "run", **SHORT)
    assert not list((tmp_path / "run" / CHECKPOINTS).iterdir())


def test_with_one_table_a_matrix_turns_what_the_head_takes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run = train(checkpoint, text, tmp_path / "run", rotation_steps=4, rotation_lr=0.3, steps=2)
    assert run.architecture.tied_table and run.architecture.head_matrix
    found = LearnedRotations.load(run.folder / ROTATIONS)
    assert found.r1_CC is not None and found.r2_LDD is not None
    assert (found.r1_CC - torch.eye(len(found.r1_CC))).abs().max() > 1e-2
    export(run, tmp_path / "model.rcp")
    with RcpFile.open(tmp_path / "model.rcp") as file:
        assert "head_matrix" in file.metadata.required_features
        tokens = list(range(24))
        decoder = baked_decoder(run.architecture, run.quantization, run.tensor)
        logits = decoder(torch.tensor([tokens]))[0]
        # A code that flips by rounding moves a logit by some hundredths of their spread.
        np.testing.assert_allclose(ReferenceModel(file).logits(tokens), logits, atol=0.05 * float(logits.std()))
        decoder.options.dtype = torch.float64
        assert decoder(torch.tensor([tokens])).dtype == torch.float64
    run = train(checkpoint, text, tmp_path / "none", rotation_steps=2, steps=1, r1=False, r2=False)
    assert run.config.rotation_steps == 0 and not (run.folder / ROTATIONS).exists()


def test_a_divergence_that_is_not_finite(checkpoint: Path) -> None:
    source = load_source(str(checkpoint))
    teacher = original_decoder(source)
    teacher.layers[0].attn.q.weight.fill_(float("nan"))
    student = student_decoder(prepare(source), Quantization(method="ldp"), ComputeOptions())
    ids = torch.arange(24)[None]
    with pytest.raises(TrainingDiverged, match=r"rotations: step 1: KL is not finite\. Try --rotation-lr 3\.3e-03"):
        learn_rotations(student, teacher, lambda step: [ids], steps=2, rate=1e-2, r1=False, r2=True, tell=print)
    assert not any(hasattr(module, "parametrizations") for module in student.modules())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="rotation_steps: 5 need training text, which steps 0 does without"):
        QuantizeConfig(model="m", rotation_steps=5, steps=0)
    (tmp_path / ROTATIONS).write_bytes(b"damaged")
    with pytest.raises(BadRun, match=r"rotations\.safetensors: cannot be used"):
        LearnedRotations.load(tmp_path / ROTATIONS)
