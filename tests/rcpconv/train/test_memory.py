"""What saves memory in training changes what it says it changes, and nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rcpconv.checkpoint import load_source
from rcpconv.config import QuantizeConfig
from rcpconv.errors import BadOption, BadRun
from rcpconv.export import export
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.prepare import original_decoder, prepare, student_decoder
from rcpconv.quantize import quantize
from rcpconv.quantizers.tables import int8_rows
from rcpconv.runs import Run
from rcpconv.train.losses import Distillation, distill
from rcpconv.train.memory import Int8Linear, LeanAdamW, StepInBackward, int8_teacher, narrow_weights
from rcpconv.train.optimizer import Together, make_optimizer, set_rates
from rcpconv.train.progress import read_metrics
from rcpconv.train.update import BLOCK, EightBits, noise_like, stochastic_bfloat16, write
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint

RATES = {"lr": 1e-3, "quantizer_lr": 1e-2, "clip_lr": 1e-2}
SETTINGS: dict[str, Any] = {
    "seq_len": 24,
    "batch_size": 2,
    "grad_accum": 1,
    "steps": 12,
    "lr": 1e-3,
    "log_every": 1,
    "device": "cpu",
}


def models(folder: Path, kind: str = "llama32", checkpointed: bool = False) -> tuple[Decoder, Decoder, torch.Tensor]:
    """Student, teacher, tokens."""
    make_tiny_checkpoint(kind, folder / kind)
    source = load_source(str(folder / kind))
    options = ComputeOptions(checkpoint_layers=checkpointed)
    prepared = prepare(source, one_table=source.tied_embeddings)
    student = student_decoder(prepared, Quantization(method="ldp"), options)
    tokens = torch.randint(290, (2, 16), generator=torch.Generator().manual_seed(0))
    return student, original_decoder(source), tokens


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"model": "m", "batch_size": 2, "grad_accum": 1} | RATES | settings)


def gradients(student: Decoder, teacher: Decoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    loss, _ = distill(student, teacher, tokens, Distillation(kind="kl"), 1.0)
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    return found | {"loss": loss}


@pytest.mark.parametrize(("kind", "compiled"), [("llama32", False), ("qwen3", False), ("llama32", True)])
def test_recomputed_activations_give_the_same_bits(tmp_path: Path, kind: str, compiled: bool) -> None:
    student, teacher, tokens = models(tmp_path, kind)
    if compiled:
        torch._dynamo.reset()
        for layer in student.layers:
            layer.compile(backend="aot_eager")
    expected = gradients(student, teacher, tokens)
    student.options.checkpoint_layers = True
    found = gradients(student, teacher, tokens)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("states", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_updates_in_the_backward_pass_are_the_usual_ones(tmp_path: Path, states: str, checkpointed: bool) -> None:
    student, teacher, tokens = models(tmp_path, checkpointed=checkpointed)
    other = copy.deepcopy(student)
    settings = {"optimizer_states": states, "weight_decay": 0.1}
    usual = make_optimizer(student, config(**settings))
    early = make_optimizer(other, config(**settings, step_in_backward="on"))
    assert isinstance(early, Together)
    stepping = StepInBackward(dict(other.named_parameters()), list(early.optimizers), clip=1e9)
    for step in range(3):
        set_rates(usual, 1 / (step + 1))
        set_rates(early, 1 / (step + 1))
        distill(student, teacher, tokens, Distillation(kind="kl"), 1.0)
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
        usual.step()
        usual.zero_grad()
        with stepping.attached():
            distill(other, teacher, tokens, Distillation(kind="kl"), 1.0)
        assert stepping.norm().item() == pytest.approx(norm.item(), rel=1e-6)
        assert all(p.grad is None for p in other.parameters())
        for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), (step, name)


def test_early_updates_clip_by_the_larger_of_the_last_norm_and_their_own() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    stepping = StepInBackward({"w": weight}, [optimizer], clip=1.0)
    for gradient, previous, expected in (
        (2.0, 0.0, 0.5),
        (2.0, 16.0, 0.125),
        (0.1, 0.0, 0.1),
        (float("inf"), 1.0, 0.0),
    ):
        stepping.previous = previous
        with torch.no_grad():
            weight.zero_()
        with stepping.attached():
            (weight * gradient).sum().backward()
        assert weight.detach().neg().tolist() == pytest.approx([expected] * 4, rel=1e-5)
    assert not stepping.norm().isfinite()


def test_lean_adamw_with_float32_states_is_adamw() -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(2))
    group = {"lr": 1e-2, "weight_decay": 0.1}
    usual = torch.optim.AdamW([{"params": [a], **group}], betas=(0.9, 0.95))
    lean = LeanAdamW([{"params": [b], **group}], (0.9, 0.95), "fp32", seed=0)
    for _ in range(5):
        a.grad = torch.randn(5000)
        b.grad = a.grad.clone()
        usual.step()
        lean.step()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("states", "far"), [("bf16", 0.03), ("int8", 0.15)])
def test_small_states_update_nearly_as_float32_ones(states: str, far: float) -> None:
    if states == "int8":
        pytest.importorskip("torchao")
    random = torch.Generator().manual_seed(0)
    shapes = [(64, 128), (10,)]
    found = []
    for kind in ("fp32", states):
        random.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = LeanAdamW([{"params": parameters, "lr": 1.0, "weight_decay": 0.0}], (0.9, 0.95), kind, seed=0)
        for step in range(20):
            if step == 10:  # and the states survive a checkpoint
                state = copy.deepcopy(optimizer.state_dict())
                groups = optimizer.param_groups
                optimizer = LeanAdamW(groups, (0.9, 0.95), kind, seed=0)
                optimizer.load_state_dict(state)
            for p in parameters:
                p.grad = 1e-4 * (0.3 + torch.randn(p.shape, generator=random))
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert (found[1] - found[0]).norm() < far * found[0].norm()


def stepped(shapes: list[tuple[int, int]], states: str) -> LeanAdamW:
    """After some updates."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = LeanAdamW([{"params": parameters, "lr": 1.0, "weight_decay": 0.0}], (0.9, 0.95), states, seed=0)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    return optimizer


def test_blocks_of_8_bit_states_lie_within_rows() -> None:
    pytest.importorskip("torchao")
    optimizer = stepped([(16, 512), (30, 192), (512, 24), (16, 64)], "int8")
    means = [each["mean"] for each in optimizer.state_dict()["moments"].values()]
    assert [tuple(each["scale"].shape) for each in means[:2]] == [(16, 2), (30, 3)]
    assert [each.dtype for each in means[2:]] == [torch.float32] * 2, "blocks of 8 values; and too few values"


def flat_slices(optimizer: LeanAdamW, size: int) -> dict[str, Any]:
    """state_dict as it was once: flat slices, and 8-bit ones in blocks of 256 whatever the rows."""

    def old(values: torch.Tensor, state: Any) -> list[Any]:
        parts = values.split(size)
        if not isinstance(state, EightBits):
            return [part.to(state.dtype) for part in parts]
        states = [
            EightBits(torch.zeros(n, BLOCK, dtype=torch.uint8), torch.zeros(n), state.table)
            for n in (len(part) // BLOCK for part in parts)
        ]
        for each, part in zip(states, parts, strict=True):
            write(each, part.view(-1, BLOCK))
        return [{"codes": each.codes.flatten(), "scale": each.scale_R} for each in states]

    moments = {}
    for place, p in enumerate(optimizer.param_groups[0]["params"]):
        values = optimizer.read(p).values()
        pairs = zip(*(old(*each) for each in zip(values, optimizer.moments[place], strict=True)), strict=True)
        moments[place] = list(pairs)
    return {"steps": optimizer.steps, "moments": moments}


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_states_as_they_were_once_written_are_read_by_one_process(states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if states == "int8":
        pytest.importorskip("torchao")
    monkeypatch.setattr("rcpconv.train.memory._SLICE", 4096)
    optimizer = stepped([(32, 256), (64, 192)], states)
    other = LeanAdamW(optimizer.param_groups, (0.9, 0.95), states, seed=0)
    old = flat_slices(optimizer, 4096)
    other.load_state_dict(old)
    assert other.steps == 3
    for p in optimizer.param_groups[0]["params"]:
        for name, expected in optimizer.read(p).items():
            near = 0.03 * float(expected.abs().max()) if states == "int8" else 0.0
            torch.testing.assert_close(other.read(p)[name], expected, rtol=0, atol=near)
    monkeypatch.setattr("rcpconv.distributed.processes", lambda: 2)
    with pytest.raises(BadRun, match="resume in one process"):
        other.load_state_dict(old)


def test_weights_are_rounded_to_bfloat16_with_the_right_mean() -> None:
    random = torch.Generator().manual_seed(0)
    for value in (0.3, -0.3, 1 + 2.0**-12):
        x = torch.full((100_000,), value)
        rounded = stochastic_bfloat16(x, noise_like(x, random))
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert len(rounded.unique()) == 2
        assert rounded.double().mean().item() == pytest.approx(value, rel=2e-5)


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = LeanAdamW([{"params": [weight], "lr": 1e-4, "weight_decay": 0.0}], (0.9, 0.95), "bf16", seed=3)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=4e-4)


def test_bfloat16_weights_give_the_same_losses_as_float32_weights_of_the_same_value(tmp_path: Path) -> None:
    student, teacher, tokens = models(tmp_path, "llama3")
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name.endswith(".weight"):
                p.copy_(p.bfloat16().float())
    expected = gradients(student, teacher, tokens)
    narrow_weights(student)
    found = gradients(student, teacher, tokens)
    assert student.layers[0].mlp.up.weight.dtype == student.embed.weight.dtype == torch.bfloat16
    assert student.layers[0].mlp.up.quantizer.beta.dtype == torch.float32
    assert torch.equal(found["loss"], expected["loss"])
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


@pytest.mark.parametrize("kind", ["llama32", "qwen2"])
def test_an_int8_teacher_is_near_the_original_and_smaller(tmp_path: Path, kind: str) -> None:
    _, teacher, tokens = models(tmp_path, kind)
    expected = teacher(tokens)
    before = sum(p.nbytes for p in teacher.parameters())
    int8_teacher(teacher)
    assert all(p.is_floating_point() for p in teacher.parameters()), "FSDP2 of torch 2.11 shares out no others"
    held = sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers()))
    assert held < 0.4 * before
    kl = torch.nn.functional.kl_div(
        teacher(tokens).log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    assert kl.sum(-1).mean() < 0.01


@pytest.mark.parametrize("width", [8, 7])
def test_an_int8_linear_keeps_every_integer(width: int) -> None:
    weight = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
    weight[:256, 0] = torch.arange(256) - 128.0  # beside a peak of 127, so every integer is there
    weight[:, 1] = 127.0
    linear = Int8Linear(weight, None)
    integers, scale = int8_rows(weight)
    assert linear.integers.shape == (300, width)
    assert torch.equal(linear.integers.float(), integers)
    assert torch.equal(copy.deepcopy(linear).to("cpu").integers, linear.integers)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    expected = x @ integers.T * scale
    torch.testing.assert_close(linear(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(linear, backend="aot_eager", fullgraph=True)(x), expected)


def test_smaller_chunks_of_logits_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, tokens = models(tmp_path)
    expected = gradients(student, teacher, tokens)
    monkeypatch.setattr("rcpconv.train.losses.CPU_CHUNK", 3 * 290)
    found = gradients(student, teacher, tokens)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


def train(checkpoint: Path, text: Path, out: Path, **settings: Any) -> Run:
    given = SETTINGS | {"data": (str(text),)} | settings
    run = quantize(str(checkpoint), given, out=out, runs=out.parent, console=Console(quiet=True))
    assert run is not None
    return run


LEAN = {
    "early": {"step_in_backward": "on", "grad_checkpointing": "on"},
    "bf16": {"step_in_backward": "on", "optimizer_states": "bf16", "teacher_weights": "int8"},
    "small": {"step_in_backward": "on", "optimizer_states": "bf16", "master_weights": "bf16"},
    "muon": {"step_in_backward": "on", "optimizer": "muon"},
}


@pytest.mark.parametrize("settings", LEAN.values(), ids=LEAN)
def test_lean_trainings_learn_and_go_on_from_their_checkpoints(
    checkpoint: Path, text: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(checkpoint, text, tmp_path / "whole", **settings)
    lines = read_metrics(whole.folder / "metrics.jsonl")
    assert lines[-1]["kl"] < 0.9 * lines[0]["kl"]
    assert export(whole, tmp_path / "model.rcp").nbytes > 0  # compares the file's weights with the trained ones

    from rcpconv.train.loop import Trainer

    update = Trainer._update

    def stopping(self: Trainer, loss: Any) -> None:
        if self.counters.step == 5:
            raise KeyboardInterrupt
        update(self, loss)

    with monkeypatch.context() as patched, pytest.raises(Exception, match="Stopped"):
        patched.setattr(Trainer, "_update", stopping)
        train(checkpoint, text, tmp_path / "stopped", **settings, checkpoint_every=4)
    run = quantize(None, {}, resume=str(tmp_path / "stopped"), runs=tmp_path, console=Console(quiet=True))
    assert run is not None
    for name in ("baked.safetensors", "weights.sha256.json"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_checkpoints_of_weights_alone_are_smaller_and_can_be_resumed(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcpconv.train import checkpoints

    states: list[dict[str, Any]] = []
    save = checkpoints.save

    def recording(run: Run, step: int, state: dict[str, Any], keep: int) -> None:
        save(run, step, state, keep)
        states.append(state)
        if step == 8 and len(states) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", recording)
    settings = {"checkpoint_contents": "weights", "checkpoint_every": 4}
    with pytest.raises(Exception, match="Stopped"):
        train(checkpoint, text, tmp_path / "run", **settings)
    assert all(state["optimizer"] is None and state["student"] for state in states)
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    run = quantize(None, {}, resume=str(tmp_path / "run"), runs=tmp_path, console=console)
    assert run is not None and run.status == "finished"
    assert "the optimizer's states begin anew" in console.export_text()
    lines = read_metrics(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[-1]["kl"] < 0.9 * lines[0]["kl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_in_backward": "on", "grad_accum": 2}, "grad_accum: 2, but step_in_backward"),
        ({"optimizer": "muon", "optimizer_states": "bf16"}, "optimizer_states: bf16 is for the optimizer adamw"),
        ({"ema": 0.9, "master_weights": "bf16"}, "ema: 0.9, but a mean of bf16 weights"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        QuantizeConfig(model="m", **settings)
