"""Training in several processes, over gloo on the CPU: as in one, also when they die."""

import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import rcpconv.__main__
import rcpconv.quantize
from rcpconv import distributed
from rcpconv import plan as planning
from rcpconv.checkpoint import load_source
from rcpconv.errors import BadCompiler, BadOption, BadRun, ProcessDied
from rcpconv.export import export
from rcpconv.layers import ComputeOptions
from rcpconv.model import DecoderLayer
from rcpconv.prepare import original_decoder, prepare, student_decoder
from rcpconv.quantize import quantize
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import FINISHED, ROTATIONS, RUNNING, Run
from rcpconv.train import checkpoints
from rcpconv.train.memory import LeanAdamW, int8_teacher, narrow_weights
from rcpconv.train.progress import read_metrics
from rcpconv.train.stopping import Interrupted
from rcpconv.train.update import update
from rcpformat.architecture import Quantization
from tiny_checkpoints import make_tiny_checkpoint

SETTINGS: dict[str, Any] = {
    "seq_len": 24,
    "batch_size": 2,
    "grad_accum": 2,
    "steps": 6,
    "lr": 1e-3,
    "log_every": 1,
    "checkpoint_every": 3,
    "device": "cpu",
}
MEASURED: dict[str, Any] = {"ema": 0.9, "max_eval_tokens": 200, "eval_every": 3}
OTHERWISE: dict[str, Any] = {
    "batch_size": 4,
    "grad_accum": 1,
    "tables": "two",
    "steps": 4,
    "ema": 0.9,
    "hidden_loss": 1.0,
    "start": "feedback",
    "weight_range": "fixed",
    "lr_scale": "relative",
    "grad_checkpointing": "on",
}


SMALLER: dict[str, Any] = {"master_weights": "bf16", "teacher_weights": "int8", "optimizer_states": "bf16"}
"""Weights narrower than the other parameters, and a teacher of integers."""
EARLY: dict[str, Any] = {"step_in_backward": "on", "batch_size": 4, "grad_accum": 1, "tables": "one"}


def forked(action: Callable[[], Any], log: Path, **variables: str) -> int:
    """The id of a child process that does it. Forking saves the import of torch, which takes seconds."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update(variables)
        with log.open("a", buffering=1) as output, redirect_stdout(output), redirect_stderr(output):
            try:
                action()
                code = 0
            except Interrupted:
                code = 3
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                raise
    finally:
        os._exit(code)


def together(count: int, action: Callable[[], Any], log: Path) -> list[int]:
    """Exit codes of as many processes as one training, each doing it."""

    def member() -> None:
        with distributed.joined():
            action()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    children = [forked(member, log, RANK=str(i), LOCAL_RANK=str(i), **where) for i in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def figures(folder: Path, steps: int | None = None) -> list[float]:
    """Of the first steps, or all."""
    lines = read_metrics(folder / "metrics.jsonl")[:steps]
    return [value for line in lines for key, value in line.items() if key != "tokens_per_second"]


@pytest.fixture(autouse=True)
def stage_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no room for weights that stay whole."""
    monkeypatch.setitem(planning._WITH_ROOM, "cpu", 0.0)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch, stage_3: None) -> None:
    monkeypatch.setitem(planning._WITH_ROOM, "cpu", 0.9)


@pytest.fixture
def train(checkpoint: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """Begins a run, or goes on with it, in so many processes, to the end or a stop."""

    def train(count: int, name: str = "run", **settings: Any) -> Path:
        folder = tmp_path / name

        def action() -> None:
            resume = str(folder) if folder.exists() else None
            quantize(
                None if resume else str(checkpoint),
                settings if resume else SETTINGS | {"data": (str(text),)} | settings,
                out=None if resume else folder,
                resume=resume,
                runs=tmp_path,
                console=Console(),
            )

        log = tmp_path / "log"
        codes = together(count, action, log)
        assert codes in ([0] * count, [3] * count), log.read_text()
        return folder

    return train


@pytest.fixture(scope="module")
def whole(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained by one process, without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = SETTINGS | MEASURED | {"data": (str(text),), "eval_data": str(text)}
    run = quantize(str(checkpoint), settings, out=folder, console=Console(quiet=True))
    assert run is not None
    return run


def test_two_processes_train_as_one(train: Callable[..., Path], whole: Run, text: Path, tmp_path: Path) -> None:
    run = Run.open(train(2, **MEASURED, eval_data=str(text)))
    assert figures(run.folder) == pytest.approx(figures(whole.folder), rel=2e-3)
    assert run.status == FINISHED and run.evaluation["tokens"] == whole.evaluation["tokens"]
    assert run.evaluation["perplexity"] == pytest.approx(whole.evaluation["perplexity"], rel=2e-3)
    assert export(run, tmp_path / "two.rcp").nbytes > 0  # compares the file's weights with the trained ones
    said = (tmp_path / "log").read_text()
    assert "ZeRO stage 3" in said
    assert said.count("step 6/6") == said.count("Finished") == 1


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(("stage", "batches"), [(2, {}), (1, {"batch_size": 1, "grad_accum": 4})])
def test_with_room_weights_stay_whole_for_a_batch_or_a_step(
    train: Callable[..., Path],
    whole: Run,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    batches: dict[str, int],
) -> None:
    """The teacher is not shared out, and layers of the student are not gathered twice."""
    sharded: list[Any] = []
    shard_layer = distributed._shard_layer

    def shard(layer: Any, mesh: Any, *, reshard_after_forward: bool = True) -> None:
        sharded.append(layer)
        assert len(sharded) <= whole.architecture.num_layers and not reshard_after_forward
        shard_layer(layer, mesh, reshard_after_forward=reshard_after_forward)

    monkeypatch.setattr(distributed, "_shard_layer", shard)
    run = train(2, **MEASURED, **batches, eval_data=str(text))
    assert figures(run) == pytest.approx(figures(whole.folder), rel=2e-3)
    assert f"ZeRO stage {stage}" in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("roomy")
def test_a_step_of_several_batches_shares_out_its_gradients_once(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With narrow weights too, which are a group of parameters each in attention and MLP."""
    monkeypatch.setattr(LeanAdamW, "_random", lambda *_: None)
    settings = SMALLER | {"batch_size": 1, "grad_accum": 6, "steps": 3, "checkpoint_every": 0}
    one = train(1, name="one", **settings)
    sharing = FSDPModule.set_requires_gradient_sync
    told: list[bool] = []

    def tell(model: Any, now: bool) -> None:
        told.append(now)
        assert told == ([False, False, True] * 3)[: len(told)]
        sharing(model, now)

    monkeypatch.setattr(FSDPModule, "set_requires_gradient_sync", tell)
    assert figures(train(2, **settings)) == pytest.approx(figures(one), rel=1e-2)
    assert "ZeRO stage 1" in (tmp_path / "log").read_text()


def test_two_processes_train_otherwise_as_one(train: Callable[..., Path]) -> None:
    one, two = train(1, name="one", **OTHERWISE), train(2, **OTHERWISE)
    assert figures(two) == pytest.approx(figures(one), rel=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scale": "relative", "grad_checkpointing": "on", "rotation_steps": 1},
        {"resample": 0.3, "resample_after": 0, "pull": 0.1, "freeze": 0.25},
        SMALLER | EARLY | {"loss": "kl", "quantizer_factor": 5.0, "clip_factor": 5.0},
        SMALLER | EARLY | {"lr": 5e-4},
        SMALLER | {"compile": "on", "lr_scale": "relative", "tables": "two"},
    ],
)
def test_settings_that_change_layers_give_two_processes_the_losses_of_one(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Narrow weights are rounded to nearest here, for each process has random numbers of its own.

    So what one of them decides grows: with narrow weights and early updates, other seeds differ by up to 6% after four
    steps at a rate of 1e-3. Layers alone are compiled, and run as they were traced; it takes seconds all the same.
    """
    compiled = torch.compile

    def trace(function: Any, **_: Any) -> Any:
        of_a_layer = isinstance(getattr(function, "__self__", None), DecoderLayer)
        return compiled(function, backend="eager") if of_a_layer else function

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr("rcpconv.train.update._compiled", lambda: update)
    monkeypatch.setattr(LeanAdamW, "_random", lambda *_: None)
    settings = settings | {"steps": 4, "checkpoint_every": 0}
    one, two = train(1, name="one", **settings | {"compile": "off"}), train(2, **settings)
    assert figures(two) == pytest.approx(figures(one), rel=1e-2)


def test_several_processes_refuse_to_pull_to_levels_of_a_fixed_range(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    def action() -> None:
        settings = SETTINGS | {"data": (str(text),), "pull": 0.1, "weight_range": "fixed"}
        with pytest.raises(BadOption, match=r"weight_range: fixed with pull or freeze .*; use moving"):
            quantize(str(checkpoint), settings, out=tmp_path / "run", runs=tmp_path, console=Console(quiet=True))

    assert together(2, action, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()


def test_several_processes_refuse_a_compiler_that_loses_gradients(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled_wrongly(self: DecoderLayer) -> None:
        self._compiled_call_impl = lambda x, *rest: self.forward(x, *rest).detach() + x * 0

    def action() -> None:
        settings = SETTINGS | {"data": (str(text),), "compile": "on"}
        with pytest.raises(BadCompiler, match=r"layers\.0\.input a gradient that differs by 100% from the one without"):
            quantize(str(checkpoint), settings, out=tmp_path / "run", runs=tmp_path, console=Console(quiet=True))

    monkeypatch.setattr(DecoderLayer, "compile", compiled_wrongly)
    assert together(2, action, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(
    train: Callable[..., Path], whole: Run, text: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rcpconv.train.loop.rate_factor", stop_at(3))
        folder = train(counts[0], **MEASURED, eval_data=str(text))
    assert Run.open(folder).status == RUNNING and len(read_metrics(folder / "metrics.jsonl")) == 4
    assert [path.is_dir() for path in (folder / "checkpoints").iterdir()] == [counts[0] > 1] * 2
    train(counts[1])
    assert Run.open(folder).status == FINISHED and not list((folder / "checkpoints").iterdir())
    assert figures(folder) == pytest.approx(figures(whole.folder), rel=2e-3)


LATE: dict[str, Any] = {"activations_from": 0.8}
"""Clips learn after the stop alone: until then they have no optimizer states."""
NARROW: dict[str, Any] = {"master_weights": "bf16", "optimizer_states": "bf16"}
RESUMED: dict[str, dict[str, Any]] = {
    "late": LATE,
    "mean": {"ema": 0.9, "loss": "cakld", "lr_scale": "relative"},
    "bf16": {"optimizer_states": "bf16"},
    "int8": {"optimizer_states": "int8"},
    "bf16 and a mean": {"optimizer_states": "bf16", "ema": 0.9},
    "bf16 weights": {"master_weights": "bf16"},
    "bf16 weights, int8": {"master_weights": "bf16", "optimizer_states": "int8", "tables": "two"},
    "early": LATE | {"step_in_backward": "on"},
    "all early": SMALLER | LATE | {"step_in_backward": "on", "optimizer_states": "int8"},
    "narrow early": NARROW | LATE | {"step_in_backward": "on"},
    "muon": {"optimizer": "muon", "lr": 1e-4},
    "early muon": {"optimizer": "muon", "lr": 1e-4, "step_in_backward": "on"},
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("narrow early", (2, 2)),
        ("bf16", (2, 3)),
        ("bf16", (1, 2)),
        *(slow(name, counts) for name in RESUMED for counts in ((2, 2), (2, 1), (1, 2), (2, 3), (3, 2))),
    ],
)
def test_every_kind_of_states_goes_on(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, counts: tuple[int, int]
) -> None:
    """In as many processes to the same bytes, in others to nearly the same figures.

    There, bf16 weights are rounded to nearest, for random numbers are others in each process, and Muon's updates are
    computed in bfloat16.
    """
    settings = {"batch_size": 6, "grad_accum": 1, "steps": 4, "checkpoint_every": 0} | RESUMED[name]
    if "int8" in settings.values():
        pytest.importorskip("torchao", reason="the extra low-memory is not installed")
    if counts[0] != counts[1]:
        monkeypatch.setattr(LeanAdamW, "_random", lambda *_: None)
    whole = train(counts[0], name="whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("rcpconv.train.loop.rate_factor", stop_at(1))
        folder = train(counts[0], **settings)
    train(counts[1])
    rough = 1e-2 if "bf16" in settings.values() or "muon" in settings.values() else 2e-3
    assert figures(folder) == pytest.approx(figures(whole), rel=rough)
    assert figures(folder, 3) == pytest.approx(figures(whole, 3), rel=2e-3), (
        "the third step is the first after the stop"
    )
    if counts[0] == counts[1]:
        assert figures(folder) == figures(whole)
        for file in ("baked.safetensors", "weights.sha256.json"):
            assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("counts", [(2, 1), slow((2, 2)), slow((1, 2))])
def test_rotations_go_on_in_another_number_of_processes(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]
) -> None:
    settings = {"rotation_steps": 4, "rotation_lr": 0.3, "steps": 1, "checkpoint_every": 0}
    whole = train(counts[0], name="whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("rcpconv.train.rotations.rate_factor", stop_at(1))
        folder = train(counts[0], **settings)
    assert not (folder / ROTATIONS).exists()
    train(counts[1])
    assert "Stopped after step 2 of 4 of the rotations" in (tmp_path / "log").read_text()
    assert "rotations: going on after step 2 of 4" in (tmp_path / "log").read_text()
    found, expected = (LearnedRotations.load(each / ROTATIONS) for each in (folder, whole))
    if counts[0] == counts[1]:
        assert (folder / ROTATIONS).read_bytes() == (whole / ROTATIONS).read_bytes()
    assert found.r1_CC is not None and expected.r1_CC is not None
    torch.testing.assert_close(found.r1_CC, expected.r1_CC, rtol=0, atol=1e-3)
    assert (expected.r1_CC - torch.eye(len(expected.r1_CC))).abs().max() > 0.1


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {prefix: state.double()}
    items = state.items() if isinstance(state, dict) else ()
    return {name: value for key, each in items for name, value in tensors(each, f"{prefix}.{key}").items()}


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in it, by their keys from the outermost one on."""
    path = checkpoints.newest(Run.open(folder))
    assert path is not None
    if path.is_dir():
        dcp_to_torch_save(path, folder / "whole.pt")
        path = folder / "whole.pt"
    return tensors(torch.load(path, weights_only=False))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("narrow early", (1, 2)),
        *(slow(name, counts) for name in ("int8", "bf16 weights, int8", "all early") for counts in ((1, 2), (2, 1))),
    ],
)
def test_states_are_the_same_in_another_number_of_processes(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, counts: tuple[int, int]
) -> None:
    """After the first step with them, weights and states are those of a training without a stop.

    But for a rounding here and there. Where a step's states are those of the step before, they are 0.2 to 0.6 off.
    """
    settings = {"batch_size": 6, "grad_accum": 1, "steps": 4, "checkpoint_every": 0} | RESUMED[name]
    if "int8" in settings.values():
        pytest.importorskip("torchao", reason="the extra low-memory is not installed")
    monkeypatch.setattr(LeanAdamW, "_random", lambda *_: None)

    def until(step: int, count: int, name: str, **settings: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("rcpconv.train.loop.rate_factor", stop_at(step))
            return train(count, name=name, **settings)

    expected = last_checkpoint(until(2, counts[0], "without", **settings))
    until(1, counts[0], "with", **settings)
    found = last_checkpoint(until(2, counts[1], "with"))
    assert found.keys() == expected.keys()
    kinds: dict[str, list[str]] = {}
    for key in expected:
        of, last = key.split(".")[1], key.rpartition(".")[2]
        kinds.setdefault(f"{of} {last}" if last in ("codes", "scale") else of, []).append(key)
    assert {"student", "optimizer"} <= kinds.keys()
    for kind, keys in kinds.items():
        difference = sum(float((found[key] - expected[key]).square().sum()) for key in keys)
        size = sum(float(expected[key].square().sum()) for key in keys)
        assert difference**0.5 < (1e-4 if kind == "student" else 1e-2) * size**0.5, kind


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("contents", [("weights", "weights"), ("all", "weights"), ("weights", "all")])
@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_contents_of_checkpoints_may_change(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    states: str,
    contents: tuple[str, str],
    counts: tuple[int, int],
) -> None:
    """A checkpoint of weights alone begins with new states, in any number of processes as in one."""
    settings = {"batch_size": 6, "grad_accum": 1, "steps": 5, "checkpoint_every": 0, "optimizer_states": states} | LATE

    def resumed(name: str, before: str, after: str, counts: tuple[int, int]) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("rcpconv.train.loop.rate_factor", stop_at(2))
            train(counts[0], name=name, **settings, checkpoint_contents=before)
        return train(counts[1], name=name, checkpoint_contents=after)

    expected = figures(resumed("one", contents[0], contents[0], (1, 1)))
    assert figures(resumed("run", *contents, counts)) == pytest.approx(expected, rel=2e-3)


def test_muon_goes_on_in_one_process(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its updates are computed in bfloat16: in another order they are others by percents, and so are the losses."""
    settings = {"optimizer": "muon", "lr": 1e-4, "steps": 5, "checkpoint_every": 0}
    whole = train(1, name="one", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("rcpconv.train.loop.rate_factor", stop_at(2))
        folder = train(2, **settings)
    train(1)
    one, two = (read_metrics(path / "metrics.jsonl") for path in (whole, folder))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=3e-2)


def stop_at(step: int) -> Callable[..., float]:
    """rate_factor that asks the last process to stop in this step, 0-based."""
    from rcpconv.train.optimizer import rate_factor

    def factor(at: int, *rest: Any) -> float:
        if at == step and distributed.rank() == distributed.processes() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate_factor(at, *rest)

    return factor


def test_a_damaged_part_of_a_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "processes", lambda: 2)
        patch.setattr(distributed, "wait_for_all", lambda: None)
        for step in range(3):
            checkpoints.save(run, step, {"weight": torch.full((5,), step), "counters": {"step": step}}, keep=2)

    def like(_: object) -> dict[str, Any]:
        return {"weight": torch.zeros(5, dtype=torch.long), "counters": {"step": 0}}

    newest = checkpoints.newest(run)
    assert newest is not None and [path.name for path in sorted(newest.parent.iterdir())] == [
        "step-0000001",
        "step-0000002",
    ]
    state = checkpoints.load(newest, like)
    assert state["counters"] == {"step": 2} and state["weight"].tolist() == [2] * 5
    next(newest.glob("*.distcp")).unlink()
    with pytest.raises(BadRun, match=r"step-0000002: cannot be read \(.*distcp.*delete it to resume"):
        checkpoints.load(newest, like)
    for damaged in (b"", b"no pickle", (newest / ".metadata").read_bytes()[:-40]):
        (newest / ".metadata").write_bytes(damaged)
        with pytest.raises(BadRun, match=r"step-0000002: cannot be read \(.*delete it to resume"):
            checkpoints.load(newest, like)


@pytest.mark.parametrize("settings", [{}, SMALLER])
def test_no_process_holds_more_than_its_part_and_two_layers(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """While models are made, and when the trained one is baked; beside the tables. The second layer is for a cache."""
    layers, folder = 8, tmp_path / "tiny"
    make_tiny_checkpoint("llama32", folder, num_hidden_layers=layers)
    source = load_source(str(folder))
    student, teacher = (
        student_decoder(prepare(source), Quantization(method="ldp"), ComputeOptions()),
        original_decoder(source),
    )
    whole, tables = nbytes(student.layers[0]), 2 * nbytes(student.embed)
    if settings:
        narrow_weights(student)
        teacher = int8_teacher(teacher)
    parts = [nbytes(model.layers[0]) / 2 for model in (student, teacher)]
    made: list[tuple[int, int]] = []
    """How many layers have been begun, and what is held."""
    baked: list[int] = []

    def action() -> None:
        gc.freeze()  # what was there before does not count
        everything = SETTINGS | {"steps": 1, "checkpoint_every": 0, "data": (str(text),)} | settings
        quantize(str(folder), everything, out=tmp_path / "run", runs=tmp_path, console=Console(quiet=True))
        (tmp_path / f"held-{distributed.rank()}").write_text(json.dumps((made, baked)))

    before_calls(monkeypatch, DecoderLayer, "__init__", lambda: made.append((made[-1][0] + 1 if made else 1, held())))
    before_calls(monkeypatch, distributed, "fully_shard", lambda: made.append((made[-1][0], held())))
    before_calls(monkeypatch, distributed, "gathered", lambda: baked.append(held()))
    before_calls(monkeypatch, rcpconv.quantize, "bake_piece", lambda: baked.append(held()))
    assert together(2, action, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    for i in range(2):
        made, baked = json.loads((tmp_path / f"held-{i}").read_text())
        assert made[-1][0] == 2 * layers
        for begun, found in made:
            own = min(begun, layers) * parts[0] + max(0, begun - layers) * parts[1]
            assert own / 2 < found < own + 2 * whole + tables, (begun, found)
        assert max(baked) < baked[0] + 2 * whole + tables


def before_calls(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, act: Callable[[], Any]) -> None:
    """Have this done whenever the function is called."""
    called = getattr(place, name)

    def function(*arguments: Any, **more: Any) -> Any:
        act()
        return called(*arguments, **more)

    monkeypatch.setattr(place, name, function)


def nbytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def held() -> int:
    """Bytes of all tensors that Python knows of in this process."""
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not isinstance(each, DTensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_sequences_are_divided_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found += distributed.own_sequences(100, 4, 6)
    assert [count for _, count in found] == [4] * 6
    assert [start for start, _ in found] == list(range(100, 124, 4))
    assert distributed.own_sequences(0, 2, 3) == [(4, 2)]
    assert distributed.own_sequences(0, 5, 3) == [(10, 5)]
    with pytest.raises(BadOption, match="3 processes"):
        distributed.own_sequences(0, 4, 2)


def test_a_killed_process_ends_the_job_and_is_named(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def member() -> None:
        with distributed.joined():
            quantize(str(checkpoint), SETTINGS | {"data": (str(text),)}, out=tmp_path / "run", console=Console())

    def job() -> None:
        def factor(*_: Any) -> float:
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rcpconv.train.loop.rate_factor", factor)
            distributed.launch(2, member, start_method="fork")

    start = time.monotonic()
    child = forked(job, tmp_path / "log")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99
    said = (tmp_path / "log").read_text()
    assert f"{ProcessDied.__name__}: process 1 of 2 was ended by SIGKILL" in said, said
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("processes", "code", "ends"), [("2", 0, True), ("2", None, True), ("2", 1, False), ("1", 0, False)]
)
def test_one_of_several_processes_ends_without_taking_down_threads(
    monkeypatch: pytest.MonkeyPatch, processes: str, code: int | None, ends: bool
) -> None:
    ended: list[int] = []

    def main(prog_name: str) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(rcpconv.__main__, "main", main)
    for name, value in (("WORLD_SIZE", processes), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit):  # what follows an _exit that does nothing
        rcpconv.__main__.run()
    assert ended == [0] * ends
