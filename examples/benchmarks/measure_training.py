"""Measures memory and speed of a few training steps of known shapes, against their estimates, and calibrates these.

    python examples/benchmarks/measure_training.py --out results.json
    python examples/benchmarks/measure_training.py --case llama-2-7b:48 --out results.json --set compile=off
    python examples/benchmarks/measure_training.py --calibrate results.json rcpconv/calibration.json

Without --case: 1B, 3B and 7B, each with all of the GPU's memory, with 80 GiB and with 48 GiB of it, the latter two
with low_memory; each in a process of its own. Weights are random and made on the GPU; the settings are those that
`rcpconv quantize` would choose for that much memory, but for --set. Cases whose result is in --out are left out.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats", ".")]

from rcpconv import estimate  # noqa: E402
from rcpconv.config import QuantizeConfig  # noqa: E402
from rcpconv.estimate import COMPILED, EAGER, SCALED, Calibration  # noqa: E402
from rcpconv.layers import ComputeOptions, QuantLinear  # noqa: E402
from rcpconv.model import Decoder  # noqa: E402
from rcpconv.parts import FloatParts, Parts, TrainingParts  # noqa: E402
from rcpconv.plan import Plan, look_at_machine, make_plan  # noqa: E402
from rcpconv.runs import Run  # noqa: E402
from rcpconv.train.loop import Trainer  # noqa: E402
from rcpconv.train.losses import Loss  # noqa: E402
from rcpconv.train.memory import int8_teacher  # noqa: E402
from shapes import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_32_1B, LLAMA_32_3B  # noqa: E402

SHAPES = {
    "llama-3.2-1b": (LLAMA_32_1B, True),
    "llama-3.2-3b": (LLAMA_32_3B, True),
    "llama-2-7b": (LLAMA_2_7B, False),
    "llama-2-13b": (LLAMA_2_13B, False),
    "demo": (DEMO, True),
}
"""Name to architecture, and whether its embedding is its head."""
FULL = "full"
CASES = tuple(f"{name}:{cap}" for name in list(SHAPES)[:3] for cap in (FULL, "80", "48"))
_WARM_UP = 2
_STD = 0.02
_GIB = 2**30


class RandomTokens:
    """Stands in for training texts."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """(count, seq_len) ids."""
        return np.random.default_rng(first).integers(self.vocab_size, size=(count, self.seq_len))


class TimedTrainer(Trainer):
    """Keeps the time of every update."""

    def _update(self, loss: Loss) -> None:
        self.times: list[float] = getattr(self, "times", [])
        start = time.perf_counter()
        super()._update(loss)  # ends with figures on the host, so the device is done but for the optimizer
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)


def _decoder(plan: Plan, parts: Parts, rotated: bool, options: ComputeOptions) -> Decoder:
    a, device = plan.architecture, torch.device(plan.machine.device)
    a = a if rotated else dataclasses.replace(a, tied_table=False)
    frequencies = 1e4 ** (-np.arange(0, a.head_dim, 2) / a.head_dim)
    with device:
        decoder = Decoder(a, frequencies, parts, r1=rotated, r3=rotated, r4=rotated, options=options)
    return decoder.to(device)


@torch.no_grad()
def models(plan: Plan) -> tuple[Decoder, Decoder]:
    """(student, teacher), random, made on the device of the plan."""
    c = plan.config
    half = c.precision == "bf16"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    teacher = _decoder(
        plan, FloatParts(architecture=plan.architecture, with_gains=True), False, ComputeOptions(half=half)
    )
    torch.set_default_dtype(torch.float32)
    for parameter in teacher.requires_grad_(False).eval().parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, _STD)
    if c.teacher_weights == "int8":
        int8_teacher(teacher)
    options = ComputeOptions(half=half, checkpoint_layers=c.grad_checkpointing == "on")
    parts = TrainingParts(architecture=plan.architecture, quantization=plan.quantization, options=options)
    student = _decoder(plan, parts, True, options)
    for name, parameter in student.named_parameters():
        if name.endswith(".weight"):
            parameter.normal_(0, _STD)
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.quantizer.initialise(module.weight)
    return student, teacher


def make_case_plan(case: str, device: str, settings: dict[str, Any]) -> Plan:
    """What would be trained. Caps the GPU's memory."""
    name, cap = case.split(":")
    machine = look_at_machine(device)
    low = cap != FULL
    if machine.kind == "cuda" and low:
        total = torch.cuda.get_device_properties(machine.device).total_memory
        allowed = min(total, round(float(cap) * _GIB))
        torch.cuda.set_per_process_memory_fraction(allowed / total, machine.device)
        machine = dataclasses.replace(machine, memory_bytes=min(allowed, machine.memory_bytes))
    architecture, tied = SHAPES[name]
    config = QuantizeConfig(**{"model": name, "low_memory": low, "checkpoint_every": 0, "log_every": 1} | settings)
    return make_plan(config, architecture, tied, machine)


def measure(case: str, device: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train a few steps. Bytes and seconds, estimated and measured."""
    plan = make_case_plan(case, device, settings | {"steps": _WARM_UP + steps})
    c, m, a = plan.config, plan.machine, plan.architecture
    cuda = m.kind == "cuda"
    theory = Calibration()
    student, teacher = models(plan)
    assert c.seq_len is not None
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            student=student,
            teacher=teacher,
            sequences=RandomTokens(c.seq_len, a.vocab_size),  # type: ignore[arg-type]
            steps=plan.steps,
            config=c,
            run=Run(Path(folder), {}),
            console=Console(quiet=True),
            keep=False,
        )
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = statistics.median(trainer.times[_WARM_UP:])
    return {
        "case": case,
        "device": m.name,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(c),
        "tokens_per_step": plan.tokens_per_step,
        "estimated_memory": estimate.memory(c, a, plan.quantization, m.kind, factors=theory),
        "estimated_seconds": estimate.step_seconds(c, a, m.kind, m.flops, factors=theory),
        "flops": m.flops,
        "memory_limit": m.memory_bytes,
        "peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "seconds": seconds,
        "first_seconds": trainer.times[0],
        "tokens_per_second": plan.tokens_per_step / seconds,
    }


def tell(result: dict[str, Any]) -> None:
    """Print estimated against measured."""
    c, estimated = result["settings"], sum(result["estimated_memory"].values())
    chosen = ("batch_size", "grad_accum", "grad_checkpointing", "step_in_backward", "optimizer_states")
    chosen += ("teacher_weights", "master_weights", "compile")
    click.echo(f"{result['case']}: " + ", ".join(f"{name} {c[name]}" for name in chosen))
    if result["peak_allocated"] is not None:
        limit, peak, held = (result[name] / _GIB for name in ("memory_limit", "peak_allocated", "peak_reserved"))
        click.echo(
            f"  memory  estimated {estimated / _GIB:.1f} GiB, measured {peak:.1f} (reserved {held:.1f}), "
            f"{1 - held / limit:.0%} of {limit:.1f} left"
        )
    click.echo(
        f"  a step  estimated {result['estimated_seconds']:.3f} s, measured {result['seconds']:.3f} "
        f"({result['tokens_per_second']:,.0f} tokens/s; the first {result['first_seconds']:.1f} s)"
    )


def factors(results: list[dict[str, Any]]) -> Calibration:
    """Of memory the largest that was measured, of time the median; each with and without torch.compile.

    Raises ClickException without measurements on a GPU.
    """
    memory: dict[str, list[float]] = {EAGER: [], COMPILED: []}
    seconds: dict[str, list[float]] = {EAGER: [], COMPILED: []}
    for result in results:
        if result.get("peak_allocated") is None:
            continue
        kind = COMPILED if result["settings"]["compile"] == "on" else EAGER
        terms = result["estimated_memory"]
        scaled = sum(terms[name] for name in SCALED)
        memory[kind].append((result["peak_allocated"] - (sum(terms.values()) - scaled)) / scaled)
        seconds[kind].append(result["seconds"] / result["estimated_seconds"])
    for found in (memory, seconds):
        if not any(found.values()):
            raise click.ClickException("nothing in it was measured on a GPU")
        for kind, other in ((EAGER, COMPILED), (COMPILED, EAGER)):
            found[kind] = found[kind] or found[other]
    kept = ("case", "tokens_per_step", "estimated_seconds", "peak_allocated", "peak_reserved", "seconds")
    measured = [{name: r[name] for name in kept} for r in results if r.get("peak_allocated") is not None]
    return Calibration(
        device=results[0]["device"],
        memory={kind: round(max(values), 3) for kind, values in memory.items()},
        seconds={kind: round(statistics.median(values), 3) for kind, values in seconds.items()},
        measured=tuple(measured),
    )


def _settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--case", "cases", multiple=True, default=CASES, help="SHAPE:full or SHAPE:GIB. Default: nine of them.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file of results; is added to.")
@click.option("--steps", default=5, show_default=True, help="Steps to measure, after two more.")
@click.option("--device", default="auto", show_default=True)
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of rcpconv quantize.")
@click.option(
    "--calibrate",
    nargs=2,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="RESULTS FILE",
    help="Measure nothing; write factors from results.",
)
def main(
    cases: tuple[str, ...],
    out: Path | None,
    steps: int,
    device: str,
    pairs: tuple[str, ...],
    calibrate: tuple[Path, Path] | None,
) -> None:
    """Measure every case in a process of its own, or one in this, or calibrate."""
    if calibrate is not None:
        found = factors(json.loads(calibrate[0].read_text()))
        calibrate[1].write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
        return
    results = json.loads(out.read_text()) if out is not None and out.exists() else []
    done = {(result["case"], tuple(result["set"])) for result in results}
    cases = tuple(case for case in cases if (case, pairs) not in done)
    if len(cases) > 1:
        common = ["--steps", str(steps), "--device", device, *(x for pair in pairs for x in ("--set", pair))]
        common += [] if out is None else ["--out", str(out)]
        for case in cases:
            if subprocess.run([sys.executable, __file__, "--case", case, *common]).returncode:
                click.echo(f"{case}: failed")
        return
    for case in cases:
        result = measure(case, device, _settings(pairs), steps) | {"set": list(pairs)}
        tell(result)
        if out is not None:
            out.write_text(json.dumps([*results, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
