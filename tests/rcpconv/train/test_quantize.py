"""`rcpconv quantize` from checkpoint to finished run: what it leaves, interruption, resumption, refusals."""

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from rcpconv.baking import baked_decoder
from rcpconv.cli import main
from rcpconv.config import QuantizeConfig
from rcpconv.errors import (
    BadCompiler,
    BadRun,
    BadTrainingData,
    CheckpointNotFound,
    NotSaved,
    RunNotFound,
    TrainingDiverged,
)
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.export import export
from rcpconv.plan import make_plan, supposed_machine
from rcpconv.prepare import original_decoder
from rcpconv.quantize import NEWEST, _note_peak, quantize
from rcpconv.quantizers import METHODS
from rcpconv.runs import FAILED, FINISHED, RUNNING, Run, locked
from rcpconv.train.loop import Trainer
from rcpconv.train.stopping import Interrupted
from rcpformat import spec
from rcpformat.reader import RcpFile
from shapes import LLAMA_2_7B
from tiny_checkpoints import make_tiny_checkpoint
from tiny_trainings import (
    SETTINGS,
    STEPS,
    assert_same_result,
    in_child,
    metrics,
    resume,
    train,
    wait_for_line,
)


def test_what_a_run_leaves(reference: Run, checkpoint: Path) -> None:
    assert {path.name for path in reference.folder.iterdir()} == {
        *(".lock", "run.json", "recipe.toml", "tokenizer.json", "tokens", "checkpoints"),
        *("metrics.jsonl", "loss.png", "baked.safetensors", "weights.sha256.json"),
    }
    assert list((reference.folder / "checkpoints").iterdir()) == []
    run = Run.open(reference.folder)
    assert run.status == FINISHED and run.record["finished"] > run.record["created"]
    assert run.architecture.tied_table and run.record["model"] == str(checkpoint)
    assert set(run.tensor_names()) == spec.expected_tensors(run.architecture, run.quantization).keys() - {
        "tokenizer.json"
    }
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = run.config
    assert (config.tables, config.precision, config.device, config.quantizer_lr) == ("one", "fp32", "cpu", 2.5e-3)
    lines = metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["tokens"] == STEPS * 2 * 2 * 24
    assert [line["step"] for line in lines if "perplexity" in line] == [8, 16]


def test_training_lowers_the_divergence(reference: Run) -> None:
    lines = metrics(reference.folder)
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    perplexity = reference.evaluation["perplexity"]
    measured = [line["perplexity"] for line in lines if "perplexity" in line]
    assert measured[0] > measured[1] > 0 and perplexity["original"] > 0


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"ldp", "rtn"}))
def test_every_method_lowers_the_divergence(checkpoint: Path, text: Path, tmp_path: Path, method: str) -> None:
    lines = metrics(train(checkpoint, text, tmp_path / "run", method=method).folder)
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]


TRAINED_OTHERWISE = {
    "reach": {"weight_reach": 0.5, "weight_range": "fixed"},
    "levels": {"level_gradient": "residual"},
    "rates": {"lr_scale": "relative", "table_lr": 1e-4, "schedule": "linear", "lr_floor": 0.0},
    "muon": {"optimizer": "muon"},
    "mean": {"ema": 0.9},
    "streams": {"hidden_loss": 1.0, "hidden_end": 0.0},
    "data": {"start": "data", "a_clip": 0.75},
    "feedback": {"start": "feedback", "weight_range": "fixed"},
    "mix": {"loss": "mix", "mix_share": 0.1},
    "softened": {"teacher_temperature": 1.1},
    "resampled": {"resample": 0.2},
    "late activations": {"activations_from": 0.5},
    "frozen": {"freeze": 0.25},
    "pulled": {"pull": 0.05, "weight_reach": 100.0, "loss": "cakld", "quantizer_factor": 10.0, "clip_factor": 10.0},
}


@pytest.mark.parametrize("settings", TRAINED_OTHERWISE.values(), ids=TRAINED_OTHERWISE)
def test_every_way_to_train_lowers_the_divergence_and_stays_exact(
    checkpoint: Path, text: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = train(checkpoint, text, tmp_path / "run", **settings)
    lines = metrics(run.folder)
    assert lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    assert export(run, tmp_path / "model.rcp").nbytes > 0  # compares the file's weights with the trained ones


def test_frozen_weights_stay_while_levels_learn_and_pulled_ones_end_nearer_to_their_levels(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, float, Tensor]] = []
    update = Trainer._update

    def watch(trainer: Trainer, loss: Any) -> None:
        update(trainer, loss)
        linear = trainer.linears[0]
        integers, scale = linear.quantizer(linear.weight)
        distance = (linear.weight - integers * scale[:, None]).norm()
        baked = linear.quantizer.bake(linear.weight)
        clips = linear.quantizer.beta.detach().clone()
        seen.append((linear.weight.detach().clone(), clips, float(distance.detach()), baked.codes_NK))

    monkeypatch.setattr(Trainer, "_update", watch)
    train(checkpoint, text, tmp_path / "free")
    free = seen[:]
    seen.clear()
    train(checkpoint, text, tmp_path / "pulled", pull=0.2)
    assert seen[-1][2] < 0.9 * free[-1][2]
    seen.clear()
    train(checkpoint, text, tmp_path / "fast", quantizer_lr=0.05)
    free = seen[:]
    seen.clear()
    train(checkpoint, text, tmp_path / "frozen", freeze=0.25, quantizer_lr=0.05)
    last = round(0.75 * STEPS) - 1  # the last update of the weights
    assert torch.equal(seen[last][0], free[last][0])
    assert not torch.equal(seen[last][0], seen[last - 1][0]) and not torch.equal(seen[last][3], seen[last - 1][3])
    assert torch.equal(seen[last + 1][0], seen[-1][0]) and torch.equal(seen[last][3], seen[-1][3])
    assert not torch.equal(seen[last][1], seen[-1][1])


def test_activations_are_quantized_late_and_always_in_the_end(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits: list[set[int]] = []
    update = Trainer._update

    def watch(trainer: Trainer, loss: Any) -> None:
        update(trainer, loss)
        bits.append({module.bits for module in trainer.bits})

    monkeypatch.setattr(Trainer, "_update", watch)
    run = train(checkpoint, text, tmp_path / "run", activations_from=0.5)
    assert bits == [{16}] * (STEPS // 2) + [{4}] * (STEPS - STEPS // 2)
    assert run.quantization.a_bits == 4


@pytest.mark.parametrize("start", ["weights", "feedback"])
def test_weights_have_more_bits_at_first_and_two_in_the_end(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    settings: dict[str, Any] = {"progressive_bits": 4, "progressive_share": 0.45, "steps": 10, "ema": 0.9}
    settings |= {"start": start, "checkpoint_every": 2}
    bits: list[int] = []
    update = Trainer._update

    def watch(trainer: Trainer, loss: Any) -> None:
        update(trainer, loss)
        (found,) = {linear.bits for linear in trainer.linears}
        bits.append(found)

    monkeypatch.setattr(Trainer, "_update", watch)
    run = train(checkpoint, text, tmp_path / "run", **settings)
    assert bits == [4] * 4 + [2] * 6
    kl = [line["kl"] for line in metrics(run.folder)]
    assert max(kl[:4]) < min(kl[4:])
    export(run, tmp_path / "model.rcp")  # compares the file's weights with the trained ones

    for stop in (4, 6):  # before the first step of 2 bits, and after it

        def stopping(trainer: Trainer, loss: Any, stop: int = stop) -> None:
            update(trainer, loss)
            if trainer.counters.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Trainer, "_update", stopping)
        with pytest.raises(Interrupted):
            train(checkpoint, text, tmp_path / str(stop), **settings)
        monkeypatch.setattr(Trainer, "_update", update)
        assert_same_result(resume(tmp_path / str(stop)), run)


def test_a_mean_and_two_optimizers_are_resumed(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {"ema": 0.9, "optimizer": "muon", "eval_data": str(text), "max_eval_tokens": 500, "eval_every": 5}
    whole = train(checkpoint, text, tmp_path / "whole", **settings)

    def begin() -> int:
        train(checkpoint, text, tmp_path / "killed", **settings)
        return 0

    child = in_child(begin, tmp_path / "log")
    wait_for_line(tmp_path / "killed", 6, child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert_same_result(resume(tmp_path / "killed"), whole)


def test_round_to_nearest_needs_no_texts_and_no_training(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    settings = {"method": "rtn", "data": ("not there",), "eval_data": str(text), "device": "cpu"}
    run = quantize(str(checkpoint), settings, out=tmp_path / "run", console=Console(quiet=True))
    assert run is not None and run.status == FINISHED
    assert run.evaluation["perplexity"]["fake-quant"] > 0 and not (run.folder / "tokens").exists()
    assert export(run, tmp_path / "model.rcp").nbytes > 0


def test_the_baked_model_is_the_trained_one(reference: Run, text: Path) -> None:
    """The perplexity measured on the student is that of the model made from its baked tensors."""
    windows = cut(tokenize(reference.tokenizer_json, text.read_text()), reference.evaluation["window"], 1000)
    decoder = baked_decoder(reference.architecture, reference.quantization, reference.tensor)
    assert reference.evaluation["tokens"] == sum(len(window) - 1 for window in windows)
    assert torch_perplexity(decoder, windows, "") == pytest.approx(
        reference.evaluation["perplexity"]["fake-quant"], rel=1e-5
    )


def test_ctrl_c_saves_exits_130_and_says_how_to_go_on(
    reference: Run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "stopped", tmp_path / "log"
    settings = SETTINGS | {
        "eval_data": str(text),
        "max_eval_tokens": 1000,
        "eval_every": 8,
        "checkpoint_every": 0,
        "data": str(text),
    }
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    def command() -> int:
        try:
            main(["quantize", str(checkpoint), *options, "--out", str(folder)])
        except SystemExit as end:
            return int(end.code or 0)
        return 98

    child = in_child(command, log)
    wait_for_line(folder, 5, child)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    done = len(metrics(folder))
    assert 5 <= done < STEPS
    assert f"Stopped after step {done} of {STEPS}; everything is saved." in log.read_text()
    assert f"rcpconv quantize --resume {folder}" in log.read_text()
    assert f"step {done}/{STEPS}  loss" in log.read_text()  # plain lines, for it is no terminal
    assert_same_result(resume(folder, checkpoint_every=3), reference)


@pytest.fixture
def interrupted(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that ended at once."""
    monkeypatch.setattr("rcpconv.train.loop.Trainer.train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        train(checkpoint, text, tmp_path / "runs" / "a")
    monkeypatch.undo()
    return Run.open(tmp_path / "runs" / "a")


def test_a_changed_setting_is_refused_by_name(interrupted: Run, tmp_path: Path) -> None:
    with pytest.raises(BadRun, match=r"lr: the run was started with 0\.001, now it is 0\.002; resume it unchanged"):
        resume(interrupted.folder, lr=0.002)
    with pytest.raises(BadRun, match=r"model: the run was started with"):
        quantize("demo", {}, resume=str(interrupted.folder))
    recipe = tmp_path / "r.toml"
    recipe.write_text("group_size = 64\n")
    with pytest.raises(BadRun, match=r"group_size: the run was started with 128, now it is 64"):
        quantize(None, {}, recipe=recipe, resume=str(interrupted.folder))


def test_the_newest_unfinished_run_is_resumed_with_its_own_settings_repeated(interrupted: Run) -> None:
    run = quantize(None, {"lr": 1e-3, "log_every": 5}, resume=NEWEST, runs=interrupted.folder.parent)
    assert run is not None and run.status == FINISHED and run.folder == interrupted.folder
    assert [line["step"] for line in metrics(run.folder)] == [5, 10, 15, 20]
    with pytest.raises(BadRun, match=r"already finished; export it with: rcpconv export --run"):
        resume(run.folder)
    with pytest.raises(RunNotFound, match="no unfinished run"):
        quantize(None, {}, resume=NEWEST, runs=interrupted.folder.parent)


def test_a_run_in_use_is_refused(interrupted: Run) -> None:
    with locked(interrupted), pytest.raises(BadRun, match="another process is training"):
        resume(interrupted.folder)


def test_a_checkpoint_that_was_exchanged_is_refused(interrupted: Run) -> None:
    interrupted.update(architecture=interrupted.architecture.to_json() | {"num_layers": 7})
    with pytest.raises(BadRun, match=r"no longer the checkpoint that this run began with"):
        resume(interrupted.folder)


def test_divergence_stops_with_step_place_and_remedy(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d+: .* Try --lr 3\.3e\+01 \(now 1\.0e\+02\)") as found:
        train(checkpoint, text, tmp_path / "a", lr=100.0, warmup=0.0, checkpoint_every=1)
    run = Run.open(tmp_path / "a")
    assert run.status == FAILED and run.record["reason"] == str(found.value)
    assert not (run.folder / "baked.safetensors").exists()


def test_loss_that_is_not_finite_names_the_first_layer(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of one layer are spoilt in the fifth step; the checkpoint before it stays."""
    from rcpconv.train import loop

    plain, calls = loop.distill, []

    def spoiling(student: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * 5:
            student.layers[1].mlp.gate.weight.data[0, 0] = float("nan")
        return plain(student, *arguments)

    monkeypatch.setattr(loop, "distill", spoiling)
    with pytest.raises(TrainingDiverged, match=r"step 5: .* not finite \(parameter layers\.1\.mlp\.gate\.weight\)"):
        train(checkpoint, text, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-0000004.pt"]
    monkeypatch.undo()
    assert resume(tmp_path / "a").status == FINISHED


def test_gradient_that_is_not_finite_names_the_layer(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    from rcpconv.train import loop

    run = Run.open(train(checkpoint, text, tmp_path / "a", steps=1).folder)
    student = original_decoder(run.source()).requires_grad_(True)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    student.layers[0].attn.k.weight.grad[0, 0] = float("inf")
    assert loop.first_not_finite(student, tokens) == "first in the gradient of layers.0.attn.k.weight"
    student.layers[1].attn_norm.gain.data *= 1e38
    assert loop.first_not_finite(student, tokens).startswith("first in the output of layers.1.attn")


def test_a_compiler_that_changes_gradients_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stood in for by one that stops all gradients inside a layer, as torch 2.11 does on CUDA, and by a good one."""
    from rcpconv.model import DecoderLayer

    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(DecoderLayer, "compile", lambda self: None)
    assert train(checkpoint, text, tmp_path / "good", compile="on", steps=1).status == FINISHED

    def spoil(layer: Any) -> None:
        def stopped(x: torch.Tensor, *more: Any) -> torch.Tensor:
            return x + 0 * sum(p.sum() for p in layer.parameters()) + layer.forward(x, *more).detach() - x

        layer._compiled_call_impl = stopped  # where torch's compile leaves what it made

    monkeypatch.setattr(DecoderLayer, "compile", spoil)
    with pytest.raises(BadCompiler, match=r"torch\.compile of torch 2.* differs by 100% .* train with --compile off"):
        train(checkpoint, text, tmp_path / "bad", compile="on", steps=1)


def test_text_sampled_from_the_model_itself(checkpoint: Path, tmp_path: Path) -> None:
    run = quantize(str(checkpoint), SETTINGS | {"data": ("self",), "steps": 2}, out=tmp_path / "a")
    assert run is not None
    tokens = np.load(run.folder / "tokens" / "train.npy")
    assert len(tokens) == 2 * 2 * 2 * 24 / 2 and tokens[0] == run.tokenizer.bos_id
    assert len(set(tokens.tolist())) > 20


def test_sampled_text_among_other_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run = train(checkpoint, text, tmp_path / "mixed", data=("self", str(text)), self_share=0.25, steps=4)
    wanted = 4 * 2 * 2 * 24
    assert len(np.load(run.folder / "tokens" / "self.npy")) == wanted / 4 / 2
    assert len(np.load(run.folder / "tokens" / "train.npy")) == wanted + 24
    few = train(checkpoint, text, tmp_path / "few", data=("self",), self_tokens=50, steps=4)
    assert len(np.load(few.folder / "tokens" / "train.npy")) == 3 * 24  # whole sequences
    once = train(checkpoint, text, tmp_path / "once", data=("self",), self_epochs=1.0, steps=2)
    assert len(np.load(once.folder / "tokens" / "train.npy")) == 2 * 2 * 2 * 24


def test_other_forms(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Two tables, other widths, no rotations, 16-bit tables, every loss, checkpointing, accumulation."""
    shapes: list[dict[str, Any]] = [
        {"tables": "two", "head_bits": 16, "group_size": 64, "loss": "kl", "grad_checkpointing": "on"},
        {"r1": False, "r2": False, "r3": False, "r4": False, "embed_bits": 16, "head_bits": 16, "loss": "mix"},
        {"a_bits": 8, "kv_bits": 8, "grad_accum": 1, "temperature": 2.0, "weight_decay": 0.1},
        {"group_size_of": ("down_proj=64", "layers.1.q_proj=64", "layers.1.down_proj=128")},
    ]
    for i, settings in enumerate(shapes):
        run = train(checkpoint, text, tmp_path / str(i), steps=2, **settings)
        assert set(run.tensor_names()) == spec.expected_tensors(run.architecture, run.quantization).keys() - {
            "tokenizer.json"
        }
    assert run.quantization.group_size_overrides == {"layers.0.mlp.down": 64, "layers.1.attn.q": 64}
    export(run, tmp_path / "model.rcp")
    with RcpFile.open(tmp_path / "model.rcp") as file:
        groups = {name: file.linear(name).group_size for name in spec.linear_names(file.architecture)}
    assert {name for name, size in groups.items() if size == 64} == run.quantization.group_size_overrides.keys()


@pytest.mark.parametrize("bits", [{"a_bits": 16}, {"kv_bits": 16}])
def test_a_run_without_some_quantization_is_for_comparison_only(
    checkpoint: Path, text: Path, tmp_path: Path, reference: Run, bits: dict[str, int]
) -> None:
    run = train(checkpoint, text, tmp_path / "run", eval_data=str(text), max_eval_tokens=1000, **bits)
    assert metrics(run.folder)[0]["kl"] < metrics(reference.folder)[0]["kl"]
    run = Run.open(run.folder)
    windows = cut(tokenize(run.tokenizer_json, text.read_text()), run.evaluation["window"], 1000)
    decoder = baked_decoder(run.architecture, run.quantization, run.tensor)
    assert torch_perplexity(decoder, windows, "") == run.evaluation["perplexity"]["fake-quant"]
    with pytest.raises(BadRun, match="for comparison only; a file holds 4 or 8 of each"):
        export(run, tmp_path / "model.rcp")
    assert not (tmp_path / "model.rcp").exists()


def test_texts_that_will_not_do(checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(BadTrainingData, match="one sequence takes 24"):
        train(checkpoint, short, tmp_path / "a")
    assert not (tmp_path / "a").exists()  # so that the same place is free for the next attempt
    with pytest.raises(BadTrainingData, match=r"eval_data: nowhere\.txt: expected a text file"):
        train(checkpoint, short, tmp_path / "b", eval_data="nowhere.txt")
    with pytest.raises(BadTrainingData, match=r"nowhere\.txt: no such file or folder"):
        train(checkpoint, tmp_path / "nowhere.txt", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_metrics_are_json_lines(reference: Run) -> None:
    line = json.loads((reference.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line.keys() == {"step", "tokens", "loss", "kl", "grad_norm", "lr", "tokens_per_second"}


def test_a_dry_run_of_a_resumed_run_changes_nothing(interrupted: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.folder.rglob("*") if path.is_file()}
    assert quantize(None, {}, resume=str(interrupted.folder), dry_run=True, console=Console(quiet=True)) is None
    after = {path: path.stat().st_mtime_ns for path in interrupted.folder.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != "lock"} == {p: t for p, t in before.items() if p.name != "lock"}


def test_a_damaged_checkpoint_leaves_the_run_resumable(interrupted: Run) -> None:
    newest = interrupted.folder / "checkpoints" / "step-0000001.pt"
    newest.parent.mkdir(exist_ok=True)
    newest.write_bytes(b"")
    with pytest.raises(BadRun, match="delete it to resume from the one before"):
        resume(interrupted.folder)
    assert Run.open(interrupted.folder).status == RUNNING
    newest.unlink()
    resume(interrupted.folder)
    assert Run.open(interrupted.folder).status == FINISHED


def test_texts_that_fail_late_leave_no_new_run_but_keep_an_old_one(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the second line is found before any weights are read."""
    rows, copy = tmp_path / "rows.jsonl", tmp_path / "copy.txt"
    rows.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    shutil.copy(text, copy)
    monkeypatch.setattr("rcpconv.quantize.original_decoder", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(BadTrainingData, match=r"rows\.jsonl: line 2"):
        train(checkpoint, rows, tmp_path / "a")
    assert not (tmp_path / "a").exists()

    monkeypatch.setattr("rcpconv.train.beginning.cached", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        train(checkpoint, copy, tmp_path / "a")
    monkeypatch.undo()
    copy.unlink()
    with pytest.raises(BadTrainingData, match="no such file"):
        resume(tmp_path / "a")
    assert Run.open(tmp_path / "a").status == FAILED


def test_the_place_of_a_run_is_tried_before_the_model_is_looked_for(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "model"
    (tmp_path / "file").touch()
    with pytest.raises(NotSaved, match=r"file/a: cannot be written \(Not a directory\); choose another --out"):
        train(nowhere, tmp_path / "file", tmp_path / "file" / "a")
    with pytest.raises(CheckpointNotFound):
        train(nowhere, tmp_path / "file", tmp_path / "runs" / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_hostile_chat_template_ends_in_one_line_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    make_tiny_checkpoint("llama32", tmp_path / "hostile")
    (tmp_path / "hostile" / "chat_template.jinja").write_text(loop)
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    monkeypatch.setattr("rcpconv.train.chats.SECONDS", 1)
    with pytest.raises(BadTrainingData, match=r"chat\.jsonl: line 1: .*hostile: .* took longer than 1 s .* fix"):
        train(tmp_path / "hostile", tmp_path / "chat.jsonl", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_run_goes_on_from_any_folder(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are kept absolute; repeated settings may name the same file in another way."""
    shutil.copy(text, tmp_path / "text.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.txt").symlink_to("text.txt")
    (tmp_path / "tiny").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rcpconv.train.beginning.cached", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted):
        train(Path("tiny"), Path("text.txt"), Path("a"), eval_data="text.txt", max_eval_tokens=100, steps=2)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Run.open("../a").config
    assert config.data == (config.eval_data,) == (str(tmp_path / "text.txt"),)
    assert config.model == str(tmp_path / "tiny")
    with pytest.raises(BadRun, match="data: the run was started with"):
        resume(Path("../a"), data=("demo",))
    run = quantize("../tiny", {"data": ("../text.txt",), "eval_data": "../link.txt"}, resume="../a")
    assert run is not None and run.status == FINISHED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_the_first_step_it_says_how_to_go_on(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("rcpconv.train.beginning.prepare", lambda *_, **__: os.kill(os.getpid(), number))
    output = io.StringIO()
    with pytest.raises(Interrupted) as stopped:
        quantize(
            str(checkpoint),
            SETTINGS | {"data": (str(text),), "steps": 1},
            out=tmp_path / "a",
            console=Console(file=output),
        )
    assert stopped.value.signal_number == number
    command = f"rcpconv quantize --resume {tmp_path / 'a'}"
    assert command in output.getvalue().replace("\n", " ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert resume(tmp_path / "a").status == FINISHED


def test_the_peak_of_gpu_memory_is_kept_and_told(
    reference: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(reference.folder, tmp_path / "run")
    run, output = Run.open(tmp_path / "run"), io.StringIO()
    plan = make_plan(QuantizeConfig(model="m"), LLAMA_2_7B, False, supposed_machine(2, 100e9))
    for peak in (70 * 10**9, 60 * 10**9):  # the second after a stop
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", {plan.machine.device: peak}.__getitem__)
        _note_peak(run, plan, Console(file=output))
        assert json.loads((run.folder / "run.json").read_text())["peak_gpu_memory"] == 70 * 10**9
    assert output.getvalue().startswith("peak of GPU memory: 70.0 GB on each of 2 GPUs, ")


def test_files_of_a_run_have_the_usual_mode(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = train(checkpoint, text, tmp_path / "a", steps=1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes
