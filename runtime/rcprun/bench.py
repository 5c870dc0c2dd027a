"""How fast a model runs: prefill and decode at several depths, for `rcp-run bench`. Knows nothing of text.

Tests are named as llama-bench names them: pp512 computes a prompt of 512 tokens, tg128 generates 128, @ d4096 with
4,096 tokens in the KV cache already. Nothing is sampled. Beyond rcprun.backends.Backend, a backend may have:

    describe() -> str                            the device and its highest clock
    clocks() -> dataclass of int, or None        what it runs at now, in MHz
    memory_report: str                           what it asked of the device's memory
    read_bandwidth() -> float                    bytes a second that it was measured to read
    decode_greedy(count, batch=1) -> list[int]   goes on with the likeliest tokens, without the host in between
    max_batch: int                               how many copies of the sequence decode_greedy can go on with at a time
    fork(batch)                                  makes these copies; comes before decode_greedy where batch is not 1
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcpformat import spec
from rcpformat.architecture import Architecture
from rcpformat.reader import RcpFile
from rcprun.backends import Backend
from rcprun.errors import BadRequest, ContextOverflow
from rcprun.model import load, open_file
from rcprun.output import replacing

DEFAULT_PROMPTS = (512, 2048)
DEFAULT_GENERATED = (128,)
DEFAULT_DEPTHS = (0, 512, 4096, 16384)
_SHARE = '"of bandwidth": weights once a step, and each sequence\'s keys and values'
_KV_STEP_AND_LOW = 4
"""Bytes beside the codes of each vector in the KV cache."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test: a prompt of some tokens, or some tokens generated after `depth` others."""

    tokens: int
    decode: bool
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench writes it."""
        deep = f" @ d{self.depth}" if self.depth else ""
        return f"{'tg' if self.decode else 'pp'}{self.tokens}{deep}" + (f" × {self.batch}" if self.batch > 1 else "")

    @property
    def start(self) -> int:
        """Tokens in the cache before the clock starts: a generation continues at least one."""
        return max(self.depth, 1) if self.decode else 0

    @property
    def context(self) -> int:
        """Tokens that the cache must hold."""
        return self.start + self.tokens


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one test gave."""

    case: Case
    rates: list[float]
    """Tokens per second, all sequences of a batch together, of each repetition."""
    step_bytes: float
    """Bytes of weights and KV cache, as the format packs them, that a step of a generation reads; 0 for prompts."""
    bandwidth: float | None
    """Bytes per second that the backend can read, where it knows."""
    clocks: dict[str, int] | None = None
    """Of the device when the test ended, in MHz, where it knows."""

    @property
    def mean(self) -> float:
        """Tokens per second."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; 0 for a single repetition."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bandwidth_share(self) -> float | None:
        """Bytes read per second over what the backend can read; None for prompts, or where that is not known."""
        if not self.case.decode or self.bandwidth is None:
            return None
        return self.step_bytes * self.mean / self.case.batch / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "test": self.case.name,
            "tokens": self.case.tokens,
            "depth": self.case.depth,
            "batch": self.case.batch,
            "tokens_per_second": self.mean,
            "deviation": self.deviation,
            "repetitions": self.rates,
            "step_bytes": self.step_bytes,
            "bandwidth_share": self.bandwidth_share,
            "clocks_mhz": self.clocks,
        }


def plan(
    trained: int,
    prompts: Sequence[int] | None,
    generated: Sequence[int] | None,
    depths: Sequence[int] | None,
    batches: Sequence[int],
) -> tuple[list[Case], list[Case]]:
    """The tests to run, and those left out since they exceed `trained`, the model's context in tokens.

    None stands for the defaults. Raises ContextOverflow for a test that was asked for, BadRequest when none is left.
    """
    sizes = [size for size in (DEFAULT_PROMPTS if prompts is None else prompts) if size]
    cases = [Case(tokens=size, decode=False) for size in sizes]
    cases += [
        Case(tokens=size, decode=True, depth=depth, batch=batch)
        for batch in batches
        for depth in (DEFAULT_DEPTHS if depths is None else depths)
        for size in (DEFAULT_GENERATED if generated is None else generated)
        if size
    ]
    fitting = [case for case in cases if case.context <= trained]
    beyond = [case for case in cases if case.context > trained]
    for case in beyond:
        by_default = depths is None and (case.depth or generated is None) if case.decode else prompts is None
        if not by_default:
            raise ContextOverflow(
                f"{case.name}: {case.context} tokens do not fit into the model's context of {trained}"
            )
    if not fitting:
        raise BadRequest(f"nothing to measure within the model's context of {trained} tokens; give other -p, -n or -d")
    return fitting, beyond


def measure(backend: Backend, file: RcpFile, cases: Sequence[Case], repetitions: int) -> Iterator[Row]:
    """Run the tests one by one, each after a run that does not count, on random tokens.

    Raises BadRequest for a batch that the backend cannot do.
    """
    largest = getattr(backend, "max_batch", 1)
    for case in cases:
        if case.batch > largest:
            raise BadRequest(
                f"--batch {case.batch}: the {backend.name} backend decodes at most {largest} sequence(s) at a time"
            )
    bandwidth = backend.read_bandwidth() if hasattr(backend, "read_bandwidth") else None
    vocabulary = file.architecture.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, max(case.context for case in cases)).tolist()
    for case in cases:
        backend.truncate(0)
        if case.start:
            backend.forward(tokens[: case.start])
        seconds = [_seconds(backend, case, tokens) for _ in range(repetitions + 1)][1:]
        yield Row(
            case=case,
            rates=[case.tokens * case.batch / each for each in seconds],
            step_bytes=_step_bytes(file, case) if case.decode else 0.0,
            bandwidth=bandwidth,
            clocks=_clocks(backend),
        )


def _seconds(backend: Backend, case: Case, tokens: list[int]) -> float:
    """One run of a test. The cache begins with the case's first `start` tokens, and does so afterwards."""
    new = tokens[case.start : case.context]
    if not case.decode:
        backend.truncate(0)
        return _timed(lambda: backend.forward(new))
    backend.truncate(case.start - 1)
    backend.forward(tokens[case.start - 1 : case.start])  # a generation continues from the logits of the last token
    if case.batch > 1:
        backend.fork(case.batch)  # type: ignore[attr-defined]
    if hasattr(backend, "decode_greedy"):
        return _timed(lambda: backend.decode_greedy(len(new), *([case.batch] if case.batch > 1 else [])))
    return _timed(lambda: [backend.forward([token]) for token in new])


def _clocks(backend: Backend) -> dict[str, int] | None:
    found = backend.clocks() if hasattr(backend, "clocks") else None
    return None if found is None else dataclasses.asdict(found)


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def weight_bytes(file: RcpFile) -> int:
    """Bytes of the file that the computation of every token reads: all layers and the head's table (and matrix)."""
    table = spec.EMBED if file.architecture.tied_table else spec.HEAD
    read = ("layers.", f"{table}.", spec.HEAD_MATRIX)
    return sum(entry.nbytes for name, entry in file.header_tensors.items() if name.startswith(read))


def cache_bytes(architecture: Architecture, kv_bits: int, length: int) -> int:
    """Bytes of the KV cache that attention reads for one token when `length` tokens are in it."""
    a = architecture
    visible = sum(min(length, a.window(layer) or length) for layer in range(a.num_layers))
    return visible * 2 * a.num_kv_heads * (a.head_dim * kv_bits // 8 + _KV_STEP_AND_LOW)


def _step_bytes(file: RcpFile, case: Case) -> float:
    """Of the mean step of a generation."""
    lengths = range(case.start + 1, case.context + 1)
    cache = statistics.fmean(cache_bytes(file.architecture, file.quantization.kv_bits, length) for length in lengths)
    return weight_bytes(file) + case.batch * cache


def bench_file(
    model: str,
    *,
    backend: str,
    verify: bool,
    prompts: Sequence[int] | None,
    generated: Sequence[int] | None,
    depths: Sequence[int] | None,
    batches: Sequence[int],
    repetitions: int,
    json_path: Path | None,
    force: bool,
) -> None:
    """Measure a model; print a markdown table row by row, then what was measured on what, and write all as JSON.

    Raises RcpRunError as `load`, `plan` and `measure` do.
    """
    file = open_file(model, verify=verify)
    cases, beyond = plan(file.architecture.max_position_embeddings, prompts, generated, depths, batches)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(json_path, force=force)) if json_path else None
        running = load(
            file.path,
            backend=backend,
            context=max(case.context for case in cases),
            parallel=max(case.batch for case in cases),
        ).backend
        rows = []
        for row in measure(running, file, cases, repetitions):
            rows.append(row)
            _print_row(row, heading=len(rows) == 1)
        facts = {
            "file": str(file.path),
            "bytes": file.path.stat().st_size,
            "backend": running.name,
            "device": running.describe() if hasattr(running, "describe") else None,
            "processor": _processor(),
            "threads": _threads(),
            "memory": getattr(running, "memory_report", None),
            "clocks_mhz": rows[-1].clocks,
            "read_bandwidth": rows[0].bandwidth,
            "repetitions": repetitions,
            "beyond_context": [case.name for case in beyond],
        }
        _print_facts(facts)
        if temporary:
            report = facts | {"rows": [row.to_json() for row in rows]}
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _print_row(row: Row, *, heading: bool) -> None:
    share = row.bandwidth_share
    if heading:
        last = "" if row.bandwidth is None else " of bandwidth |"
        print(
            f"| {'test':18} | {'tokens/s':>20} |{last}\n| {'-' * 18} | {'-' * 19}: |" + ("" if not last else " ---: |")
        )
    rate = f"{row.mean:.2f} ± {row.deviation:.2f}"
    last = "" if row.bandwidth is None else f" {'' if share is None else f'{share:.1%}':>12} |"
    print(f"| {row.case.name:18} | {rate:>20} |{last}", flush=True)


def _print_facts(facts: dict[str, Any]) -> None:
    on = " on ".join(str(part) for part in (facts["backend"], facts["device"]) if part)
    print(f"\n{facts['file']}: {facts['bytes'] / 2**20:.1f} MiB")
    print(f"{on}; {facts['processor']}, {facts['threads']} threads; {facts['repetitions']} repetitions after a warm-up")
    if facts["memory"]:
        print(facts["memory"])
    if facts["clocks_mhz"]:
        clocks = facts["clocks_mhz"].items()
        print(f"clocks at the end: {', '.join(f'{name} {rate:,} MHz' for name, rate in clocks)}")
    if facts["read_bandwidth"] is not None:
        print(f"reads {facts['read_bandwidth'] / 1e9:,.0f} GB/s, measured; {_SHARE}")
    if facts["beyond_context"]:
        print(f"not measured, beyond the model's context: {', '.join(facts['beyond_context'])}")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _threads() -> int:
    """Threads of the process's linear algebra: those that its variables ask for, else one a core."""
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return os.cpu_count() or 1
