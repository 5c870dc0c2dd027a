"""Chooses learning rates for one checkpoint on text cut from the training text; the held-out text chooses nothing.

    python examples/benchmarks/sweep_rates.py MODEL TRAIN_TEXT OUT [quantize options ...]

Keeps back the last part of the training text, trains every pair of rates on the rest, all pairs at the same time, and
prints their perplexities on the part kept back, best last. OUT/best.txt then holds the options of the best pair, for
quantize_wiki_llama.sh, and OUT/sweep.json all figures. A pair is weight rate:quantizer rate; clips learn at the weight
rate.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import click

PAIRS = ("4.5e-4:4.5e-3", "1e-3:3e-3", "1e-3:1e-2", "2e-3:6e-3", "2e-3:2e-2")


@click.command(help=__doc__.split("\n")[0], context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("train", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--pair", "pairs", multiple=True, default=PAIRS, show_default=True, help="Weight rate:quantizer rate.")
@click.option(
    "--keep-back", type=click.IntRange(1), default=600_000, show_default=True, help="Characters to measure on."
)
def main(model: str, train: Path, out: Path, options: tuple[str, ...], pairs: tuple[str, ...], keep_back: int) -> None:
    """Train every pair at the same time and compare."""
    out.mkdir(parents=True)
    with lzma.open(train, "rt", encoding="utf-8") if train.suffix == ".xz" else train.open(encoding="utf-8") as file:
        text = file.read()
    if len(text) < 2 * keep_back:
        raise click.ClickException(f"{train}: {len(text)} characters; keep back fewer than half of them")
    rest, validation = out / "train.txt", out / "validation.txt"
    rest.write_text(text[:-keep_back], encoding="utf-8")
    validation.write_text(text[-keep_back:], encoding="utf-8")
    started = []
    for pair in pairs:
        lr, quantizer_lr = pair.split(":")
        rates = ["--lr", lr, "--quantizer-lr", quantizer_lr, "--clip-lr", lr]
        run = out / pair.replace(":", "_")
        command = [sys.executable, "-m", "rcpconv", "quantize", model, "--data", rest, "--eval-data", validation]
        log = (out / f"{run.name}.log").open("w")
        started.append(
            (run, rates, subprocess.Popen([*command, "--out", run, *rates, *options], stdout=log, stderr=log))
        )
    figures = []
    for run, rates, process in started:
        if process.wait():
            raise click.ClickException(f"{run.name}: failed; see {out / run.name}.log")
        perplexity = json.loads((run / "run.json").read_text())["evaluation"]["perplexity"]
        speed = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["tokens_per_second"]
        figures.append({"rates": rates, **perplexity, "tokens_per_second": speed})
    figures.sort(key=lambda row: -row["fake-quant"])
    for row in figures:
        click.echo(f"{' '.join(row['rates']):50} {row['fake-quant']:8.3f}   {row['tokens_per_second']:10,.0f} tokens/s")
    (out / "best.txt").write_text(" ".join(figures[-1]["rates"]) + "\n")
    (out / "sweep.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
