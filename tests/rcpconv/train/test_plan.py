"""The plan: settings decided from model and machine, estimates, refusals, the dry run."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from rcpconv import estimate
from rcpconv import plan as planning
from rcpconv.cli import main
from rcpconv.config import QuantizeConfig, read_recipe
from rcpconv.errors import BadOption, BadTrainingData, NotEnoughMachine
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder, build_pieces
from rcpconv.parts import TrainingParts
from rcpconv.plan import Machine, Plan, look_at_machine, make_plan, supposed_machine
from rcpconv.quantize import quantize
from rcpconv.runs import ROTATIONS
from rcpformat.architecture import Architecture
from shapes import DEMO, LLAMA_2_7B, LLAMA_2_70B, LLAMA_31_405B, LLAMA_32_1B, LLAMA_32_3B, WIKI_22M

CPU = Machine(device="cpu", name="CPU, 2 threads", memory_bytes=16 * 10**9, flops=1e11)
H200 = Machine(device="cuda:0", name="H200", memory_bytes=149 * 10**9, flops=7.5e14, compiles=True)

RESULTS = Path(__file__).parents[3] / "examples" / "benchmarks" / "results"
MEASURED = {
    "wiki-llama-22m": (WIKI_22M, True),
    "llama-3.2-1b": (LLAMA_32_1B, True),
    "llama-3.2-3b": (LLAMA_32_3B, True),
    "llama-2-7b": (LLAMA_2_7B, False),
}


def plan(architecture: Architecture, machine: Machine, tied: bool = False, **settings: Any) -> Plan:
    return make_plan(QuantizeConfig(**{"model": "m"} | settings), architecture, tied, machine)


def test_open_settings_are_decided_from_model_and_machine() -> None:
    config = plan(LLAMA_2_7B, H200).config
    assert (config.lr, config.quantizer_lr, config.clip_lr) == (2e-5, 2e-4, 2e-4)
    assert plan(LLAMA_2_7B, H200, lr=3e-4).config.clip_lr == 3e-3  # in floats, ten times 3e-4 is 0.0029999999999999996
    assert (config.seq_len, config.tokens, config.data) == (2048, 20_000_000, ("default",))
    assert (config.device, config.precision, config.compile, config.tables) == ("cuda:0", "bf16", "on", "two")
    assert config.grad_checkpointing == "on" and config.batch_size * config.grad_accum == 8
    config = plan(DEMO, CPU, tied=True, model="demo", steps=5).config
    assert config.lr == pytest.approx(2e-5 * (4096 / 192) ** 1.5, rel=0.05)
    assert (config.seq_len, config.tokens, config.steps, config.data) == (1024, None, 5, ("demo",))
    assert (config.device, config.precision, config.compile, config.tables) == ("cpu", "fp32", "off", "one")
    assert (config.grad_checkpointing, config.batch_size, config.grad_accum) == ("off", 8, 1)


def test_the_papers_recipe_has_these_rates() -> None:
    """Where the defaults' rates change, the recipe needs a way to keep its own."""
    for width, rates in ((LLAMA_2_7B, (2e-5, 2e-4, 2e-4)), (DEMO, (0.002, 0.02, 0.02))):
        config = plan(width, CPU, **read_recipe("paper")).config
        assert (config.lr, config.quantizer_lr, config.clip_lr, config.table_lr) == (*rates, None)


def test_groups_of_some_linears_are_of_another_size() -> None:
    common = plan(DEMO, CPU, steps=1)
    down = plan(DEMO, CPU, steps=1, group_size_of=("down_proj=64",))
    assert down.quantization.group_size_overrides == {f"layers.{i}.mlp.down": 64 for i in range(4)}
    assert down.quantization.group_sizes == (128, 64)
    # 480 columns: 4 groups, or 8, of 4 levels of a byte for each row.
    assert down.sizes.total_bytes - common.sizes.total_bytes == pytest.approx(4 * 192 * (8 - 4) * 4, rel=0.05)
    assert estimate.parameters(DEMO, down.quantization)[1] > estimate.parameters(DEMO, common.quantization)[1]
    last = plan(DEMO, CPU, steps=1, group_size=64, group_size_of=("q_proj=128", "layers.2.q_proj=64", "k_proj=64"))
    assert last.quantization.group_size_overrides == {f"layers.{i}.attn.q": 128 for i in (0, 1, 3)}
    with pytest.raises(BadOption, match=r"group_size_of: layers.4.q_proj=64, but the model has layers 0 to 3"):
        plan(DEMO, CPU, group_size_of=("layers.4.q_proj=64",))


def test_learning_rotations_takes_time() -> None:
    common, learning = (plan(DEMO, CPU, steps=10, grad_accum=2, rotation_steps=n) for n in (0, 10))
    assert 2 * common.seconds < learning.seconds < 3 * common.seconds
    shown = io.StringIO()
    learning.show_summary(Console(file=shown, width=400))
    assert "tokens after 10 for the rotations, about" in shown.getvalue()
    assert plan(DEMO, CPU, method="rtn").seconds == 0


def test_a_share_of_the_tokens_learns_rotations_where_that_is_worth_it_and_fits() -> None:
    def rotations(architecture: Architecture, machine: Machine, **settings: Any) -> tuple[int, int, int]:
        made = plan(architecture, machine, **({"rotation_share": 0.1, "seq_len": 100} | settings))
        assert made.config.rotation_steps is not None
        again = make_plan(made.config, architecture, settings.get("tied", False), machine)
        assert again == made, "as a resumed run has it"
        assert bool(made.rotation_batch) == bool(made.rotation_memory) == bool(made.config.rotation_steps)
        return made.config.rotation_steps, made.rotation_tokens, made.steps

    batches = {"batch_size": 4, "grad_accum": 2}
    assert rotations(DEMO, CPU, tokens=240_000, **batches) == (30, 24_000, 270)
    assert rotations(DEMO, CPU, steps=300, **batches) == (30, 24_000, 300)  # beside the steps that are asked for
    assert rotations(DEMO, CPU, steps=190, **batches) == (0, 0, 190)  # not as much as 20 steps
    assert rotations(DEMO, CPU, tokens=240_000, batch_size=512, tied=True) == (0, 0, 5)
    assert rotations(DEMO, CPU, tokens=240_000, grad_accum=100, tied=True) == (0, 0, 24)
    assert rotations(DEMO, CPU, tokens=240_000, r1=False, r2=False, **batches) == (0, 0, 300)
    assert rotations(DEMO, CPU, tokens=240_000, r1=False, r2=False, rotation_steps=9, **batches) == (0, 0, 300)
    assert rotations(DEMO, CPU, tokens=240_000, rotation_steps=10, **batches) == (10, 8_000, 290)
    assert rotations(DEMO, CPU, tokens=240_000, rotation_steps=10, rotation_share=0.0, **batches) == (10, 8_000, 290)
    assert rotations(DEMO, CPU, tokens=240_000, method="rtn", **batches) == (0, 0, 0)
    assert rotations(DEMO, CPU, tokens=240_000_000, **batches)[1] == 5_000_000
    assert rotations(LLAMA_2_7B, H200)[0] > 0
    assert rotations(LLAMA_32_1B, supposed_machine(64, 139 * 2**30), tokens=5_000_000, seq_len=2048, tied=True)[0] == 0
    low: dict[str, Any] = {"low_memory": True, "rotation_share": 0.1}
    big = plan(LLAMA_2_70B, supposed_machine(8, 139 * 2**30), **low)
    assert big.config.rotation_steps == 0 and big.rotations_need > 4 * 69e9
    shown = io.StringIO()
    big.show_summary(Console(file=shown, width=400))
    assert "rotations stay Hadamard's: learning them would take 398.1 GB of each device's memory" in shown.getvalue()
    assert big.memory == plan(LLAMA_2_70B, supposed_machine(8, 139 * 2**30), low_memory=True).memory


def test_rotations_are_learned_in_batches_of_their_own() -> None:
    """Weights are turned for each batch anew, so that they are as large as memory lets them."""
    whole = plan(LLAMA_2_7B, supposed_machine(8, 139 * 2**30), rotation_steps=1)
    assert whole.config.batch_size == 1 and whole.rotation_batch == 1  # of a step's 8 sequences, each GPU has one
    settings: dict[str, Any] = {"rotation_steps": 1, "batch_size": 1, "grad_accum": 8}
    one, small = (plan(LLAMA_2_7B, supposed_machine(1, gib * 2**30), **settings) for gib in (139, 64))
    assert one.rotation_batch == 8 > small.rotation_batch > 0
    assert one.seconds < small.seconds
    other = one.config.changed(optimizer_states="int8", hidden_loss=0.5, master_weights="bf16")  # of the training
    form = one.architecture, one.quantization, "cuda"
    assert estimate.rotation_memory(other, *form, 8) == one.rotation_memory


def test_one_table_has_a_matrix_where_r1_is_learned() -> None:
    def matrix(**settings: Any) -> bool:
        return plan(
            DEMO, CPU, **({"tied": True, "steps": 300, "rotation_share": 0.1} | settings)
        ).architecture.head_matrix

    assert matrix() and matrix(rotation_share=0.0, rotation_steps=1)
    assert not any(
        matrix(**settings)
        for settings in ({"rotation_share": 0.0}, {"rotation_steps": 0}, {"tables": "two"}, {"r1": False}, {"steps": 0})
    )


def test_a_step_has_as_many_sequences_as_are_asked_for() -> None:
    for sequences in (1, 4, 12, 16):
        config = plan(DEMO, CPU, tied=True, model="demo", steps=5, step_sequences=sequences).config
        assert config.batch_size * config.grad_accum == sequences


def test_rates_are_in_proportion_to_the_models_or_to_the_weights_rate() -> None:
    factors = {"lr_factor": 2.0, "quantizer_factor": 5.0, "clip_factor": 0.5}
    config = plan(LLAMA_2_7B, H200, **factors).config
    assert (config.lr, config.quantizer_lr, config.clip_lr) == (4e-5, 2e-4, 2e-5)
    config = plan(LLAMA_2_7B, H200, **factors, lr=1e-3, clip_lr=0.1).config
    assert (config.lr, config.quantizer_lr, config.clip_lr) == (1e-3, 5e-3, 0.1)


def test_a_decided_plan_decides_the_same_again() -> None:
    """As a resumed run does, from its saved recipe."""
    first = plan(LLAMA_2_7B, H200)
    again = make_plan(first.config, LLAMA_2_7B, False, H200)
    assert again == first


@pytest.mark.parametrize("settings", [{"method": "rtn", "tokens": 10**9, "data": ("self",)}, {"steps": 0}])
def test_without_training_there_are_no_steps_no_texts_and_little_memory(settings: dict[str, Any]) -> None:
    found = plan(LLAMA_2_7B, CPU, **settings)
    assert (found.steps, found.seconds, found.checkpoint_bytes) == (0, 0, 0)
    assert (found.config.steps, found.config.tokens, found.config.data) == (0, None, ())
    assert found.memory_bytes < plan(LLAMA_2_7B, CPU).memory_bytes / 3
    assert make_plan(found.config, LLAMA_2_7B, False, CPU) == found


def test_given_settings_stay() -> None:
    given = {"batch_size": 3, "grad_accum": 5, "seq_len": 100, "lr": 1e-4, "grad_checkpointing": "on", "tokens": 30_000}
    found = plan(DEMO, CPU, **given)
    assert {name: getattr(found.config, name) for name in given} == given
    assert found.tokens_per_step == 1500 and found.steps == 20
    assert plan(DEMO, CPU, grad_accum=4).config.batch_size == 2
    assert plan(DEMO, CPU, batch_size=4).config.grad_accum == 2


SAVINGS = ("step_in_backward", "optimizer_states", "teacher_weights", "master_weights")
NOTHING_SAVED = ("off", "fp32", "full", "fp32")


def one_gpu(gib: float, **settings: Any) -> tuple[Plan, tuple[str, ...]]:
    found = plan(LLAMA_2_7B, supposed_machine(1, gib * 2**30), **settings)
    return found, tuple(getattr(found.config, name) for name in SAVINGS)


@pytest.mark.parametrize(
    ("gib", "low_memory", "savings", "batch"),
    [
        (180, False, NOTHING_SAVED, 8),
        (139, False, ("on", "fp32", "full", "fp32"), 8),
        (80, True, ("on", "bf16", "int8", "fp32"), 4),
        (48, True, ("on", "int8", "int8", "bf16"), 2),
    ],
)
def test_memory_decides_what_is_saved(gib: float, low_memory: bool, savings: tuple[str, ...], batch: int) -> None:
    found, chosen = one_gpu(gib, low_memory=low_memory)
    assert chosen == savings and found.config.batch_size == batch
    assert found.memory_bytes <= 0.85 * gib * 2**30
    again = make_plan(found.config, LLAMA_2_7B, False, supposed_machine(1, gib * 2**30))
    assert again == found


def test_low_memory_rounds_states_rather_than_make_steps_of_tiny_batches() -> None:
    two = supposed_machine(2, 80 * 2**30)
    found = plan(LLAMA_2_7B, two, low_memory=True, step_sequences=16).config
    assert (found.batch_size, found.grad_accum, found.optimizer_states, found.teacher_weights) == (8, 2, "bf16", "full")
    found = plan(LLAMA_2_7B, two, step_sequences=16).config
    assert (found.batch_size, found.grad_accum, found.optimizer_states) == (1, 16, "fp32")


def test_what_fits_is_trained_as_before() -> None:
    for architecture in (DEMO, LLAMA_32_1B, LLAMA_32_3B):
        found = plan(architecture, H200).config
        assert tuple(getattr(found, name) for name in SAVINGS) == NOTHING_SAVED
        assert found.batch_size * found.grad_accum == 8


def test_without_low_memory_nothing_is_rounded_and_the_refusal_names_it(tmp_path: Path) -> None:
    found, chosen = one_gpu(48)
    assert chosen == ("on", "fp32", "full", "fp32")
    with pytest.raises(NotEnoughMachine, match=r"of free memory, or use --low-memory, a smaller model"):
        found.require_machine(tmp_path)


def test_given_savings_stay_and_8_bits_need_their_library() -> None:
    _, chosen = one_gpu(48, low_memory=True, optimizer_states="bf16", grad_accum=4)
    assert chosen == ("off", "bf16", "int8", "bf16")
    _, chosen = one_gpu(48, low_memory=True, optimizer="muon")
    assert chosen == ("on", "fp32", "int8", "fp32")
    small = dataclasses.replace(H200, memory_bytes=48 * 2**30)
    assert plan(LLAMA_2_7B, small, low_memory=True).config.optimizer_states == "bf16"
    with pytest.raises(BadOption, match=r"int8 needs torchao: pip install 'rcpconv\[low-memory\]'"):
        plan(LLAMA_2_7B, H200, optimizer_states="int8")


def test_every_saving_saves_and_says_what() -> None:
    none = dict(zip(SAVINGS, NOTHING_SAVED, strict=True)) | {"batch_size": 1, "grad_accum": 1}
    before = plan(LLAMA_2_7B, H200, **none).memory
    for name, value, term, share in (
        ("step_in_backward", "on", "gradients", 0.03),
        ("optimizer_states", "bf16", "optimizer", 0.5),
        ("teacher_weights", "int8", "original model", 0.51),
        ("master_weights", "bf16", "weights", 0.5),
    ):
        after = plan(LLAMA_2_7B, H200, **none | {name: value}).memory
        assert after[term] / before[term] == pytest.approx(share, rel=0.05), name
        assert sum(after.values()) < sum(before.values())


def test_checkpoints_of_weights_alone_are_a_third() -> None:
    sizes = [plan(LLAMA_2_7B, H200, checkpoint_contents=kind).checkpoint_bytes for kind in ("all", "weights")]
    assert sizes[0] == pytest.approx(83e9, rel=0.02) and sizes[1] == pytest.approx(sizes[0] / 3)


@pytest.mark.parametrize(("architecture", "gpus"), [(LLAMA_2_70B, 16), (LLAMA_31_405B, 64)])
def test_over_many_gpus_weights_are_spread(architecture: Architecture, gpus: int) -> None:
    settings = {"batch_size": 1, "grad_accum": gpus, "tokens": 2048 * 4 * gpus}
    one, many = (plan(architecture, supposed_machine(n, 80 * 2**30), **settings) for n in (1, gpus))
    for name in ("weights", "quantizers", "optimizer", "original model"):
        assert many.memory[name] == pytest.approx(one.memory[name] / gpus, rel=1e-6)
    assert many.memory["activations"] <= one.memory["activations"]  # with fewer gradients, another moment is the peak
    assert many.tokens_per_step == one.tokens_per_step and many.steps == one.steps == 4
    assert one.seconds / gpus <= many.seconds < one.seconds and many.config.step_in_backward == "off"


def test_models_that_are_whole_at_the_start_count_on_each_gpu(tmp_path: Path) -> None:
    student, teacher = 4 * 69e9, 2 * 69e9

    def eight(**settings: Any) -> Plan:
        return plan(LLAMA_2_70B, supposed_machine(8, 139 * 2**30), low_memory=True, **settings)

    spread = eight()
    assert spread.memory_bytes < 0.9 * spread.machine.memory_bytes and spread.memory["weights"] < student / 7
    for settings in ({"start": "data"}, {"start": "feedback"}):
        found = eight(teacher_weights="full", **settings)
        assert found.memory["weights"] == pytest.approx(student, rel=0.01)
        assert found.memory["original model"] == pytest.approx(teacher, rel=0.01)
        with pytest.raises(NotEnoughMachine, match="GB are needed"):
            found.require_machine(tmp_path)
    learning = eight(teacher_weights="full", rotation_steps=1)
    assert learning.memory["weights"] < student / 7
    assert learning.rotation_memory["weights"] == pytest.approx(student, rel=0.01)
    needed = "GB are needed to learn rotations: use --rotation-steps 0, or a device with more"
    with pytest.raises(NotEnoughMachine, match=needed):
        learning.require_machine(tmp_path)
    (tmp_path / ROTATIONS).touch()
    assert "rotations" not in str(learning.shortages(tmp_path))
    writing = eight(teacher_weights="full", data=("self",))
    assert writing.memory["original model"] == pytest.approx(teacher, rel=0.01) and not writing.memory["weights"]
    one = {"batch_size": 1, "grad_accum": 1, "grad_checkpointing": "on"}
    alone = [
        plan(LLAMA_2_7B, H200, **one, **settings).memory for settings in ({}, {"start": "data"}, {"data": ("self",)})
    ]
    assert alone[0] == alone[1] == alone[2]


def test_weights_stay_whole_for_a_step_where_gpus_have_room() -> None:
    def over(gpus: int, gib: float, architecture: Architecture = LLAMA_32_1B, **settings: Any) -> Plan:
        return plan(architecture, supposed_machine(gpus, gib * 2**30), tokens=2048 * 64, **settings)

    roomy, tight = over(2, 140), over(2, 14)
    assert (roomy.zero_stage, tight.zero_stage, over(1, 140).zero_stage) == (2, 3, 3)
    stage_3 = estimate.memory(roomy.config, roomy.architecture, roomy.quantization, "cuda", 2)
    assert roomy.memory_bytes > sum(stage_3.values())
    assert roomy.memory["original model"] == 2 * stage_3["original model"]
    for name in ("weights", "optimizer", "gradients", "activations"):
        assert roomy.memory[name] == stage_3[name]
    assert over(2, 140, start="data").zero_stage == 3  # these shard late
    several = over(2, 140, step_sequences=32)
    assert (several.config.batch_size, several.config.grad_accum, several.zero_stage) == (8, 4, 1)
    stage_2 = estimate.memory(several.config, several.architecture, several.quantization, "cuda", 2, zero_stage=2)
    gradients = several.memory["working space"] - stage_2["working space"]
    assert gradients == pytest.approx(2 * (several.memory["weights"] + several.memory["quantizers"]), rel=1e-3)
    assert several.memory | {"working space": 0} == stage_2 | {"working space": 0}
    assert over(2, 88, step_sequences=32).zero_stage == 2
    assert several.seconds < 4.1 * roomy.seconds
    assert over(8, 139, LLAMA_2_70B, low_memory=True).zero_stage == 3


def test_a_dry_run_needs_neither_gpus_nor_weights(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    arguments = ["quantize", str(tmp_path), "--gpu-memory", "48"]
    result = CliRunner().invoke(main, [*arguments, "--gpus", "4", "--dry-run"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for part in (
        "estimate, calibrated by 5 measurements",
        "bytes of each GPU",
        "4 GPUs of 51.5 GB, supposed",
        "steps of 2 × 4 sequences × 128",
    ):
        assert part in result.output, (part, result.output)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "are what --dry-run plans for" in result.output


def test_measurements_scale_what_is_not_certain() -> None:
    c = plan(LLAMA_2_7B, H200).config
    doubled = estimate.Calibration(
        device="H200",
        memory={"eager": 3.0, "compiled": 2.0},
        seconds={"eager": 3.0, "compiled": 2.0},
        measured=({"case": "x"},),
    )
    theory, scaled = (
        estimate.memory(c, LLAMA_2_7B, planning.quantization_of(c, LLAMA_2_7B), "cuda", factors=factors)
        for factors in (estimate.Calibration(), doubled)
    )
    for name in theory:
        assert scaled[name] == pytest.approx(theory[name] * (2 if name in estimate.SCALED else 1), abs=1)
    seconds = [estimate.step_seconds(c, LLAMA_2_7B, "cuda", 7e14, factors=f) for f in (estimate.Calibration(), doubled)]
    assert seconds[1] == 2 * seconds[0]
    assert doubled.says() == "calibrated by 1 measurements on H200"


def measured_cases() -> list[Any]:
    """What measure_training.py found on H200s, the newest first."""
    folders = [RESULTS / f"real-sizes{which}" for which in ("-fourth", "-second", "")]
    found = [r for folder in folders for path in sorted(folder.glob("*.json")) for r in json.loads(path.read_text())]
    return [pytest.param(r, id=r["case"]) for r in found if isinstance(r, dict) and "peak_allocated" in r]


@pytest.mark.parametrize("result", measured_cases())
def test_estimated_memory_is_what_was_measured(result: dict[str, Any]) -> None:
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in result["settings"].items()}
    architecture, tied = MEASURED[result["case"].split(":")[0]]
    config, rotations = QuantizeConfig(**settings), result.get("rotations")
    turned = tied and rotations is not None
    architecture = dataclasses.replace(architecture, tied_table=tied, head_matrix=turned)
    quantization = planning.quantization_of(config, architecture)
    found = estimate.memory(config, architecture, quantization, "cuda")
    assert result["peak_allocated"] == pytest.approx(sum(found.values()), rel=0.06)
    if rotations is not None:
        found = estimate.rotation_memory(config, architecture, quantization, "cuda", 8)
        assert rotations["peak_allocated"] == pytest.approx(sum(found.values()), rel=0.02)
        seconds = estimate.rotation_seconds(config, architecture, "cuda", result["flops"], 1, 8)
        assert rotations["seconds"] == pytest.approx(seconds, rel=0.05)


def test_small_states_take_time_unless_they_are_compiled() -> None:
    """On an H200, 8-bit states without torch.compile took 5.0 s more a step of LLaMA-2-7B's shape."""
    small = {"optimizer_states": "int8", "teacher_weights": "int8", "step_in_backward": "on", "batch_size": 8}
    machine = supposed_machine(1, 80 * 2**30)

    def seconds(**settings: Any) -> float:
        config = plan(LLAMA_2_7B, machine, grad_accum=1, compile="on", **settings).config
        theory = estimate.Calibration()
        eager, compiled = (
            estimate.step_seconds(config.changed(compile=on), LLAMA_2_7B, "cuda", 7e14, factors=theory)
            for on in ("off", "on")
        )
        return eager - compiled

    assert seconds(**small) - seconds(step_in_backward="on", batch_size=8) == pytest.approx(5.0, rel=0.1)
    for settings in ({"optimizer_states": "int8"}, {"optimizer_states": "bf16"}, {"master_weights": "bf16"}):
        config = plan(LLAMA_2_7B, machine, compile="on", **settings).config
        assert estimate.update_bytes(config.changed(compile="off")) > 3 * estimate.update_bytes(config)


def test_tables() -> None:
    assert plan(DEMO, CPU, tied=True).architecture.tied_table
    assert not plan(DEMO, CPU, tied=True, tables="two").architecture.tied_table
    assert not plan(DEMO, CPU, tied=True, head_bits=16).architecture.tied_table  # one table has one width
    with pytest.raises(BadOption, match=r"tables: one, but m has separate embedding and head"):
        plan(DEMO, CPU, tables="one")


def test_contradictions_with_model_and_machine() -> None:
    with pytest.raises(BadOption, match=r"seq_len: 2000 is longer than the model's context of 1024"):
        plan(DEMO, CPU, seq_len=2000)
    with pytest.raises(BadOption, match=r"precision: bf16 needs a CUDA device"):
        plan(DEMO, CPU, precision="bf16")


def test_file_size_of_llama_2_7b() -> None:
    sizes = plan(LLAMA_2_7B, H200).sizes
    assert sizes.ratio >= 6.2 and 2.25 < sizes.bits_per_weight < 2.27


def test_a_large_model_is_refused_on_a_cpu_with_estimate_and_remedy(tmp_path: Path) -> None:
    found = plan(LLAMA_2_7B, CPU, model="meta-llama/Llama-2-7b")
    with pytest.raises(NotEnoughMachine) as refusal:
        found.require_machine(tmp_path)
    message = str(refusal.value)
    for part in (
        "meta-llama/Llama-2-7b: not on this machine (CPU, 2 threads)",
        "16.0 GB of memory are free, about 11",
        " days: use a CUDA GPU with 1",
        "--force",
    ):
        assert part in message, (part, message)
    plan(DEMO, CPU, tokens=400_000).require_machine(tmp_path)
    with pytest.raises(NotEnoughMachine, match=r"the training would take about \d+ h"):
        plan(DEMO, CPU).require_machine(tmp_path)


def test_checkpoints_need_disk(tmp_path: Path) -> None:
    found = dataclasses.replace(plan(DEMO, H200), checkpoint_bytes=10**18)
    with pytest.raises(NotEnoughMachine, match=r"H200\): .* of disk are free in .* use --keep-checkpoints 1"):
        found.require_machine(tmp_path / "not" / "yet")


def test_estimated_activations_are_what_autograd_keeps() -> None:
    a = dataclasses.replace(DEMO, num_layers=2)
    found = plan(a, CPU, batch_size=2, seq_len=256)
    options = ComputeOptions()
    parts = TrainingParts(architecture=a, quantization=found.quantization, options=options)
    pieces = build_pieces(a, parts, r1=True, r3=True, r4=True)
    student = Decoder(a, np.ones(a.head_dim // 2), pieces, options)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.hidden(torch.zeros(2, 256, dtype=torch.long))
    measured = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    assert found.memory["activations"] == pytest.approx(measured, rel=0.25)


def test_looking_at_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = look_at_machine("cpu")
    assert machine.kind == "cpu" and machine.memory_bytes > 10**8 and 1e8 < machine.flops < 1e15
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert look_at_machine("auto").device == "cpu"
    with pytest.raises(NotEnoughMachine, match=r"device cuda:1: torch finds no CUDA device here; use --device cpu"):
        look_at_machine("cuda:1")


def test_dry_run_prints_the_plan_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(checkpoint), "--dry-run", "--steps", "7", "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for part in (
        "attn.q × 2",
        "64 × 64",
        "128, last 64",
        "mlp.down × 2",
        "64 × 128",
        "290 × 64",
        "the embedding",
        "optimizer",
        "original model",
        "7 steps of 8 × 1 sequences × 128 tokens = 7,168 tokens",
        "in FP16",
    ):
        assert part in result.output, (part, result.output)
    assert not (tmp_path / "runs").exists()


def test_a_refused_model_leaves_nothing_and_force_starts_it(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CPU_SECONDS", 0)
    options = {"steps": 1, "data": (str(text),), "seq_len": 16, "batch_size": 1, "grad_accum": 1}
    with pytest.raises(NotEnoughMachine, match="all the same with --force"):
        quantize(str(checkpoint), options, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    run = quantize(str(checkpoint), options, runs=tmp_path / "runs", force=True)
    assert run is not None and run.status == "finished"


def test_a_hub_model_is_judged_before_its_weights_are_fetched(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is stood in for by a download that has fetched the small files and asks for a judgement."""
    from rcpconv.checkpoint import source
    from rcpconv.checkpoint.layout import choose_layout

    def download(repo_id: str, *, check: Any, **more: Any) -> Path:
        check(checkpoint, choose_layout([path.name for path in checkpoint.iterdir()], repo_id))
        pytest.fail("went on to the weights")

    monkeypatch.setattr(source, "download_checkpoint", download)
    assert quantize("org/name", {"steps": 1}, dry_run=True) is None
    with pytest.raises(BadTrainingData, match=r"no\.txt: no such file"):
        quantize("org/name", {"steps": 1, "data": ("no.txt",)}, runs=tmp_path)
    monkeypatch.setattr(planning, "CPU_SECONDS", 0)
    with pytest.raises(NotEnoughMachine, match="org/name: not on this machine"):
        quantize("org/name", {"steps": 1}, runs=tmp_path)


def test_usage_errors_name_the_option() -> None:
    for arguments, message in (
        (["--group-size", "32"], "--group-size': expected one of 64, 128; found 32"),
        (["--tokens", "many"], "--tokens': expected a count such as"),
        (["--lr", "fast"], "--lr': 'fast' is not a number"),
        (["--betas", "0.9"], "--betas"),
    ):
        result = CliRunner().invoke(main, ["quantize", "demo", *arguments])
        assert result.exit_code == 2 and message in result.output, result.output
    result = CliRunner().invoke(main, ["quantize"])
    assert result.exit_code == 1 and "model is missing" in result.output


def test_every_setting_is_an_option_and_reaches_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option, given on the command line, arrives under the field's name with the field's type."""
    seen: dict[str, Any] = {}

    def record(model: str, settings: dict[str, Any], **more: Any) -> None:
        seen.update(settings, model=model)

    monkeypatch.setattr("rcpconv.quantize.quantize", record)
    values: dict[str, Any] = {
        "revision": "v1", "method": "ldp", "group_size": 64, "a_bits": 8, "kv_bits": 8, "head_bits": 16,
        "embed_bits": 16, "tables": "two", "data": ("a.txt", "b.txt"), "eval_data": "c.txt", "max_eval_tokens": 10,
        "tokens": 20_000_000, "steps": 5, "seq_len": 64, "batch_size": 2, "grad_accum": 3, "lr": 1e-3,
        "quantizer_lr": 2e-3, "clip_lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "warmup": 0.1,
        "lr_floor": 0.2, "grad_clip": 0.5, "loss": "kl", "temperature": 2.0, "device": "cpu", "precision": "fp32",
        "teacher_temperature": 1.1, "resample": 0.15, "resample_after": 2, "self_epochs": 1.5,
        "grad_checkpointing": "on", "compile": "off", "seed": 4, "checkpoint_every": 9, "keep_checkpoints": 3,
        "log_every": 2, "eval_every": 7, "self_tokens": 99, "self_share": 0.3, "table_lr": 4e-3, "lr_scale": "relative",
        "optimizer": "muon", "schedule": "linear", "ema": 0.9, "start": "data", "a_clip": 0.8, "weight_reach": 0.5,
        "weight_range": "fixed", "level_gradient": "residual", "hidden_loss": 0.7, "hidden_end": 0.1,
        "step_in_backward": "off", "optimizer_states": "fp32", "teacher_weights": "int8", "master_weights": "fp32",
        "checkpoint_contents": "weights", "step_sequences": 4, "lr_factor": 2.0, "quantizer_factor": 5.0,
        "clip_factor": 3.0, "activations_from": 0.1, "freeze": 0.2, "pull": 0.01, "mix_share": 0.25,
        "rotation_steps": 7, "rotation_share": 0.1, "rotation_lr": 2e-3, "progressive_bits": 3,
        "progressive_share": 0.3, "group_size_of": ("q_proj=128",),
    }  # fmt: skip
    arguments = ["quantize", "demo", "--no-r1", "--no-r2", "--no-r3", "--no-r4", "--low-memory"]
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if name == "betas":
            arguments += [option, *map(str, value)]
        else:
            for item in value if isinstance(value, tuple) else (value,):
                arguments += [option, "20M" if name == "tokens" else str(item)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert seen == values | {"model": "demo", "r1": False, "r2": False, "r3": False, "r4": False, "low_memory": True}
    assert seen.keys() == {item.name for item in dataclasses.fields(QuantizeConfig)}
    seen.clear()
    assert CliRunner().invoke(main, ["quantize", "demo"]).exit_code == 0
    assert seen == {"model": "demo"}  # what is not given is not set
