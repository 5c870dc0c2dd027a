"""What a training will take before it starts: shapes, bytes, memory, steps and time; and whether this machine will do.

Estimates need the architecture only, so a model can be refused before its weights are downloaded. Knows nothing of
weights or texts.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rcpconv import estimate
from rcpconv.config import AUTO, DEFAULT_CORPUS, DEMO, UNTRAINED, QuantizeConfig
from rcpconv.errors import BadOption, NotEnoughMachine
from rcpconv.runs import CHECKPOINTS, ROTATIONS
from rcpconv.scheme import read_scheme
from rcpconv.train.progress import duration
from rcpformat import spec
from rcpformat.accounting import Accounting, account
from rcpformat.architecture import Architecture, Quantization

DEFAULT_TOKENS = 20_000_000
DEFAULT_SEQ_LEN = 2048

LEAST_ROTATION_STEPS, MOST_ROTATION_TOKENS = 20, 5_000_000
"""What a share of the training has to come to for rotations to be learned on it, and what it comes to at most."""
CPU_SECONDS = 2 * 3600
"""A training that takes longer on a CPU is refused."""
_USABLE_MEMORY = 0.92
_WITH_ROOM = {"cpu": _USABLE_MEMORY, "cuda": 0.85}
"""Share of the memory that a plan keeps to where it can."""
_PLAIN = {
    "grad_checkpointing": "off",
    "step_in_backward": "off",
    "optimizer_states": "fp32",
    "teacher_weights": "full",
    "master_weights": "fp32",
}
"""Settings that cost memory or something else, as they are where memory suffices."""
_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the training would run."""

    device: str
    """As torch.device takes it."""
    name: str
    memory_bytes: int
    """Free memory of the device."""
    flops: float
    """Multiplications and additions a second of a large matmul, in the precision that training uses there."""
    compiles: bool = False
    """Whether training gains from torch.compile there."""
    eight_bits: bool = False
    """Whether optimizer states can be kept in 8 bits there."""
    gpus: int = 1
    """Devices of this kind, over which weights are spread; the other figures are of each."""

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]


def look_at_machine(device: str) -> Machine:
    """Measure the device that `device` (auto, cpu, cuda, cuda:N) means here. Raises NotEnoughMachine without it."""
    available = torch.cuda.is_available()
    if device.startswith("cuda") and not available:
        raise NotEnoughMachine(
            f"device {device}: torch finds no CUDA device here; use --device cpu, or install torch with CUDA"
        )
    if device == "cpu" or (device == "auto" and not available):
        name = f"CPU, {torch.get_num_threads()} threads"
        eight_bits = find_spec("torchao") is not None
        return Machine(
            device="cpu", name=name, memory_bytes=_free_memory(), flops=_matmul_rate("cpu"), eight_bits=eight_bits
        )
    device = "cuda:0" if device in ("auto", "cuda") else device
    if int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise NotEnoughMachine(f"device {device}: expected one of {torch.cuda.device_count()} CUDA devices")
    return Machine(
        device=device,
        name=torch.cuda.get_device_name(device),
        memory_bytes=torch.cuda.mem_get_info(device)[0],
        flops=_matmul_rate(device),
        compiles=find_spec("triton") is not None,
        eight_bits=find_spec("torchao") is not None,
    )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for a process that is to see one GPU alone, for each of those seen here."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return given[:count] or [str(i) for i in range(count)]


SUPPOSED_FLOPS = 7e14
"""Of a GPU that is not there: an H100's or H200's large matmuls in bfloat16."""


def supposed_machine(gpus: int, gpu_bytes: float) -> Machine:
    """GPUs that need not be there, to plan for."""
    name = f"{gpus} GPU{'s' if gpus > 1 else ''} of {size(gpu_bytes)}, supposed"
    return Machine(
        device="cuda:0",
        name=name,
        memory_bytes=round(gpu_bytes),
        flops=SUPPOSED_FLOPS,
        compiles=True,
        eight_bits=True,
        gpus=gpus,
    )


def _free_memory() -> int:
    """Bytes of main memory that a process here may still use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total = int(lines["MemAvailable"].split()[0]) * 1024
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        total = min(total, int(allowed))
    return total


def _matmul_rate(device: str) -> float:
    n, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (1024, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * n**3 / seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training, decided down to the last setting, and what it takes."""

    config: QuantizeConfig
    """With every setting that depends on model and machine filled in."""
    architecture: Architecture
    """Of the file: tied_table and head_matrix are decided."""
    quantization: Quantization
    tied: bool
    """Whether the original has one table for embedding and head."""
    machine: Machine
    sizes: Accounting
    memory: dict[str, int]
    """Bytes of each device's memory by what they are for."""
    checkpoint_bytes: int
    steps: int
    seconds: float
    rotation_batch: int = 0
    """Sequences of each process's batches while rotations are learned; 0 where they are not."""
    rotation_memory: dict[str, int] = field(default_factory=dict)
    """As `memory`, while rotations are learned, before training; empty where they are not."""
    rotations_need: int = 0
    """Bytes for which rotations are not learned, where their share of the training would be."""
    zero_stage: int = 3
    """How several GPUs share out the student (ZeRO, arXiv 1910.02054). At 3 each layer is gathered where it is used. At
    2, where memory allows it, weights stay whole from a batch's forward to its backward pass, and the original always.
    At 1, where it allows that too, a step of several batches gathers weights once, and shares out gradients at its end.
    """

    @property
    def rotation_tokens(self) -> int:
        """Tokens that rotations are learned on, beside those of `steps`."""
        return (self.config.rotation_steps or 0) * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return _step_tokens(self.config)

    @property
    def memory_bytes(self) -> int:
        """All of `memory`, or of `rotation_memory` where that is more."""
        return max(sum(self.memory.values()), sum(self.rotation_memory.values()))

    def shortages(self, folder: Path) -> list[str]:
        """Why this machine will not do, each with its remedy; empty when it will.

        folder: of the run, or where it will be. Checkpoints that are there already need no more room.
        """
        c, m = self.config, self.machine
        found = []
        training, rotating = sum(self.memory.values()), sum(self.rotation_memory.values())
        if (folder / ROTATIONS).exists():
            rotating = 0
        if training > _USABLE_MEMORY * m.memory_bytes:
            found.append(f"{size(m.memory_bytes)} of memory are free, about {size(training)} are needed")
        if m.kind == "cpu" and self.seconds > CPU_SECONDS:
            found.append(f"the training would take about {duration(self.seconds)}")
        if found:
            remedy = f"{'' if c.low_memory else '--low-memory, '}a smaller model, or less text (--tokens, --seq-len)"
            remedy = f"use {'--rotation-steps 0, ' if self.rotation_memory else ''}{remedy}"
            found = [
                f"{'; '.join(found)}: use a CUDA GPU with {size(self.least_gpu_bytes())} of free memory, or {remedy}"
            ]
        if rotating > _USABLE_MEMORY * m.memory_bytes:
            found.append(
                f"{size(m.memory_bytes)} of memory are free, about {size(rotating)} are needed to learn rotations: use "
                f"{'' if c.low_memory else '--low-memory, '}--rotation-steps 0, or a device with more"
            )
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disk = shutil.disk_usage(existing).free
        kept = c.keep_checkpoints + 1 if c.checkpoint_every else 1
        result = self.sizes.total_bytes
        there = sum(path.stat().st_size for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
        checkpoints = max(0, self.checkpoint_bytes * kept - there)
        if result > disk:
            found.append(f"{size(disk)} of disk are free in {existing}, the result takes {size(result)}: make room")
        elif checkpoints + result > disk:
            found.append(
                f"{size(disk)} of disk are free in {existing}, {kept} checkpoints and the result take "
                f"{size(checkpoints + result)}{' more than is there' if there else ''}: use --keep-checkpoints 1, "
                "--checkpoint-contents weights, or --checkpoint-every 0 for none"
            )
        return found

    def require_machine(self, folder: Path) -> None:
        """Raises NotEnoughMachine with the estimate and the remedies when this machine will not do."""
        shortages = self.shortages(folder)
        if shortages:
            raise NotEnoughMachine(
                f"{self.config.model}: not on this machine ({self.machine.name}): {'; '.join(shortages)}. "
                "Or start it all the same with --force"
            )

    def least_gpu_bytes(self) -> int:
        """Memory that a GPU needs for this training, one sequence at a time."""
        config = self.config.changed(batch_size=1, grad_checkpointing="on", precision="bf16")
        needed = estimate.memory(config, self.architecture, self.quantization, "cuda")
        return round(sum(needed.values()) / _USABLE_MEMORY)

    def show(self, console: Console) -> None:
        """Print the whole plan as tables."""
        console.print(_layers_table(self))
        console.print(_memory_table(self))
        self.show_summary(console)

    def _savings(self) -> str:
        """What is not as it is where memory suffices, and how several GPUs share."""
        shown = [name for name in _PLAIN if name != "grad_checkpointing" and getattr(self.config, name) != _PLAIN[name]]
        found = [f"{name.replace('_', '-')} {getattr(self.config, name)}" for name in shown]
        if self.machine.gpus > 1:
            found.append(f"ZeRO stage {self.zero_stage}")
        return "".join(f", {each}" for each in found)

    def show_summary(self, console: Console) -> None:
        """Print size, memory, steps and time in a few lines."""
        c, m, s = self.config, self.machine, self.sizes
        tokens = self.steps * self.tokens_per_step
        before = f" after {c.rotation_steps:,} for the rotations" if c.rotation_steps else ""
        kept = (
            f"\nrotations stay Hadamard's: learning them would take {size(self.rotations_need)} of each device's memory"
            f"{'' if c.low_memory else ' (less with --low-memory)'}"
            if self.rotations_need
            else ""
        )
        for line in (
            f"file      {size(s.total_bytes)} without its tokenizer, from {size(s.fp16_bytes)} in FP16: {s.ratio:.2f}× "
            f"smaller, {s.bits_per_weight:.2f} bits a weight in the 2-bit layers",
            f"machine   {m.name}, {size(m.memory_bytes)} free, {m.flops / 1e12:.3g} TFLOP/s; training takes about "
            f"{size(self.memory_bytes)}{' of each' if m.gpus > 1 else ''}, a checkpoint {size(self.checkpoint_bytes)} "
            "of disk",
            f"training  {self.steps:,} steps of {c.batch_size} × {c.grad_accum} sequences "
            f"× {c.seq_len} tokens = {tokens:,} tokens{before}, about "
            f"{duration(self.seconds)} ({c.precision}, gradient checkpointing {c.grad_checkpointing}, compile "
            f"{c.compile}{self._savings()}){kept}"
            if self.steps
            else "training  none",
        ):
            console.print(line, highlight=False, soft_wrap=True)


def size(nbytes: float) -> str:
    """ "13.5 GB", "2.1 MB", "38 kB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes / 1e3:,.0f} kB"


def quantization_of(config: QuantizeConfig, architecture: Architecture) -> Quantization:
    """The file's scheme, or that of a run which cannot become a file. Raises BadOption for a layer not there."""
    names = ("method", "group_size", "a_bits", "kv_bits", "head_bits", "embed_bits", "r1", "r2", "r3", "r4")
    found = {name: getattr(config, name) for name in names}
    return read_scheme(found | {"group_size_overrides": _group_size_overrides(config, architecture)})


def _group_size_overrides(config: QuantizeConfig, architecture: Architecture) -> dict[str, int]:
    """Names of linears, as the file has them, whose group size is not the common one."""
    sizes: dict[str, int] = {}
    for each in config.group_size_of:
        which, _, size = each.partition("=")
        layer, _, projection = which.rpartition(".")
        layer = layer and spec.layer_prefix(int(layer.rpartition(".")[2]))
        kind = projection.removesuffix("_proj")
        linears = [
            name
            for name in spec.linear_names(architecture)
            if name.startswith(layer) and name.rpartition(".")[2] == kind
        ]
        if not linears:
            raise BadOption(
                f"group_size_of: {each}, but the model has layers 0 to {architecture.num_layers - 1}; choose another"
            )
        sizes |= dict.fromkeys(linears, int(size))
    return {name: size for name, size in sizes.items() if size != config.group_size}


def group_sizes(architecture: Architecture, quantization: Quantization, kind: str) -> list[int]:
    """The group size of each layer's linear of this kind ("mlp.down")."""
    return [quantization.group_of(spec.layer_prefix(i) + kind) for i in range(architecture.num_layers)]


def make_plan(config: QuantizeConfig, architecture: Architecture, tied: bool, machine: Machine) -> Plan:
    """Decide every open setting and estimate. architecture, tied: of the original. Raises BadOption."""
    given, original = config, architecture
    one = _one_table(config, tied)
    config = _with_rates(config, architecture)
    seq_len = config.seq_len or min(DEFAULT_SEQ_LEN, architecture.max_position_embeddings)
    if seq_len > architecture.max_position_embeddings:
        raise BadOption(
            f"seq_len: {seq_len} is longer than the model's context of {architecture.max_position_embeddings} tokens"
        )
    if config.precision == "bf16" and machine.kind == "cpu":
        raise BadOption("precision: bf16 needs a CUDA device; on a CPU use fp32")
    if config.optimizer_states == "int8" and not machine.eight_bits:
        raise BadOption("optimizer_states: int8 needs torchao: pip install 'rcpconv[low-memory]', or use bf16")
    precision = config.precision if config.precision != "auto" else ("bf16" if machine.kind == "cuda" else "fp32")
    if config.method in UNTRAINED or config.steps == 0:
        config = config.changed(steps=0, tokens=None, data=())
    else:
        config = config.changed(
            tokens=config.tokens or (None if config.steps else DEFAULT_TOKENS),
            data=config.data or ((DEMO,) if config.model == DEMO else (DEFAULT_CORPUS,)),
        )
    config = config.changed(
        device=machine.device,
        precision=precision,
        seq_len=seq_len,
        tables="one" if one else "two",
        compile=("on" if machine.compiles else "off") if config.compile == AUTO else config.compile,
    )
    learns = (config.r1 or config.r2) and config.steps != 0
    learns = learns and bool(config.rotation_share if config.rotation_steps is None else config.rotation_steps)
    turned = one and config.r1 and learns  # by a learned rotation, which a head has to turn back
    architecture = replace(architecture, tied_table=one, head_matrix=turned)
    quantization = quantization_of(config, architecture)
    config, memory = _fit_memory(config, architecture, quantization, machine)
    rotation_steps = _rotation_steps(config) if learns else 0
    rotation_batch, rotation_memory = 0, dict[str, int]()
    if learns:
        rotation_batch, rotation_memory = _fit_rotations(config, architecture, quantization, machine)
        needed = sum(rotation_memory.values())
        if config.rotation_steps is None and (
            not rotation_steps or needed > _USABLE_MEMORY * machine.memory_bytes
        ):  # not worth it, or not possible: so without
            plan = make_plan(given.changed(rotation_steps=0), original, tied, machine)
            return replace(plan, rotations_need=needed if rotation_steps else 0)
    config = config.changed(rotation_steps=rotation_steps)
    zero_stage = 3
    if machine.gpus > 1 and not config.starts_whole:
        for stage in (1, 2) if estimate.own_batches(config, machine.gpus)[1] > 1 else (2,):
            faster = estimate.memory(config, architecture, quantization, machine.kind, machine.gpus, zero_stage=stage)
            if sum(faster.values()) <= _WITH_ROOM[machine.kind] * machine.memory_bytes:
                zero_stage, memory = stage, faster
                break
    steps = config.steps
    if config.tokens:
        steps = max(1, round(config.tokens / _step_tokens(config)) - rotation_steps)
    assert steps is not None
    of_machine = (architecture, machine.kind, machine.flops, machine.gpus)
    seconds = steps * estimate.step_seconds(config, *of_machine, zero_stage=zero_stage)
    if rotation_steps:
        seconds += rotation_steps * estimate.rotation_seconds(config, *of_machine, rotation_batch)
    return Plan(
        config=config,
        architecture=architecture,
        quantization=quantization,
        tied=tied,
        machine=machine,
        sizes=account(architecture, quantization, tied_checkpoint=tied),
        memory=memory,
        checkpoint_bytes=estimate.checkpoint_bytes(config, architecture, quantization) if steps else 0,
        steps=steps,
        seconds=seconds,
        zero_stage=zero_stage,
        rotation_batch=rotation_batch,
        rotation_memory=rotation_memory,
    )


def _rotation_steps(config: QuantizeConfig) -> int:
    """Decided; each has as many tokens as one of training."""
    if config.rotation_steps is not None:
        return config.rotation_steps
    tokens = _step_tokens(config)
    share = config.rotation_share * (config.tokens / tokens if config.tokens else config.steps or 0)
    found = round(min(share, MOST_ROTATION_TOKENS / tokens))
    return found if found >= LEAST_ROTATION_STEPS else 0


def _fit_rotations(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, machine: Machine
) -> tuple[int, dict[str, int]]:
    """The largest batch of a step of learning rotations that fits with room left, or at all, or one; and its memory."""
    sequences, batches = estimate.own_batches(config, machine.gpus)
    own = sequences * batches
    for share in (_WITH_ROOM[machine.kind], _USABLE_MEMORY):
        for size in (size for size in range(own, 0, -1) if own % size == 0):
            memory = estimate.rotation_memory(config, architecture, quantization, machine.kind, size)
            if sum(memory.values()) <= share * machine.memory_bytes:
                return size, memory
    return 1, memory


def _step_tokens(config: QuantizeConfig) -> int:
    assert config.batch_size is not None and config.grad_accum is not None and config.seq_len is not None
    return config.batch_size * config.grad_accum * config.seq_len


def _one_table(config: QuantizeConfig, tied: bool) -> bool:
    if config.tables == "one" and not tied:
        raise BadOption(f"tables: one, but {config.model} has separate embedding and head; use two")
    return config.tables == "one" or (config.tables == "auto" and tied and config.head_bits == config.embed_bits)


def _with_rates(config: QuantizeConfig, architecture: Architecture) -> QuantizeConfig:
    c = config
    lr = c.lr or float(f"{c.lr_factor * 2e-5 * (4096 / architecture.hidden_size) ** 1.5:.2g}")
    return c.changed(
        lr=lr,
        quantizer_lr=float(f"{c.quantizer_factor * lr:.6g}") if c.quantizer_lr is None else c.quantizer_lr,
        clip_lr=float(f"{c.clip_factor * lr:.6g}") if c.clip_lr is None else c.clip_lr,
    )


def _fit_memory(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, machine: Machine
) -> tuple[QuantizeConfig, dict[str, int]]:
    """Decide the settings that save memory: the first combination that fits with room left, or at all, or the last."""
    for share in (_WITH_ROOM[machine.kind], _USABLE_MEMORY):
        for candidate in _candidates(config, machine):
            memory = estimate.memory(candidate, architecture, quantization, machine.kind, machine.gpus)
            if sum(memory.values()) <= share * machine.memory_bytes:
                return candidate, memory
    return candidate, memory


def _candidates(config: QuantizeConfig, machine: Machine) -> Iterator[QuantizeConfig]:
    """Combinations of the open settings: first those that change nothing but speed, the fastest first, then others.

    With low_memory, the others come before batches so small that a step takes about twice as long.
    """
    plain = {name: value for name, value in _PLAIN.items() if getattr(config, name) == AUTO}
    now = config.changed(**plain)
    exact = [now]
    if "grad_checkpointing" in plain:
        now = now.changed(grad_checkpointing="on")
        exact.append(now)
    large, small = _batches(now, machine.gpus)
    saving = []
    for name, value in _savings(config, machine):
        if name in plain:
            now = now.changed(**{name: value})
            saving.append(now)
    saving_large, saving_small = _batches(now, machine.gpus)
    order = [(exact, large), (exact, small), (saving, saving_large), (saving, saving_small)]
    if config.low_memory:
        order[1], order[2] = order[2], order[1]
    for stages, batches in order:
        for stage in stages:
            for size, accum in batches:
                yield stage.changed(batch_size=size, grad_accum=accum)


def _savings(config: QuantizeConfig, machine: Machine) -> Iterator[tuple[str, str]]:
    """Settings that save memory beyond recomputing activations, the most harmless first."""
    if config.grad_accum in (None, 1) and machine.gpus == 1:
        yield "step_in_backward", "on"
    if config.low_memory:
        if config.optimizer == "adamw":
            yield "optimizer_states", "bf16"
        yield "teacher_weights", "int8"
        if config.optimizer == "adamw":
            if machine.eight_bits:
                yield "optimizer_states", "int8"
            if not config.ema:
                yield "master_weights", "bf16"


def _batches(config: QuantizeConfig, gpus: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Sizes and accumulations of large batches, and of small ones; each GPU has a share of every step."""
    total = gpus * math.ceil(config.step_sequences / gpus)
    if config.batch_size is not None:
        sizes = [config.batch_size]
    elif config.grad_accum is not None:
        sizes = [max(1, total // config.grad_accum)]
    else:
        sizes = [size for size in (8, 4, 2, 1) if size * gpus <= total and (gpus > 1 or total % size == 0)]
    pairs = [
        (size, config.grad_accum or (1 if config.step_in_backward == "on" else max(1, total // size))) for size in sizes
    ]
    return pairs[:2], pairs[2:]


def _layers_table(plan: Plan) -> Table:
    a, q = plan.architecture, plan.quantization
    table = Table("layers", "shape", "group", "form", "FP16", "file", title=plan.config.model, title_justify="left")
    for column in table.columns[-2:]:
        column.justify = "right"
    for kind in spec.LINEARS:
        n, k = spec.linear_shape(a, kind)
        after = _file_bytes(plan, kind)
        sizes = sorted(set(group_sizes(a, q, kind)))
        group = " or ".join(f"{size}" + (f", last {k % size}" if k % size else "") for size in sizes)
        table.add_row(
            f"{kind} × {a.num_layers}", f"{n} × {k}", group, "2-bit", size(2 * n * k * a.num_layers), size(after)
        )
    for name, bits in ((spec.EMBED, q.embed_bits), (spec.HEAD, q.head_bits)):
        nbytes = 2 * a.vocab_size * a.hidden_size
        before = "tied" if name == spec.HEAD and plan.tied else size(nbytes)
        after_text = "the embedding" if name == spec.HEAD and a.tied_table else size(nbytes * bits // 16)
        table.add_row(name, f"{a.vocab_size} × {a.hidden_size}", "", f"{bits}-bit", before, after_text)
    table.add_section()
    table.add_row("all", "", "", "", size(plan.sizes.fp16_bytes), size(plan.sizes.total_bytes))
    return table


def _file_bytes(plan: Plan, kind: str) -> int:
    """Bytes of all 2-bit layers of this kind in the file."""
    a, q = plan.architecture, plan.quantization
    n, k = spec.linear_shape(a, kind)
    levels = spec.LEVELS_PER_GROUP * sum(spec.ceil_div(k, size) for size in group_sizes(a, q, kind))
    return n * (a.num_layers * (spec.ceil_div(k, spec.CODES_PER_BYTE) + _FLOAT32) + levels)


def _memory_table(plan: Plan) -> Table:
    each = "bytes of each GPU" if plan.machine.gpus > 1 else "bytes"
    table = Table("memory for", each, title=f"estimate, {estimate.calibration().says()}", title_justify="left")
    table.columns[1].justify = "right"
    if plan.rotation_memory:
        table.add_row("learning rotations, before", size(sum(plan.rotation_memory.values())))
        table.add_section()
    for name, nbytes in plan.memory.items():
        table.add_row(name, size(nbytes))
    table.add_section()
    table.add_row("all", size(sum(plan.memory.values())))
    return table
