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
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rcpconv.config import AUTO, DEFAULT_CORPUS, DEMO, UNTRAINED, QuantizeConfig
from rcpconv.errors import BadOption, NotEnoughMachine
from rcpconv.scheme import read_scheme
from rcpconv.train.losses import CPU_CHUNK, CUDA_CHUNK
from rcpconv.train.progress import duration
from rcpformat import spec
from rcpformat.accounting import Accounting, account
from rcpformat.architecture import Architecture, Quantization

DEFAULT_TOKENS = 20_000_000
DEFAULT_SEQ_LEN = 2048
DEFAULT_SEQUENCES = 8
"""Sequences of an optimizer step."""

CPU_SECONDS = 2 * 3600
"""A training that takes longer on a CPU is refused."""
_USABLE_MEMORY = 0.92
_FLOAT32, _BFLOAT16 = 4, 2
_QUANTIZER_PARAMETERS = 4
"""Of each group: beta, gamma, s1, s2."""
_OPTIMIZER_STATES = 2

# What a step costs. Matmuls: this share of the measured rate; on a CPU with all that goes with them. On CUDA beside
# them: seconds a byte that the backward pass keeps, a measure of a layer's elementwise work (wiki-llama-22m trains
# at 234,000 tokens/s on an H200, docs/log.md), a quarter of it when compiled. For each batch: quantizing a weight,
# forward and backward, and launching a layer's operations.
_EFFICIENCY = {"cpu": 0.45, "cuda": 0.6}
_SECONDS_PER_SAVED_BYTE = {"cpu": 0.0, "cuda": 1.2e-11}
_COMPILED = 0.25
_SECONDS_PER_WEIGHT = {"cpu": 5e-8, "cuda": 4e-11}
_SECONDS_PER_LAYER = {"cpu": 0.0, "cuda": 1.5e-3}

_SAVED_HIDDEN, _SAVED_ATTENTION, _SAVED_KV, _SAVED_MLP = 26, 17, 33, 21
"""Bytes that the backward pass of a layer keeps of a token: for each channel of the residual stream, of the queries, of
keys and values together, and of the MLP. Measured with saved-tensor hooks, as tests/rcpconv/train/test_plan.py does."""


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
        return Machine(device="cpu", name=name, memory_bytes=_free_memory(), flops=_matmul_rate("cpu"))
    device = "cuda:0" if device in ("auto", "cuda") else device
    if int(device.partition(":")[2]) >= torch.cuda.device_count():
        raise NotEnoughMachine(f"device {device}: expected one of {torch.cuda.device_count()} CUDA devices")
    return Machine(
        device=device,
        name=torch.cuda.get_device_name(device),
        memory_bytes=torch.cuda.mem_get_info(device)[0],
        flops=_matmul_rate(device),
        compiles=find_spec("triton") is not None,
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
    """Of the file: tied_table is decided."""
    quantization: Quantization
    tied: bool
    """Whether the original has one table for embedding and head."""
    machine: Machine
    sizes: Accounting
    memory: dict[str, int]
    """Bytes of device memory by what they are for."""
    checkpoint_bytes: int
    steps: int
    seconds: float

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        c = self.config
        assert c.batch_size is not None and c.grad_accum is not None and c.seq_len is not None
        return c.batch_size * c.grad_accum * c.seq_len

    @property
    def memory_bytes(self) -> int:
        """All of `memory`."""
        return sum(self.memory.values())

    def shortages(self, folder: Path) -> list[str]:
        """Why this machine will not do, each with its remedy; empty when it will. folder: where runs go."""
        c, m = self.config, self.machine
        found = []
        if self.memory_bytes > _USABLE_MEMORY * m.memory_bytes:
            found.append(f"{size(m.memory_bytes)} of memory are free, about {size(self.memory_bytes)} are needed")
        if m.kind == "cpu" and self.seconds > CPU_SECONDS:
            found.append(f"the training would take about {duration(self.seconds)}")
        if found:
            remedy = "use a smaller model, or less text (--tokens, --seq-len)"
            found = [
                f"{'; '.join(found)}: use a CUDA GPU with {size(self.least_gpu_bytes())} of free memory, or {remedy}"
            ]
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disk = shutil.disk_usage(existing).free
        kept = c.keep_checkpoints + 1 if c.checkpoint_every else 1
        result = self.sizes.total_bytes
        if result > disk:
            found.append(f"{size(disk)} of disk are free in {existing}, the result takes {size(result)}: make room")
        elif self.checkpoint_bytes * kept + result > disk:
            found.append(
                f"{size(disk)} of disk are free in {existing}, {kept} checkpoints and the result take "
                f"{size(self.checkpoint_bytes * kept + result)}: use --keep-checkpoints 1, or --checkpoint-every 0 for "
                "none"
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
        gpu = replace(self.machine, device="cuda:0")
        return round(sum(_memory(config, self.architecture, self.quantization, gpu).values()) / _USABLE_MEMORY)

    def show(self, console: Console) -> None:
        """Print the whole plan as tables."""
        console.print(_layers_table(self))
        console.print(_memory_table(self))
        self.show_summary(console)

    def show_summary(self, console: Console) -> None:
        """Print size, memory, steps and time in a few lines."""
        c, m, s = self.config, self.machine, self.sizes
        tokens = self.steps * self.tokens_per_step
        for line in (
            f"file      {size(s.total_bytes)} without its tokenizer, from {size(s.fp16_bytes)} in FP16: {s.ratio:.2f}× "
            f"smaller, {s.bits_per_weight:.2f} bits a weight in the 2-bit layers",
            f"machine   {m.name}, {size(m.memory_bytes)} free, {m.flops / 1e12:.3g} TFLOP/s; training takes about "
            f"{size(self.memory_bytes)}, a checkpoint {size(self.checkpoint_bytes)} of disk",
            f"training  {self.steps:,} steps of {c.batch_size} × {c.grad_accum} sequences × {c.seq_len} tokens = "
            f"{tokens:,} tokens, about {duration(self.seconds)} ({c.precision}, gradient checkpointing "
            f"{c.grad_checkpointing}, compile {c.compile})"
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


def quantization_of(config: QuantizeConfig) -> Quantization:
    """The file's scheme, or that of a run which cannot become a file."""
    names = ("method", "group_size", "a_bits", "kv_bits", "head_bits", "embed_bits", "r1", "r2", "r3", "r4")
    return read_scheme({name: getattr(config, name) for name in names})


def make_plan(config: QuantizeConfig, architecture: Architecture, tied: bool, machine: Machine) -> Plan:
    """Decide every open setting and estimate. architecture, tied: of the original. Raises BadOption."""
    one = _one_table(config, tied)
    architecture = replace(architecture, tied_table=one)
    config = _with_rates(config, architecture)
    seq_len = config.seq_len or min(DEFAULT_SEQ_LEN, architecture.max_position_embeddings)
    if seq_len > architecture.max_position_embeddings:
        raise BadOption(
            f"seq_len: {seq_len} is longer than the model's context of {architecture.max_position_embeddings} tokens"
        )
    if config.precision == "bf16" and machine.kind == "cpu":
        raise BadOption("precision: bf16 needs a CUDA device; on a CPU use fp32")
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
    quantization = quantization_of(config)
    config, memory = _fit_memory(config, architecture, quantization, machine)
    assert config.batch_size is not None and config.grad_accum is not None
    per_step = config.batch_size * config.grad_accum * seq_len
    steps = max(1, round(config.tokens / per_step)) if config.tokens else config.steps
    assert steps is not None
    parameters = memory["weights and quantizers"]
    return Plan(
        config=config,
        architecture=architecture,
        quantization=quantization,
        tied=tied,
        machine=machine,
        sizes=account(architecture, quantization, tied_checkpoint=tied),
        memory=memory,
        checkpoint_bytes=(1 + _optimizer_states(config)) * parameters if steps else 0,
        steps=steps,
        seconds=steps * _step_seconds(config, architecture, machine),
    )


def _one_table(config: QuantizeConfig, tied: bool) -> bool:
    if config.tables == "one" and not tied:
        raise BadOption(f"tables: one, but {config.model} has separate embedding and head; use two")
    return config.tables == "one" or (config.tables == "auto" and tied and config.head_bits == config.embed_bits)


def _with_rates(config: QuantizeConfig, architecture: Architecture) -> QuantizeConfig:
    lr = config.lr or float(f"{2e-5 * (4096 / architecture.hidden_size) ** 1.5:.2g}")
    tenfold = float(f"{10 * lr:.6g}")
    return config.changed(
        lr=lr,
        quantizer_lr=tenfold if config.quantizer_lr is None else config.quantizer_lr,
        clip_lr=tenfold if config.clip_lr is None else config.clip_lr,
    )


def _fit_memory(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, machine: Machine
) -> tuple[QuantizeConfig, dict[str, int]]:
    """Decide batch size, accumulation and checkpointing: the first combination that fits, else the smallest."""
    for candidate in _batches(config):
        memory = _memory(candidate, architecture, quantization, machine)
        if sum(memory.values()) <= _USABLE_MEMORY * machine.memory_bytes:
            break
    return candidate, memory


def _batches(config: QuantizeConfig) -> Iterator[QuantizeConfig]:
    """Combinations of the open settings, the fastest first."""
    switches = ("off", "on") if config.grad_checkpointing == "auto" else (config.grad_checkpointing,)
    total = DEFAULT_SEQUENCES
    if config.batch_size is not None:
        sizes = [config.batch_size]
    elif config.grad_accum is not None:
        sizes = [max(1, total // config.grad_accum)]
    else:
        sizes = [8, 4, 2, 1]
    for group in (sizes[:2], sizes[2:]):
        for switch in switches:
            for size in group:
                accum = config.grad_accum or max(1, total // size)
                yield config.changed(batch_size=size, grad_accum=accum, grad_checkpointing=switch)


def _optimizer_states(config: QuantizeConfig) -> int:
    """Float32 values beside each parameter: AdamW's two (Muon has one, for weights), and a running mean."""
    return _OPTIMIZER_STATES + (1 if config.ema else 0)


def _linear_weights(architecture: Architecture) -> int:
    return architecture.num_layers * sum(math.prod(spec.linear_shape(architecture, kind)) for kind in spec.LINEARS)


def _memory(
    config: QuantizeConfig, architecture: Architecture, quantization: Quantization, machine: Machine
) -> dict[str, int]:
    a = architecture
    linear, table = _linear_weights(a), a.vocab_size * a.hidden_size
    shapes = [spec.linear_shape(a, kind) for kind in spec.LINEARS]
    groups = a.num_layers * sum(n * spec.ceil_div(k, quantization.group_size) for n, k in shapes)
    trained = _FLOAT32 * (linear + table * (1 if a.tied_table else 2) + _QUANTIZER_PARAMETERS * groups)
    half = config.precision == "bf16"
    kept = _BFLOAT16 if half else _FLOAT32
    assert config.batch_size is not None and config.seq_len is not None
    tokens = config.batch_size * config.seq_len
    live_layers = 1 if config.grad_checkpointing == "on" else a.num_layers
    layer_weights = (kept + 1) * linear // a.num_layers  # integers and codes, kept for the backward pass
    activations = (
        live_layers * (tokens * _saved_bytes(a) + layer_weights) + a.num_layers * tokens * _FLOAT32 * a.hidden_size
    )
    largest = max(table, *map(math.prod, shapes))
    chunk = min(tokens * a.vocab_size, CUDA_CHUNK if machine.kind == "cuda" else CPU_CHUNK)
    matched = 2 * a.num_layers * tokens * _FLOAT32 * a.hidden_size if config.hidden_loss else 0
    needs = {
        "weights and quantizers": trained,
        "gradients": trained,
        "optimizer": _optimizer_states(config) * trained,
        "original model": (_BFLOAT16 if half else _FLOAT32) * (linear + 2 * table),
        "activations": round(activations) + matched,
        "working space": _FLOAT32 * (6 * largest + 6 * chunk),
    }
    if config.steps == 0:  # a layer at a time; beside it a matrix in float64, and one with its codes as int64
        layer = _FLOAT32 * (linear + _QUANTIZER_PARAMETERS * groups) // a.num_layers
        return {"weights and quantizers": layer, "working space": 7 * _FLOAT32 * max(map(math.prod, shapes))}
    return needs


def _saved_bytes(architecture: Architecture) -> int:
    """What the backward pass of a layer keeps of a token."""
    a = architecture
    attention = _SAVED_ATTENTION * a.attention_size + _SAVED_KV * a.kv_size
    return _SAVED_HIDDEN * a.hidden_size + attention + _SAVED_MLP * a.intermediate_size


def _step_seconds(config: QuantizeConfig, architecture: Architecture, machine: Machine) -> float:
    """Time of an optimizer step: 6 operations a weight and token for the student, 2 for the teacher, and overhead."""
    assert config.batch_size is not None and config.grad_accum is not None and config.seq_len is not None
    a = architecture
    linear, table = _linear_weights(a), a.vocab_size * a.hidden_size
    attention = a.num_layers * a.attention_size * config.seq_len  # as many weights as its products count for
    passes = 8 + (2 if config.grad_checkpointing == "on" else 0)
    tokens = config.batch_size * config.seq_len
    products = passes * tokens * (linear + table + attention) / (machine.flops * _EFFICIENCY[machine.kind])
    elementwise = _SECONDS_PER_SAVED_BYTE[machine.kind] * tokens * a.num_layers * _saved_bytes(a)
    if config.compile == "on":
        elementwise *= _COMPILED
    overhead = _SECONDS_PER_WEIGHT[machine.kind] * (linear + table) + _SECONDS_PER_LAYER[machine.kind] * a.num_layers
    return config.grad_accum * (products + elementwise + overhead)


def _layers_table(plan: Plan) -> Table:
    a, q = plan.architecture, plan.quantization
    table = Table("layers", "shape", "group", "form", "FP16", "file", title=plan.config.model, title_justify="left")
    for column in table.columns[-2:]:
        column.justify = "right"
    for kind in spec.LINEARS:
        n, k = spec.linear_shape(a, kind)
        after = _file_bytes(plan, kind)
        short = k % q.group_size
        group = f"{q.group_size}" + (f", last {short}" if short else "")
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
    levels = spec.LEVELS_PER_GROUP * spec.ceil_div(k, q.group_size)
    return a.num_layers * n * (spec.ceil_div(k, spec.CODES_PER_BYTE) + levels + _FLOAT32)


def _memory_table(plan: Plan) -> Table:
    table = Table("memory for", "bytes", title="estimate", title_justify="left")
    table.columns[1].justify = "right"
    for name, nbytes in plan.memory.items():
        table.add_row(name, size(nbytes))
    table.add_section()
    table.add_row("all", size(plan.memory_bytes))
    return table
