"""Compares training recipes on one checkpoint: many trainings in a few processes on one device.

    python examples/benchmarks/sweep_recipe.py MODEL TRAIN_TEXT SETS OUT [--eval-text TEXT ...] [--processes 3]

Processes take the GPUs there are in turn.

SETS is a TOML file: a table [base] of quantize's settings, and any number of [[set]] with a name and the settings that
differ. Sets are begun in the order of the file, each by the first process that is free; a process shares imports,
checkpoint, teacher, tokens and compiled graphs among its sets. Perplexity is measured on the last part of the training
text, which is kept back from training; on text sampled from the original model, which is like text that the original
has never seen, as the last part of what it was trained on is not; and on every --eval-text, which is reported and
chooses nothing. Each finished set is a line of output at once, and OUT/sweep.json is written anew after each, so that a
sweep that is cut short loses only what is under way; started again with the same OUT and --work, it goes on with what
is missing. OUT/best.tar is the run whose perplexity on the text kept back is lowest so far, for `rcpconv export --run`.
"""

from __future__ import annotations

import json
import lzma
import math
import multiprocessing
import os
import shutil
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from rcpconv.baking import baked_decoder
from rcpconv.checkpoint import SourceModel, load_source
from rcpconv.config import SELF, build_config
from rcpconv.errors import ConversionError
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.plan import Machine, Plan, look_at_machine, make_plan, visible_gpus
from rcpconv.prepare import original_decoder
from rcpconv.quantize import EVALUATION_WINDOW, keep_result, new_run
from rcpconv.runs import FINISHED, METRICS, Run, alone, now, replacing, write_json
from rcpconv.train.beginning import learned_rotations, untrained_student
from rcpconv.train.loop import Trainer
from rcpconv.train.progress import read_metrics
from rcpconv.train.sampling import sample
from rcpconv.train.texts import read_source
from rcpconv.train.tokens import Mixture, Sequences, cached
from rcpconv.train.tokens import tokenize as tokenize_pieces

KEPT, SAMPLED = "kept", "sampled"
"""Texts to measure on, beside those that are named."""
SWEEP, BEST = "sweep.json", "best.tar"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all processes of a sweep are told."""

    model: str
    train: Path
    out: Path
    work: Path
    sets: list[tuple[str, dict[str, Any]]]
    """Name and settings."""
    keep_back: int
    eval_texts: tuple[Path, ...]
    max_eval_tokens: int
    max_report_tokens: int
    sampled_tokens: int
    self_tokens: int
    deadline: float | None
    """By time.time(): no set is begun that would probably end later."""

    @property
    def trains_on_samples(self) -> set[int]:
        """Lengths of sequences that some set wants sampled."""
        return {settings["seq_len"] for _, settings in self.sets if SELF in settings.get("data", ())}


def cut_text(train: Path, keep_back: int, work: Path) -> tuple[Path, str]:
    """The text to train on, as a file, and the text to measure on."""
    with lzma.open(train, "rt", encoding="utf-8") if train.suffix == ".xz" else train.open(encoding="utf-8") as file:
        text = file.read()
    if len(text) < 2 * keep_back:
        raise click.ClickException(f"{train}: {len(text)} characters; keep back fewer than half of them")
    rest = work / "train.txt"
    with alone(rest):
        if not rest.exists():
            with replacing(rest) as temporary:
                temporary.write_text(text[:-keep_back], encoding="utf-8")
    return rest, text[-keep_back:]


class Sweep:
    """What the trainings of a process share."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source: SourceModel = load_source(job.model)
        self.machine: Machine = look_at_machine("auto")
        self.window = min(EVALUATION_WINDOW, self.source.architecture.max_position_embeddings)
        self._teachers: dict[bool, Decoder] = {}
        self._windows: dict[str, list[list[int]]] = {}

    def _cached(self, name: str, rows: Callable[[], Iterator[list[int]]], limit: int) -> NDArray[Any]:
        """Tokens in a file, which the first process that wants it makes while others wait."""
        with alone(self.job.work / name):
            return cached(self.job.work / name, rows, self.source.architecture.vocab_size, limit)

    def _sampled(self, name: str, tokens: int, seq_len: int, seed: int, half: bool) -> NDArray[Any]:
        """Text from the original model, in rows of seq_len."""

        def rows() -> Iterator[list[int]]:
            info = self.source.tokenizer.info
            yield from sample(
                self.teacher(half), info, tokens=tokens, seq_len=seq_len, seed=seed, tell=lambda done: None
            )

        return self._cached(name, rows, tokens)

    def sampled_windows(self) -> list[list[int]]:
        """Text like what the original has never seen, to measure on."""
        tokens = self.job.sampled_tokens
        return cut(self._sampled("sampled.npy", tokens, self.window, seed=1, half=False).tolist(), self.window, tokens)

    def sampled_text(self, seq_len: int) -> NDArray[Any]:
        """Text to train on."""
        half = self.machine.kind == "cuda"
        return self._sampled(f"self-{seq_len}.npy", self.job.self_tokens, seq_len, seed=0, half=half)

    def written_text(self) -> NDArray[Any]:
        """Text to train on, all but what is kept back."""
        rest, kept = cut_text(self.job.train, self.job.keep_back, self.job.work)
        streams = read_source(str(rest), lambda messages: "")
        tokenizer = Tokenizer.from_str(self.source.tokenizer.json.decode())

        def rows() -> Iterator[list[int]]:
            for stream in streams:
                yield from tokenize_pieces(stream, tokenizer, self.source.tokenizer.info)

        def windows(text: str, limit: int) -> list[list[int]]:
            return cut(tokenize(self.source.tokenizer.json, text), self.window, limit)

        if not self._windows:
            self._windows[KEPT] = windows(kept, self.job.max_eval_tokens)
            for path in self.job.eval_texts:
                self._windows[path.stem] = windows(path.read_text(encoding="utf-8"), self.job.max_report_tokens)
        return self._cached("train.npy", rows, np.iinfo(np.int64).max)

    def teacher(self, half: bool) -> Decoder:
        """The original model as trainings take it."""
        if half not in self._teachers:
            dtype = torch.bfloat16 if half else torch.float32
            teacher = original_decoder(self.source, dtype, ComputeOptions(half=half))
            self._teachers[half] = teacher.to(self.machine.device)
        return self._teachers[half]

    def perplexities(self, decoder: Decoder) -> dict[str, float]:
        """On every text."""
        decoder = decoder.to(self.machine.device)
        windows = self._windows | ({SAMPLED: self.sampled_windows()} if self.job.sampled_tokens else {})
        return {name: torch_perplexity(decoder, some, name) for name, some in windows.items()}

    def _sequences(self, plan: Plan) -> Sequences | Mixture:
        """As quantize takes them: of as many tokens as the training needs, from the beginning of the text."""
        c = plan.config
        assert c.seq_len is not None
        seq_len, wanted = c.seq_len, plan.steps * plan.tokens_per_step
        written = Sequences(self.written_text()[: wanted + seq_len], seq_len, c.seed)
        if SELF not in c.data:
            return written
        share = c.self_share if len(c.data) > 1 else 1.0
        limit = min(math.ceil(share * wanted / c.self_epochs), c.self_tokens)
        sampled_N = self.sampled_text(seq_len)
        return Mixture(Sequences(sampled_N[: max(limit, seq_len)], seq_len, c.seed), written, share)

    def run(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Train, bake and measure one set of settings; leaves a finished run."""
        start, graphs = time.perf_counter(), _graphs()
        folder = self.job.work / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        config = build_config(self.job.model, None, settings | {"checkpoint_every": 0})
        plan = make_plan(config, self.source.architecture, self.source.tied_embeddings, self.machine)
        with new_run(folder, plan, self.source) as run:
            with (folder / "log.txt").open("w") as log:
                student = self._trained(run, plan, Console(file=log))
            trained = time.perf_counter()
            keep_result(run, student.pieces(), self.source)
            run.update(status=FINISHED, finished=now())
        decoder = baked_decoder(plan.architecture, plan.quantization, run.baked)
        lines = read_metrics(folder / METRICS)
        return {
            "name": name,
            "perplexity": self.perplexities(decoder),
            "kl": lines[-1]["kl"] if lines else None,
            "tokens_per_second": lines[-1]["tokens_per_second"] if lines else None,
            "steps": plan.steps,
            "graphs": _graphs() - graphs,
            "training_seconds": round(trained - start, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "settings": settings,
        }

    def _trained(self, run: Run, plan: Plan, console: Console) -> Decoder:
        if not plan.steps:
            return untrained_student(plan, self.source)
        teacher, sequences = self.teacher(plan.config.precision == "bf16"), self._sequences(plan)
        learned = learned_rotations(run, plan, self.source, lambda: teacher, sequences, console)
        student = untrained_student(plan, self.source, learned)
        Trainer(
            student=student,
            teacher=teacher,
            sequences=sequences,
            steps=plan.steps,
            config=plan.config,
            run=run,
            console=console,
            keep=False,
            learned=learned,
        ).train()
        return student


def _graphs() -> int:
    """How many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _columns(perplexity: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in perplexity.items())


def read_results(out: Path) -> dict[str, Any]:
    """What is in OUT/sweep.json so far."""
    return json.loads((out / SWEEP).read_text()) if (out / SWEEP).exists() else {"original": None, "sets": []}


def _add(job: Job, row: dict[str, Any]) -> None:
    """Take a finished set into OUT, and print it."""
    with alone(job.work / SWEEP):
        done = read_results(job.out)
        done["sets"].append(row)
        write_json(job.out / SWEEP, done)
        if row is min(done["sets"], key=lambda other: other["perplexity"][KEPT]):
            with replacing(job.out / BEST) as temporary, tarfile.open(temporary, "w") as archive:
                archive.add(job.work / "runs" / row["name"], row["name"])
    click.echo(
        f"{row['name']:28} {_columns(row['perplexity'])}   kl {row['kl'] or 0:.4f}   "
        f"{row['tokens_per_second'] or 0:,.0f} tokens/s   {row['steps']} steps   {row['graphs']} graphs   "
        f"{row['training_seconds']:.0f} + {row['seconds'] - row['training_seconds']:.0f} s"
    )


def work(job: Job, claim: Callable[[], int], gpu: str | None = None) -> None:
    """Train and measure one set after another, until none is left. gpu: the only one to see, before CUDA is used."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 1000
    config.specialize_float = True  # a graph for each value of a setting
    config.automatic_dynamic_shapes = False  # and for each size of a batch
    sweep, longest = Sweep(job), 0.0
    sweep.written_text()
    while (index := claim()) < len(job.sets):
        name, settings = job.sets[index]
        if job.deadline is not None and time.time() + longest > job.deadline:
            click.echo(f"{name:28} not begun: too little time is left")
            continue
        try:
            row = sweep.run(name, settings)
        except ConversionError as error:
            click.echo(f"{name:28} failed: {error}")
            continue
        longest = max(longest, row["seconds"])
        _add(job, row)


def _prepare(job: Job) -> None:
    """Sample what trainings and measurements will want, and measure the original, while others train."""
    sweep = Sweep(job)
    for seq_len in job.trains_on_samples:
        sweep.sampled_text(seq_len)
    sweep.written_text()
    original = sweep.perplexities(original_decoder(sweep.source))
    with alone(job.work / SWEEP):
        write_json(job.out / SWEEP, read_results(job.out) | {"original": original})
    click.echo(f"{'original':28} {_columns(original)}   ({sweep.machine.name})")


class _Claim:
    """Gives 0, 1, 2 and so on, across processes."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> int:
        with self.value.get_lock():
            self.value.value += 1
            return int(self.value.value) - 1


def run_all(job: Job, processes: int) -> None:
    """All sets, in this process or several others, which take the GPUs in turn."""
    spawning = multiprocessing.get_context("spawn")
    claim = _Claim(spawning.Value("i", 0))
    if processes == 1:
        _prepare(job)
        work(job, claim)
        return
    gpus: list[str | None] = [*visible_gpus()] or [None]
    arguments = [(job, claim, gpus[i % len(gpus)]) for i in range(processes)]
    workers = [spawning.Process(target=work, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    try:
        _prepare(job)
        for worker in workers:
            worker.join()
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    if any(worker.exitcode for worker in workers):
        raise click.ClickException("a process failed; what it had finished is in the results")


def _file(path_type: type[Path]) -> Any:
    return click.Path(exists=True, dir_okay=False, path_type=path_type)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.argument("train", type=_file(Path))
@click.argument("sets", type=_file(Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="For texts and runs. Default: OUT.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="Sets trained at a time.")
@click.option("--minutes", type=float, help="Begin no set that would probably end later than this.")
@click.option(
    "--keep-back", type=click.IntRange(1), default=600_000, show_default=True, help="Characters to measure on."
)
@click.option("--eval-text", "eval_texts", multiple=True, type=_file(Path), help="Measure on this text too.")
@click.option(
    "--max-eval-tokens", type=click.IntRange(1), default=120_000, show_default=True, help="Of the text kept back."
)
@click.option("--max-report-tokens", type=click.IntRange(1), help="Of each --eval-text. Default: --max-eval-tokens.")
@click.option(
    "--sampled-tokens", type=click.IntRange(0), default=131_072, show_default=True, help="Sampled ones to measure on."
)
@click.option(
    "--self-tokens",
    type=click.IntRange(1),
    default=4_000_000,
    show_default=True,
    help="Tokens to sample from the original model, where a set trains on such.",
)
@click.option("--tokens", help="Train on this many in every set, whatever the file says.")
@click.option("--only", multiple=True, help="Only the set of this name; repeat for several.")
def main(
    model: str,
    train: Path,
    sets: Path,
    out: Path,
    work: Path | None,
    processes: int,
    minutes: float | None,
    max_report_tokens: int | None,
    tokens: str | None,
    only: tuple[str, ...],
    **rest: Any,
) -> None:
    """Train and measure every set."""
    deadline = None if minutes is None else time.time() + 60 * minutes
    work = work or out
    for folder in (out, work / "runs"):
        folder.mkdir(parents=True, exist_ok=True)
    recipe = tomllib.loads(sets.read_text(encoding="utf-8"))
    finished = {row["name"] for row in read_results(out)["sets"]}
    wanted = []
    for given in recipe["set"]:
        settings = recipe["base"] | {key: given[key] for key in given if key != "name"}
        if given["name"] not in finished and (not only or given["name"] in only):
            wanted.append((given["name"], settings | ({"tokens": tokens} if tokens else {})))
    job = Job(
        model=model,
        train=train,
        out=out,
        work=work,
        sets=wanted,
        deadline=deadline,
        max_report_tokens=max_report_tokens or rest["max_eval_tokens"],
        **rest,
    )
    run_all(job, processes)


if __name__ == "__main__":
    main()
