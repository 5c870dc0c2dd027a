"""Measures memory and speed of a few training steps of known shapes, against their estimates, and calibrates these.

    python examples/benchmarks/measure_training.py --out results.json
    python examples/benchmarks/measure_training.py --case llama-2-7b:48 --out results.json --set compile=off
    python examples/benchmarks/measure_training.py --calibrate rcpconv/calibration.json results.json [more.json …]

Without --case: 1B, 3B and 7B, each with all of the GPU's memory, with 80 GiB and with 48 GiB of it, the latter two
with low_memory; each in a process of its own. Weights are random and made on the GPU; the settings are those that
`rcpconv quantize` would choose for that much memory, but for --set. Cases whose result is in --out are left out.
--plain measures plain bf16 training of the same shape in the same process, afterwards and without a cap. With
--set rotation_steps=N rotations are learned for so many steps, afterwards, and that is measured, too. --profile
traces one more step with torch.profiler, and prints what the device's time goes to.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "formats", ".")]

from rcpconv import estimate  # noqa: E402
from rcpconv.config import QuantizeConfig  # noqa: E402
from rcpconv.errors import BadCompiler  # noqa: E402
from rcpconv.estimate import COMPILED, EAGER, SCALED, Calibration  # noqa: E402
from rcpconv.layers import ComputeOptions, QuantLinear  # noqa: E402
from rcpconv.model import Decoder, build_pieces  # noqa: E402
from rcpconv.parts import FloatParts, Parts, TrainingParts  # noqa: E402
from rcpconv.plan import Plan, look_at_machine, make_plan, quantization_of  # noqa: E402
from rcpconv.prepare import made_on  # noqa: E402
from rcpconv.runs import Run  # noqa: E402
from rcpconv.train.loop import Trainer  # noqa: E402
from rcpconv.train.losses import Loss, chunk_rows  # noqa: E402
from rcpconv.train.memory import int8_teacher  # noqa: E402
from rcpconv.train.rotations import learn_rotations  # noqa: E402
from shapes import DEMO, LLAMA_2_7B, LLAMA_2_13B, LLAMA_32_1B, LLAMA_32_3B, WIKI_22M  # noqa: E402

SHAPES = {
    "llama-3.2-1b": (LLAMA_32_1B, True),
    "llama-3.2-3b": (LLAMA_32_3B, True),
    "llama-2-7b": (LLAMA_2_7B, False),
    "llama-2-13b": (LLAMA_2_13B, False),
    "wiki-llama-22m": (WIKI_22M, True),
    "demo": (DEMO, True),
}
"""Name to architecture, and whether its embedding is its head."""
FULL = "full"
CASES = tuple(f"{name}:{cap}" for name in list(SHAPES)[:3] for cap in (FULL, "80", "48"))
Ready = Callable[[nn.Module], nn.Module]
"""What becomes of a piece as soon as it is made."""
_WARM_UP = 2
_KERNELS, _SHOWN = 60, 25
"""How many of a profile's kernels are kept, and printed."""
_KEPT = ("case", "tokens_per_step", "peak_allocated", "peak_reserved", "seconds")
"""What a calibration says of its measurements, beside their estimates."""
_STD = 0.02
_GIB = 2**30


class RandomTokens:
    """Stands in for training texts."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.seq_len, self.vocab_size = seq_len, vocab_size

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """(count, seq_len) ids."""
        return np.random.default_rng(first).integers(self.vocab_size, size=(count, self.seq_len))


def traced(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Seconds of a step by the clock and of its kernels together, and the kernels that take longest.

    On a CPU, operations instead of kernels.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = [
        each
        for each in profiler.key_averages()
        if each.device_type == on_device and not each.key.startswith("Optimizer.step")  # a name for others
    ]
    rows = [
        {
            "name": each.key,
            "count": each.count,
            "seconds": (each.self_device_time_total if cuda else each.self_cpu_time_total) / 1e6,
        }
        for each in found
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return {"seconds": seconds, "busy": sum(row["seconds"] for row in rows), "kernels": rows[:_KERNELS]}


class TimedTrainer(Trainer):
    """Keeps the time of every update."""

    times: list[float]
    profiled = False
    """Whether the last step is traced, and left out of the times."""
    profile: dict[str, Any]

    def _update(self, loss: Loss) -> None:
        if self.profiled and self.counters.step == self.steps - 1:
            self.profile = traced(lambda: super(TimedTrainer, self)._update(loss), self.device)
            return
        start = time.perf_counter()
        super()._update(loss)  # ends with figures on the host, so the device is done but for the optimizer
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - start)


def _decoder(plan: Plan, parts: Parts, rotated: bool, options: ComputeOptions, ready: Ready) -> Decoder:
    a = plan.architecture if rotated else dataclasses.replace(plan.architecture, tied_table=False, head_matrix=False)
    frequencies = 1e4 ** (-np.arange(0, a.head_dim, 2) / a.head_dim)
    device = plan.machine.device
    pieces = made_on(device, build_pieces(a, parts, r1=rotated, r3=rotated, r4=rotated))
    return Decoder(a, frequencies, ((name, ready(module)) for name, module in pieces), options).to(device)


@torch.no_grad()
def original(plan: Plan, options: ComputeOptions, *, small: bool = False) -> Decoder:
    """An unquantized model, random, made on the device of the plan. small: with int8 weights."""

    def ready(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, _STD)
        module.to(torch.bfloat16 if options.half else torch.float32)
        return int8_teacher(module) if small else module

    parts = FloatParts(architecture=plan.architecture, with_gains=True)
    return _decoder(plan, parts, False, options, ready)


@torch.no_grad()
def models(plan: Plan, *, initialise: bool = True) -> tuple[Decoder, Decoder]:
    """(student, teacher), random, made on the device of the plan. initialise: the student's quantizers."""
    c = plan.config
    half = c.precision == "bf16"
    torch.manual_seed(0)
    options = ComputeOptions(half=half, checkpoint_layers=c.grad_checkpointing == "on")

    def ready(module: nn.Module) -> nn.Module:
        for name, parameter in module.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, _STD)
        for linear in module.modules():
            if initialise and isinstance(linear, QuantLinear):
                linear.quantizer.initialise(linear.weight)
        return module

    parts = TrainingParts(architecture=plan.architecture, quantization=plan.quantization, options=options)
    student = _decoder(plan, parts, True, options, ready)
    teacher = original(plan, ComputeOptions(half=half), small=c.teacher_weights == "int8")
    return student, teacher.requires_grad_(False).eval()


class PlainTraining:
    """What training is compared with: the same shape unquantized, all of it in bfloat16, learning by cross-entropy with
    fused AdamW, and a forward pass of a teacher of that shape. Batches, recomputation and torch.compile are the plan's.
    """

    def __init__(self, plan: Plan) -> None:
        c = self.config = plan.config
        half = c.precision == "bf16"
        torch.manual_seed(0)
        self.model = original(plan, ComputeOptions(half=half, checkpoint_layers=c.grad_checkpointing == "on"))
        self.teacher = original(plan, ComputeOptions(half=half)).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=c.betas, fused=True)
        assert c.seq_len is not None
        self.texts = RandomTokens(c.seq_len, plan.architecture.vocab_size)
        self.device = torch.device(plan.machine.device)
        if c.compile == "on":
            for layer in (*self.model.layers, *self.teacher.layers):
                layer.compile()

    def _tokens(self, first: int) -> Tensor:
        assert self.config.batch_size is not None
        return torch.from_numpy(self.texts.batch(first, self.config.batch_size)).to(self.device)

    def _parts(self, hidden_MC: Tensor) -> tuple[Tensor, ...]:
        """As many tokens at a time as QAT has logits of."""
        return hidden_MC.split(chunk_rows(len(hidden_MC), self.model.architecture.vocab_size, self.device))

    def step(self, number: int) -> None:
        """An update."""
        assert self.config.grad_accum is not None
        for i in range(self.config.grad_accum):
            tokens_BT = self._tokens(number * self.config.grad_accum + i)
            hidden_MC = self.model.hidden(tokens_BT).flatten(0, 1)
            leaf_MC = hidden_MC.detach().requires_grad_()
            targets = tokens_BT.roll(-1, dims=1).flatten().split(len(self._parts(leaf_MC)[0]))
            for part_MC, target_M in zip(self._parts(leaf_MC), targets, strict=True):
                F.cross_entropy(self.model.logits(part_MC), target_M).backward()
            hidden_MC.backward(leaf_MC.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def teach(self, number: int) -> None:
        """The teacher's forward pass of all of a step."""
        assert self.config.grad_accum is not None
        for i in range(self.config.grad_accum):
            hidden_BTC = self.teacher.hidden(self._tokens(number * self.config.grad_accum + i))
            for part_MC in self._parts(hidden_BTC.flatten(0, 1)):
                self.teacher.logits(part_MC)

    def seconds(self, work: Callable[[int], None], steps: int) -> float:
        """The median time of it."""
        times = []
        for number in range(_WARM_UP + steps):
            start = time.perf_counter()
            work(number)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[_WARM_UP:])


def measure_plain(plan: Plan, steps: int) -> dict[str, Any]:
    """Seconds and memory of plain training, with all of the GPU's memory."""
    cuda = plan.machine.kind == "cuda"
    torch._dynamo.reset()  # compiled code would hold the models before
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, plan.machine.device)
        torch.cuda.reset_peak_memory_stats()
    plain = PlainTraining(plan)
    found = {"training": plain.seconds(plain.step, steps), "teacher": plain.seconds(plain.teach, steps)}
    return found | {"peak_allocated": torch.cuda.max_memory_allocated() if cuda else None}


def measure_rotations(plan: Plan) -> dict[str, Any]:
    """Seconds and memory of learning the rotations of a random model, and how much of it is estimated."""
    c, cuda = plan.config, plan.machine.kind == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    student, teacher = models(plan, initialise=False)
    student.options = dataclasses.replace(student.options, checkpoint_layers=True)
    assert c.seq_len is not None and c.batch_size is not None and c.grad_accum is not None and c.rotation_steps
    size, count = plan.rotation_batch, c.batch_size * c.grad_accum // plan.rotation_batch
    texts, device = RandomTokens(c.seq_len, plan.architecture.vocab_size), torch.device(plan.machine.device)
    times: list[float] = []

    def batches(step: int) -> list[Tensor]:
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        parts = (texts.batch(step * count + i, size) for i in range(count))
        return [torch.from_numpy(part).to(device) for part in parts]

    how: dict[str, Any] = {"r1": c.r1, "r2": c.r2, "low_memory": c.low_memory}
    learn_rotations(student, teacher, batches, steps=c.rotation_steps, rate=c.rotation_lr, tell=click.echo, **how)
    batches(0)
    found = [after - before for before, after in itertools.pairwise(times)]
    return {
        "seconds": statistics.median(found),
        "times": found,
        "peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "estimated_memory": plan.rotation_memory,
    }


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
    fixed = {"model": name, "low_memory": low, "checkpoint_every": 0, "log_every": 1}
    config = QuantizeConfig(**fixed | settings)
    return make_plan(config, architecture, tied, machine)


def measure(plan: Plan, case: str, steps: int, profiled: bool = False) -> dict[str, Any]:
    """Train a few steps. Bytes and seconds, estimated and measured; "error" where memory did not suffice."""
    c, m, a = plan.config, plan.machine, plan.architecture
    cuda = m.kind == "cuda"
    theory = Calibration()
    result = {
        "case": case,
        "device": m.name,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(c),
        "tokens_per_step": plan.tokens_per_step,
        "estimated_memory": estimate.memory(c, a, plan.quantization, m.kind, factors=theory),
        "estimated_seconds": estimate.step_seconds(c, a, m.kind, m.flops, factors=theory),
        "flops": m.flops,
        "memory_limit": m.memory_bytes,
    }
    times: list[float] = []
    try:
        result |= _train(plan, steps, times, profiled)
    except (torch.OutOfMemoryError, BadCompiler) as error:
        result["error"] = str(error)
    result["peak_allocated"] = torch.cuda.max_memory_allocated() if cuda else None
    result["peak_reserved"] = torch.cuda.max_memory_reserved() if cuda else None
    if times[_WARM_UP:]:
        seconds = statistics.median(times[_WARM_UP:])
        result |= {"seconds": seconds, "tokens_per_second": plan.tokens_per_step / seconds}
    return result | {"times": times}


def _train(plan: Plan, steps: int, times: list[float], profiled: bool) -> dict[str, Any]:
    """The time and memory before the first update, and what is traced of one more. times: gets those of the updates."""
    c, cuda = plan.config, plan.machine.kind == "cuda"
    began = time.perf_counter()
    student, teacher = models(plan)
    if cuda:
        torch.cuda.synchronize()
    made = time.perf_counter()
    assert c.seq_len is not None
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            student=student,
            teacher=teacher,
            sequences=RandomTokens(c.seq_len, plan.architecture.vocab_size),  # type: ignore[arg-type]
            steps=_WARM_UP + steps + profiled,
            config=c,
            run=Run(Path(folder), {}),
            console=Console(quiet=True),
            keep=False,
        )
        trainer.times, trainer.profiled = times, profiled
        started: dict[str, Any] = {"made_seconds": made - began, "compiled_seconds": time.perf_counter() - made}
        if cuda:
            started["start_peak_allocated"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if profiled:
            started["profile"] = trainer.profile
        started["update_seconds"] = [_seconds_of_updates(trainer) for _ in range(2)][-1]
    return started


def _seconds_of_updates(trainer: Trainer) -> float:
    """Of one step's, by themselves, without clipping; of one parameter after another where they are made so."""
    optimizer = trainer.optimizer
    start = time.perf_counter()
    for each in getattr(optimizer, "optimizers", [optimizer]):
        for group in each.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        each.step()
        each.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tell(result: dict[str, Any]) -> None:
    """Print estimated against measured."""
    c, estimated = result["settings"], sum(result["estimated_memory"].values())
    chosen = ("batch_size", "grad_accum", "grad_checkpointing", "step_in_backward", "optimizer_states")
    chosen += ("teacher_weights", "master_weights", "compile")
    click.echo(f"{result['case']}: " + ", ".join(f"{name} {c[name]}" for name in chosen))
    if result["peak_allocated"] is not None:
        limit, peak, held = (result[name] / _GIB for name in ("memory_limit", "peak_allocated", "peak_reserved"))
        click.echo(
            f"  memory  estimated {estimated / _GIB:.1f} GiB, measured {peak:.1f}, {peak * _GIB / estimated - 1:+.0%} "
            f"(reserved {held:.1f}, {1 - held / limit:.0%} of {limit:.1f} left; until the first step "
            f"{result.get('start_peak_allocated', 0) / _GIB:.1f})"
        )
    if "error" in result:
        click.echo(f"  failed  {result['error']}")
    if "seconds" in result:
        click.echo(
            f"  a step  estimated {result['estimated_seconds']:.3f} s, measured {result['seconds']:.3f} "
            f"({result['tokens_per_second']:,.0f} tokens/s; all: {' '.join(f'{t:.2f}' for t in result['times'])}; "
            f"models made in {result['made_seconds']:.1f} s, trainer in {result['compiled_seconds']:.1f}; the update "
            f"alone takes {result['update_seconds']:.3f}, {result['update_seconds'] / result['seconds']:.0%})"
        )
    if "profile" in result:
        profile = result["profile"]
        seconds, busy = profile["seconds"], profile["busy"]
        click.echo(f"  profile a step of {seconds:.3f} s, kernels together {busy:.3f}, the longest:")
        for row in profile["kernels"][:_SHOWN]:
            each, count, name = row["seconds"], row["count"], row["name"][:90]
            click.echo(f"    {each / busy:5.1%} {1e3 * each:9.2f} ms {count:6} x {name}")
    if "plain" in result:
        plain = result["plain"]
        both = plain["training"] + plain["teacher"]
        peak = f", {plain['peak_allocated'] / _GIB:.1f} GiB" if plain["peak_allocated"] is not None else ""
        ratio = f": QAT at {both / result['seconds']:.2f} of it" if "seconds" in result else ""
        click.echo(
            f"  plain   a training step {plain['training']:.3f} s, a teacher's forward pass {plain['teacher']:.3f}: "
            f"{result['tokens_per_step'] / both:,.0f} tokens/s{peak}{ratio}"
        )


def tell_rotations(found: dict[str, Any]) -> None:
    """Print estimated against measured."""
    estimated, peak = sum(found["estimated_memory"].values()) / _GIB, (found["peak_allocated"] or 0) / _GIB
    times = " ".join(f"{t:.2f}" for t in found["times"])
    click.echo(
        f"  learning rotations  a step {found['seconds']:.3f} s (all: {times}), memory estimated {estimated:.1f} GiB, "
        f"measured {peak:.1f}"
    )


def factors(results: list[dict[str, Any]]) -> Calibration:
    """Of memory the largest that was measured, of time the median; each with and without torch.compile.

    Raises ClickException without measurements on a GPU.
    """
    memory: dict[str, list[float]] = {EAGER: [], COMPILED: []}
    seconds: dict[str, list[float]] = {EAGER: [], COMPILED: []}
    measured = []
    for result in filter(_usable, results):
        kind = COMPILED if result["settings"]["compile"] == "on" else EAGER
        terms, estimated_seconds = _theory(result)
        scaled = sum(terms[name] for name in SCALED)
        memory[kind].append((result["peak_allocated"] - (sum(terms.values()) - scaled)) / scaled)
        seconds[kind].append(result["seconds"] / estimated_seconds)
        kept = {name: result[name] for name in _KEPT}
        measured.append(kept | {"estimated_memory": sum(terms.values()), "estimated_seconds": estimated_seconds})
    for found in (memory, seconds):
        if not any(found.values()):
            raise click.ClickException("nothing in it was measured on a GPU")
        for kind, other in ((EAGER, COMPILED), (COMPILED, EAGER)):
            found[kind] = found[kind] or found[other]
    return Calibration(
        device=results[0]["device"],
        memory={kind: round(max(values), 3) for kind, values in memory.items()},
        seconds={kind: round(statistics.median(values), 3) for kind, values in seconds.items()},
        measured=tuple(measured),
    )


def _theory(result: dict[str, Any]) -> tuple[dict[str, int], float]:
    """What is estimated, without calibration, of a training that was measured."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in result["settings"].items()}
    config, (architecture, tied) = QuantizeConfig(**settings), SHAPES[result["case"].split(":")[0]]
    architecture, theory = dataclasses.replace(architecture, tied_table=tied), Calibration()
    quantization = quantization_of(config, architecture)
    memory = estimate.memory(config, architecture, quantization, "cuda", factors=theory)
    return memory, estimate.step_seconds(config, architecture, "cuda", result["flops"], factors=theory)


def _usable(result: dict[str, Any]) -> bool:
    """Whether it was measured on a GPU, to its end."""
    return result.get("peak_allocated") is not None and "seconds" in result and "error" not in result


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
@click.option("--plain", is_flag=True, help="Measure plain bf16 training and a teacher's forward pass, too.")
@click.option("--profile", "profiled", is_flag=True, help="Trace one more step, and print its longest kernels.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of rcpconv quantize.")
@click.option(
    "--calibrate",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure nothing; write factors from RESULTS.",
)
@click.argument("results_files", metavar="[RESULTS]...", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(
    cases: tuple[str, ...],
    out: Path | None,
    steps: int,
    device: str,
    plain: bool,
    profiled: bool,
    pairs: tuple[str, ...],
    calibrate: Path | None,
    results_files: tuple[Path, ...],
) -> None:
    """Measure every case in a process of its own, or one in this, or calibrate."""
    if calibrate is not None:
        found = factors([result for path in results_files for result in json.loads(path.read_text())])
        calibrate.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
        return
    results = json.loads(out.read_text()) if out is not None and out.exists() else []
    done = {(result["case"], tuple(result["set"])) for result in results}
    cases = tuple(case for case in cases if (case, pairs) not in done)
    if len(cases) > 1:
        common = ["--steps", str(steps), "--device", device, *(x for pair in pairs for x in ("--set", pair))]
        common += ["--plain"] * plain + ["--profile"] * profiled
        common += [] if out is None else ["--out", str(out)]
        for case in cases:
            if subprocess.run([sys.executable, __file__, "--case", case, *common]).returncode:
                click.echo(f"{case}: failed")
        return
    for case in cases:
        plan = make_case_plan(case, device, _settings(pairs) | {"steps": _WARM_UP + steps})
        result = measure(plan, case, steps, profiled) | {"set": list(pairs)}

        def keep(result: dict[str, Any] = result) -> None:
            if out is not None:
                out.write_text(json.dumps([*results, result], indent=2) + "\n")

        tell(result)
        keep()
        if plain:
            result["plain"] = measure_plain(plan, steps)
            tell(result)
            keep()
        if plan.config.rotation_steps:
            result["rotations"] = measure_rotations(plan)
            tell_rotations(result["rotations"])
            keep()
        if "error" in result:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
