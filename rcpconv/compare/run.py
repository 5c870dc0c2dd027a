"""`rcpconv compare` as a function: the phases of a comparison, and its output after every cell.

First every sweep, then the original, then one training of each variant that may be best, then more seeds of the best
methods and, in one phase with them so that no GPU waits, ablations and what is not trained. A cell that is done is
never done again, so the same command goes on where it stopped.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rcpconv.checkpoint import load_source
from rcpconv.compare import choice
from rcpconv.compare.clock import Clock
from rcpconv.compare.folder import Folder, Result, opened, shape_of
from rcpconv.compare.plan import FINAL, ORIGINAL, Cell, Comparison
from rcpconv.compare.table import best_methods, summarise, terminal_tables, write_plot, write_tables
from rcpconv.compare.workers import Alone, Does, SideBySide, side_by_side
from rcpconv.compare.workshop import Workshop, plan_cell
from rcpconv.config import DEFAULT_CORPUS
from rcpconv.errors import BadOption, NotEnoughMachine
from rcpconv.generation import PROMPT_TOKENS
from rcpconv.heldout import fetch_wikitext2
from rcpconv.plan import Machine, Plan, look_at_machine, visible_gpus
from rcpconv.quantize import check_texts
from rcpconv.train.progress import duration
from rcpconv.train.stopping import Interrupted, stoppable

_SHAPE = ("seq_len", "batch_size", "grad_accum")
_USABLE_MEMORY = 0.92
_WIDTH = 120
"""Of tables in a file or pipe."""


def compare(
    comparison: Comparison,
    out: Path,
    *,
    device: str = "auto",
    jobs: int = 1,
    keep_runs: bool = False,
    checkpoint_every: int = 0,
    minutes: float | None = None,
    dry_run: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Do what is left of a comparison in folder `out`; returns its summary (None after a dry run, or out of time).

    jobs: how many processes train side by side; they take all GPUs in turn where `device` names none ("cuda:1").
    keep_runs: leave the run folders of the trainings in the table.
    checkpoint_every: steps, to resume from after a kill; 0 = only when stopped by Ctrl-C, SIGTERM or `minutes`.
    minutes: nothing is begun that would probably end later, and what still runs then saves a checkpoint; the same call
    goes on.
    Raises ConversionError, or Interrupted after Ctrl-C or SIGTERM; what is finished is kept.
    """
    console = console or Console()
    clock = Clock(minutes, comparison)
    out = out.absolute()
    shape = shape_of(out, comparison)
    machine = look_at_machine(device)
    gpus = visible_gpus() if machine.kind == "cuda" and ":" not in device else []
    source = load_source(comparison.model, revision=comparison.revision)
    begin_of_generation = PROMPT_TOKENS + comparison.generation_tokens + 1
    if comparison.generations and begin_of_generation > source.architecture.max_position_embeddings:
        raise BadOption(
            f"generation-tokens: {comparison.generation_tokens} do not fit the model's context of "
            f"{source.architecture.max_position_embeddings} tokens after a prompt of {PROMPT_TOKENS}; ask for fewer"
        )

    finals = [Cell(kind=FINAL, variant=v.name, rates=comparison.grid[0]) for v in comparison.variants]
    if shape is None:
        first = plan_cell(comparison, finals[0], source, machine, {}).config
        shape = {name: getattr(first, name) for name in _SHAPE}
    plans = {cell.variant: plan_cell(comparison, cell, source, machine, shape) for cell in finals}
    _show(comparison, plans, shape, machine, out, jobs, gpus, console)
    if dry_run:
        return None
    if not force:
        for each in plans.values():
            each.require_machine(out)
        _require_room(max(each.memory_bytes for each in plans.values()), machine, jobs, gpus)
    trained = next((each.config for each in plans.values() if each.steps), None)
    if trained is not None:
        check_texts(trained)
    if comparison.text == DEFAULT_CORPUS:
        fetch_wikitext2()  # not read yet, but there
    arguments: dict[str, Any] = {
        "comparison": comparison,
        "machine": machine,
        "shape": shape,
        "keep_runs": keep_runs,
        "checkpoint_every": checkpoint_every,
    }

    def tell(happened: str) -> None:
        happened = f"{minutes:g} minutes are over; what is finished is kept" if clock.short else happened
        console.print(f"{happened}. Give the same command again to go on: {out}", highlight=False, soft_wrap=True)

    live = console if console.is_terminal else None
    try:
        with opened(out, comparison, shape) as folder, stoppable(tell), clock.alarm():
            workshop = Workshop(folder=folder, source=source, console=live, **arguments)
            workshop.prepare()
            with _working(jobs, workshop, {"folder": folder, **arguments}, gpus) as work:
                return _phases(comparison, folder, work, clock, machine, console)
    except Interrupted:
        if clock.short:
            return None
        raise


@contextmanager
def _working(jobs: int, workshop: Workshop, arguments: dict[str, Any], gpus: list[str]) -> Iterator[Alone | SideBySide]:
    if jobs == 1:
        yield Alone(workshop)
        return
    with side_by_side(jobs, _make_workshop, arguments, gpus) as work:
        yield work


def _make_workshop(comparison: Comparison, **arguments: Any) -> Does:
    """A workshop in a process of its own."""
    source = load_source(comparison.model, revision=comparison.revision)
    return Workshop(comparison=comparison, source=source, **arguments)


def _phases(
    comparison: Comparison,
    folder: Folder,
    work: Alone | SideBySide,
    clock: Clock,
    machine: Machine,
    console: Console,
) -> dict[str, Any]:
    """Every phase after the one before. Raises Interrupted where time ran out."""
    names = [variant.name for variant in comparison.variants]
    about = {"machine": machine.name, "torch": torch.__version__}

    def candidates() -> list[Cell]:
        return finals(filter(comparison.may_be_best, names))

    def rest() -> list[Cell]:
        best = choice.best_variants(comparison, folder)
        more = [cell for seed in range(1, comparison.seeds) for cell in finals(best, seed)]
        return [*more, *finals(name for name in names if not comparison.may_be_best(name))]

    def finals(of: Iterable[str], seed: int = 0) -> list[Cell]:
        return [cell for name in of if (cell := choice.final(comparison, folder, name, seed))]

    phases: list[Callable[[], list[Cell]]] = [comparison.sweeps, lambda: [Cell(kind=ORIGINAL)], candidates, rest]
    for phase in phases:
        cells = phase()
        left = []
        for cell in cells:
            if (earlier := folder.result(cell)) is None:
                left.append(cell)
            else:
                clock.took(cell, earlier["seconds"], earlier.get("rotation_seconds", 0.0))
        done = len(cells) - len(left)
        for cell, result in work.each(left, clock.may):
            done += 1
            clock.took(cell, result["seconds"], result.get("rotation_seconds", 0.0))
            console.print(f"{done}/{len(cells)} {_line(cell, result)}", highlight=False, soft_wrap=True)
            write_tables(folder, summarise(comparison, folder, about))
        summary = summarise(comparison, folder, about)
        write_tables(folder, summary)
        if done < len(cells):
            raise Interrupted("too little time is left to begin another training", signal.SIGTERM)
        write_plot(folder, summary)  # takes a second, so not after every cell
    wide = console if console.is_terminal else Console(file=console.file, width=_WIDTH)
    for table in terminal_tables(summary):
        wide.print(table)
    if found := best_methods(summary):
        console.print(found, highlight=False, soft_wrap=True)
    if comparison.generations:
        console.print(f"Generations: {summary['verdict']}.", highlight=False, soft_wrap=True)
    console.print(f"{folder.path}: compare.md, compare.json, compare.png", highlight=False, soft_wrap=True)
    return summary


def _line(cell: Cell, result: Result) -> str:
    """What a finished cell found, in a line."""
    if cell.kind == ORIGINAL:
        figures = [f"perplexity {result['heldout']['perplexity']:.3f}"]
    elif result["failed"]:
        figures = [f"failed: {result['failed']}"]
    else:
        figures = [f"validation {result['validation']['perplexity']:.3f}"]
        if cell.kind == FINAL:
            figures.append(f"held-out {result['heldout']['perplexity']:.3f}")
        if result["tokens"]:
            figures.append(f"{result['tokens_per_second']:,.0f} tokens/s")
    rates = "" if cell.rates is None else f" lr {cell.rates.label}"
    what = cell.kind if cell.kind == ORIGINAL else f"{cell.variant} {cell.kind}{rates} seed {cell.seed}"
    return f"{what}: {', '.join(figures)} ({duration(result['seconds'])})"


def _require_room(needed: int, machine: Machine, jobs: int, gpus: list[str]) -> None:
    each = math.ceil(jobs / max(1, len(gpus)))
    if each * needed > _USABLE_MEMORY * machine.memory_bytes:
        raise NotEnoughMachine(
            f"jobs: {each} trainings side by side take about {each * needed / 1e9:.1f} GB, {machine.name} has "
            f"{machine.memory_bytes / 1e9:.1f} GB free; give fewer --jobs, or --force"
        )


def _show(
    comparison: Comparison,
    plans: dict[str, Plan],
    shape: dict[str, int],
    machine: Machine,
    out: Path,
    jobs: int,
    gpus: list[str],
    console: Console,
) -> None:
    """What there is to do, before it is begun."""
    points = len(comparison.grid) if len(comparison.grid) > 1 else 0
    table = Table("variant", "options", "sweep", "final", box=None, pad_edge=False, header_style="bold")
    trained = [plan for plan in plans.values() if plan.steps]
    for variant in comparison.variants:
        options = ", ".join(f"{key} {value}" for key, value in variant.settings.items()) or "as common"
        if plans[variant.name].steps:
            sweep = f"{points} × {comparison.sweep_tokens / 1e6:g} M" if points else "none"
            if points and variant.rates_of:
                sweep = f"{variant.rates_of}'s"
            amounts = [sweep, f"{comparison.tokens / 1e6:g} M tokens"]
        else:
            amounts = ["", "not trained"]
        table.add_row(variant.name, options, *amounts)
    console.print(table)
    short = [name for name, plan in plans.items() if plan.rotations_need]
    if short:
        console.print(
            f"rotations stay Hadamard's in {', '.join(short)}, for learning them would not fit into memory; others may "
            "learn them",
            highlight=False,
            soft_wrap=True,
        )
    tokens = dict.fromkeys((name for name, plan in plans.items() if plan.steps), comparison.tokens)
    for cell in comparison.sweeps():
        tokens[cell.variant] += comparison.sweep_tokens
    methods = {comparison.method(name) for name in plans if comparison.may_be_best(name)}
    again = (comparison.seeds - 1) * min(comparison.best, len(methods)) * comparison.tokens
    seconds = sum(plans[name].seconds * amount / comparison.tokens for name, amount in tokens.items())
    seconds += max((plan.seconds for plan in trained), default=0.0) * again / comparison.tokens
    rates = ", ".join(point.label for point in comparison.grid)
    chosen = f"; chosen on {comparison.validation_tokens:,} tokens kept back from the training text" if points else ""
    for line in (
        f"rates     {rates}, the same for every variant{' with a sweep' if points else ''}{chosen}",
        f"machine   {f'{len(gpus)} × ' if len(gpus) > 1 and jobs > 1 else ''}{machine.name}, {jobs} side by side",
        f"training  {(sum(tokens.values()) + again) / 1e6:,.4g} M tokens in all, of them {again / 1e6:,.4g} M for more "
        f"seeds; steps of {shape['batch_size']} × {shape['grad_accum']} sequences × {shape['seq_len']} tokens; about "
        f"{duration(seconds)} one after another, without compilation and evaluation",
        f"folder    {out}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
