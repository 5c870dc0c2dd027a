"""Compares training recipes on one checkpoint: many short trainings in one process.

    python examples/benchmarks/sweep_recipe.py MODEL TRAIN_TEXT SETS OUT [--eval-text TEXT ...]

SETS is a TOML file: a table [base] of quantize's settings, and any number of [[set]] with a name and the settings that
differ. Sets are trained one after the other, in the order of the file; imports, checkpoint, teacher, tokens and
compiled graphs are shared. Perplexity is measured on the last part of the training text, which is kept back from
training; on text sampled from the original model, which is like text that the original has never seen, as the last
part of what it was trained on is not; and on every --eval-text. Each finished set is a line of output at once, and
OUT/sweep.json is written anew after each, so that a sweep that is cut short loses nothing; started again with the same
OUT, it goes on with what is missing.
"""

from __future__ import annotations

import json
import lzma
import math
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from rcpconv.baking import bake, baked_decoder
from rcpconv.checkpoint import SourceModel, load_source
from rcpconv.config import SELF, build_config
from rcpconv.errors import ConversionError
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.layers import ComputeOptions
from rcpconv.model import Decoder
from rcpconv.plan import Machine, Plan, look_at_machine, make_plan
from rcpconv.prepare import original_decoder
from rcpconv.quantize import EVALUATION_WINDOW, untrained_student
from rcpconv.runs import METRICS, Run, write_json
from rcpconv.train import checkpoints
from rcpconv.train.loop import Trainer
from rcpconv.train.progress import read_metrics
from rcpconv.train.sampling import SELF_EPOCHS, sample
from rcpconv.train.texts import read_source
from rcpconv.train.tokens import Mixture, Sequences, cached
from rcpconv.train.tokens import tokenize as tokenize_pieces

SAMPLED_TOKENS = 128 * EVALUATION_WINDOW
"""To measure on."""


class Sweep:
    """What all trainings of a sweep share."""

    def __init__(
        self, model: str, train: Path, texts: dict[str, str], out: Path, self_tokens: int, eval_tokens: int
    ) -> None:
        """texts: to measure on, by name. self_tokens: how many to sample, where a set trains on such."""
        self.source: SourceModel = load_source(model)
        self.machine: Machine = look_at_machine("auto")
        self.model, self.train, self.out, self.self_tokens = model, train, out, self_tokens
        window = min(EVALUATION_WINDOW, self.source.architecture.max_position_embeddings)
        self._teachers: dict[bool, Decoder] = {}
        self.windows = {
            name: cut(tokenize(self.source.tokenizer.json, text), window, eval_tokens) for name, text in texts.items()
        }
        sampled = self._sampled("sampled.npy", SAMPLED_TOKENS, window, seed=1, half=False)
        self.windows["sampled"] = cut(sampled.tolist(), window, SAMPLED_TOKENS)

    def _sampled(self, name: str, tokens: int, seq_len: int, seed: int, half: bool) -> NDArray[Any]:
        """Text from the original model, in rows of seq_len."""

        def rows() -> Iterator[list[int]]:
            info = self.source.tokenizer.info
            yield from sample(
                self.teacher(half), info, tokens=tokens, seq_len=seq_len, seed=seed, tell=lambda done: None
            )

        return cached(self.out / name, rows, self.source.architecture.vocab_size, tokens)

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
        return {name: torch_perplexity(decoder, windows, name) for name, windows in self.windows.items()}

    def _sequences(self, plan: Plan) -> Sequences | Mixture:
        """As quantize takes them: of as many tokens as the training needs, from the beginning of the text."""
        c, tokenizer = plan.config, Tokenizer.from_str(self.source.tokenizer.json.decode())
        assert c.seq_len is not None
        seq_len, wanted = c.seq_len, plan.steps * plan.tokens_per_step
        streams = read_source(str(self.train), lambda messages: "")

        def rows() -> Iterator[list[int]]:
            for stream in streams:
                yield from tokenize_pieces(stream, tokenizer, self.source.tokenizer.info)

        vocab_size = plan.architecture.vocab_size
        token_N = cached(self.out / "train.npy", rows, vocab_size, limit=np.iinfo(np.int64).max)
        written = Sequences(token_N[: wanted + seq_len], seq_len, c.seed)
        if SELF not in c.data:
            return written
        share = c.self_share if len(c.data) > 1 else 1.0
        sampled_N = self._sampled("self.npy", self.self_tokens, seq_len, seed=0, half=c.precision == "bf16")
        limit = min(math.ceil(share * wanted / SELF_EPOCHS), c.self_tokens)
        return Mixture(Sequences(sampled_N[: max(limit, seq_len)], seq_len, c.seed), written, share)

    def run(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Train, bake and measure one set of settings."""
        start = time.perf_counter()
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        (folder / METRICS).unlink(missing_ok=True)
        config = build_config(self.model, None, settings | {"checkpoint_every": 0})
        plan = make_plan(config, self.source.architecture, self.source.tied_embeddings, self.machine)
        student, run = untrained_student(plan, self.source), Run(folder, {})
        checkpoints.delete_all(run)
        if plan.steps:
            with (folder / "log.txt").open("w") as log:
                Trainer(
                    student=student,
                    teacher=self.teacher(plan.config.precision == "bf16"),
                    sequences=self._sequences(plan),
                    steps=plan.steps,
                    config=plan.config,
                    run=run,
                    console=Console(file=log),
                ).train()
        trained = time.perf_counter()
        tensors = bake(student)
        decoder = baked_decoder(plan.architecture, plan.quantization, tensors.__getitem__)
        lines = read_metrics(folder / METRICS)
        checkpoints.delete_all(run)
        return {
            "name": name,
            "perplexity": self.perplexities(decoder),
            "kl": lines[-1]["kl"] if lines else None,
            "tokens_per_second": lines[-1]["tokens_per_second"] if lines else None,
            "steps": plan.steps,
            "training_seconds": round(trained - start, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "settings": settings,
        }


def _cut_text(train: Path, keep_back: int, out: Path) -> tuple[Path, str]:
    """The text to train on, as a file, and the text to measure on."""
    with lzma.open(train, "rt", encoding="utf-8") if train.suffix == ".xz" else train.open(encoding="utf-8") as file:
        text = file.read()
    if len(text) < 2 * keep_back:
        raise click.ClickException(f"{train}: {len(text)} characters; keep back fewer than half of them")
    rest = out / "train.txt"
    if not rest.exists():
        rest.write_text(text[:-keep_back], encoding="utf-8")
    return rest, text[-keep_back:]


def _columns(perplexity: dict[str, float]) -> str:
    return " ".join(f"{value:8.3f}" for value in perplexity.values())


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.argument("train", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("sets", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--keep-back", type=click.IntRange(1), default=600_000, show_default=True, help="Characters to measure on."
)
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure on this text too.",
)
@click.option(
    "--max-eval-tokens", type=click.IntRange(1), default=120_000, show_default=True, help="Of every text to measure on."
)
@click.option(
    "--self-tokens",
    type=click.IntRange(1),
    default=4_000_000,
    show_default=True,
    help="Tokens to sample from the original model, where a set trains on such.",
)
@click.option("--tokens", help="Train on this many in every set, whatever the file says.")
def main(
    model: str,
    train: Path,
    sets: Path,
    out: Path,
    keep_back: int,
    eval_texts: tuple[Path, ...],
    max_eval_tokens: int,
    self_tokens: int,
    tokens: str | None,
) -> None:
    """Train and measure every set."""
    out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._dynamo.config.specialize_float = True  # a graph for each value of a setting
    recipe = tomllib.loads(sets.read_text(encoding="utf-8"))
    rest, kept = _cut_text(train, keep_back, out)
    texts = {"kept": kept} | {path.stem: path.read_text(encoding="utf-8") for path in eval_texts}
    sweep = Sweep(model, rest, texts, out, self_tokens, max_eval_tokens)
    path = out / "sweep.json"
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text())
    else:
        done = {"original": sweep.perplexities(original_decoder(sweep.source)), "sets": []}
    click.echo(f"{sweep.machine.name}; perplexity on " + ", ".join(sweep.windows))
    click.echo(f"{'original':28} {_columns(done['original'])}")
    finished = {row["name"] for row in done["sets"]}
    for given in recipe["set"]:
        name, settings = given["name"], recipe["base"] | {key: given[key] for key in given if key != "name"}
        if tokens:
            settings["tokens"] = tokens
        if name in finished:
            continue
        try:
            row = sweep.run(name, settings)
        except ConversionError as error:
            click.echo(f"{name:28} failed: {error}")
            continue
        done["sets"].append(row)
        write_json(path, done)
        click.echo(
            f"{name:28} {_columns(row['perplexity'])}   kl {row['kl'] or 0:.4f}   "
            f"{row['tokens_per_second'] or 0:10,.0f} tokens/s   {row['steps']} steps   {row['training_seconds']:.0f} + "
            f"{row['seconds'] - row['training_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
