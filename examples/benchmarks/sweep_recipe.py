"""Compares training recipes on one checkpoint: many short trainings in one process.

    python examples/benchmarks/sweep_recipe.py MODEL TRAIN_TEXT SETS OUT [--eval-text TEXT]

SETS is a TOML file: a table [base] of quantize's settings, and any number of [[set]] with a name and the settings that
differ. Sets are trained one after the other, in the order of the file; imports, checkpoint, teacher, tokens and
compiled graphs are shared. Perplexity is measured on the last part of the training text, which is kept back from
training, or on --eval-text. Each finished set is a line of output at once, and OUT/sweep.json is written anew after
each, so that a sweep that is cut short loses nothing; started again with the same OUT, it goes on with what is missing.
"""

from __future__ import annotations

import json
import lzma
import time
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer

from rcpconv.baking import bake, baked_decoder
from rcpconv.checkpoint import SourceModel, load_source
from rcpconv.config import build_config
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
from rcpconv.train.texts import read_source
from rcpconv.train.tokens import Sequences, cached
from rcpconv.train.tokens import tokenize as tokenize_pieces


class Sweep:
    """What all trainings of a sweep share."""

    def __init__(self, model: str, train: Path, evaluated: str, out: Path, max_eval_tokens: int | None) -> None:
        self.source: SourceModel = load_source(model)
        self.machine: Machine = look_at_machine("auto")
        self.model, self.train, self.out = model, train, out
        window = min(EVALUATION_WINDOW, self.source.architecture.max_position_embeddings)
        self._teachers: dict[bool, Decoder] = {}
        self.windows = cut(tokenize(self.source.tokenizer.json, evaluated), window, max_eval_tokens)

    def teacher(self, half: bool) -> Decoder:
        """The original model as trainings take it."""
        if half not in self._teachers:
            dtype = torch.bfloat16 if half else torch.float32
            teacher = original_decoder(self.source, dtype, ComputeOptions(half=half))
            self._teachers[half] = teacher.to(self.machine.device)
        return self._teachers[half]

    def original(self) -> float:
        """Its perplexity, in float32."""
        decoder = original_decoder(self.source).to(self.machine.device)
        return torch_perplexity(decoder, self.windows, "original")

    def _sequences(self, plan: Plan) -> Sequences:
        """As quantize takes them: of as many tokens as the training needs, from the beginning of the text."""
        c, tokenizer = plan.config, Tokenizer.from_str(self.source.tokenizer.json.decode())
        assert c.seq_len is not None
        wanted = plan.steps * plan.tokens_per_step + c.seq_len
        streams = read_source(str(self.train), lambda messages: "")

        def rows() -> Any:
            for stream in streams:
                yield from tokenize_pieces(stream, tokenizer, self.source.tokenizer.info)

        vocab_size = plan.architecture.vocab_size
        token_N = cached(self.out / "train.npy", rows, vocab_size, limit=np.iinfo(np.int64).max)
        return Sequences(token_N[:wanted], c.seq_len, c.seed)

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
        decoder = baked_decoder(plan.architecture, plan.quantization, tensors.__getitem__).to(self.machine.device)
        lines = read_metrics(folder / METRICS)
        checkpoints.delete_all(run)
        return {
            "name": name,
            "perplexity": torch_perplexity(decoder, self.windows, name),
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
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure on this text instead, and train on the whole of the other.",
)
@click.option("--max-eval-tokens", type=click.IntRange(1), help="Measure on this many tokens. Default: all.")
@click.option("--tokens", help="Train on this many in every set, whatever the file says.")
def main(
    model: str,
    train: Path,
    sets: Path,
    out: Path,
    keep_back: int,
    eval_text: Path | None,
    max_eval_tokens: int | None,
    tokens: str | None,
) -> None:
    """Train and measure every set."""
    out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._dynamo.config.specialize_float = True  # a graph for each value of a setting
    recipe = tomllib.loads(sets.read_text(encoding="utf-8"))
    texts = (train, eval_text.read_text(encoding="utf-8")) if eval_text else _cut_text(train, keep_back, out)
    sweep = Sweep(model, *texts, out, max_eval_tokens)
    path = out / "sweep.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"original": sweep.original(), "sets": []}
    click.echo(f"original {done['original']:.3f} on {sum(map(len, sweep.windows))} tokens, {sweep.machine.name}")
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
            f"{name:28} {row['perplexity']:8.3f}   kl {row['kl'] or 0:.4f}   {row['tokens_per_second'] or 0:10,.0f} "
            f"tokens/s   {row['steps']} steps   {row['training_seconds']:.0f} + "
            f"{row['seconds'] - row['training_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
