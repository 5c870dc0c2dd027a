"""`rcpconv compare`."""

from __future__ import annotations

from pathlib import Path

import click

from rcpconv.cli.options import DEVICES, FILE, FOLDER, Value
from rcpconv.config import DATA, OPTIONS, Option

_TOKENS = Value("tokens", OPTIONS["tokens"])
_MAX_TOKENS = Value("max_eval_tokens", OPTIONS["max_eval_tokens"])
_VALIDATION = Value("validation_tokens", Option(help="", group=DATA, type=int, count=True, low=2))
_GRID = "2e-4,4.5e-4,1e-3"


@click.command(short_help="Compare methods and ablations in one table.")
@click.argument("model")
@click.option("--out", type=FOLDER, required=True, metavar="FOLDER", help="Folder to make, or to go on in.")
@click.option("--data", multiple=True, metavar="TEXT", help="Training text, as quantize takes it; may be repeated.")
@click.option("--text", metavar="FILE", help="Held-out text. Default: WikiText-2 test, or demo's held-out text.")
@click.option("--revision", metavar="TEXT", help=OPTIONS["revision"].help)
@click.option(
    "--variants", type=FILE, metavar="FILE", help="TOML file of [variants.NAME] tables. Default: a bundled list."
)
@click.option("--only", multiple=True, metavar="NAME,...", help="Compare these variants alone.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of quantize for all variants.")
@click.option("--tokens", type=_TOKENS, default="33M", show_default=True, help="Tokens that each variant trains on.")
@click.option("--sweep-tokens", type=_TOKENS, default="8M", show_default=True, help="For each rate that is tried.")
@click.option(
    "--lr-grid", default=_GRID, show_default=True, metavar="LR,...", help="Rates to try, the same for every variant."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Of the best methods; others one.")
@click.option(
    "--best",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="How many methods get all seeds, each in its best variant.",
)
@click.option(
    "--validation-tokens",
    type=_VALIDATION,
    help="Kept back from the training text; rates are chosen on them. Default: 60k, and 20k of the demo's text.",
)
@click.option("--curve-points", type=click.IntRange(1), default=8, show_default=True, help="Perplexities on the way.")
@click.option("--window", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of a window.")
@click.option("--max-eval-tokens", type=_MAX_TOKENS, help="Use this much of the held-out text. Default: all.")
@click.option("--generations", type=click.IntRange(0), default=0, show_default=True, help="Prompts to continue.")
@click.option(
    "--generation-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of a continuation."
)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trainings side by side, on all GPUs in turn."
)
@click.option("--keep-runs", is_flag=True, help="Leave a run folder for every training in the table.")
@click.option("--checkpoint-every", type=click.IntRange(0), default=0, help="Steps. Default: only when stopped.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="X",
    help="Begin nothing that would probably end later, and stop then; the same command goes on.",
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to train.")
@click.option("--dry-run", is_flag=True, help="Show what there is to do and stop.")
@click.option("--force", is_flag=True, help="Train even where memory or time are estimated not to suffice.")
@click.pass_context
def compare(
    ctx: click.Context,
    model: str,
    out: Path,
    data: tuple[str, ...],
    text: str | None,
    revision: str | None,
    variants: Path | None,
    only: tuple[str, ...],
    settings: tuple[str, ...],
    tokens: int,
    sweep_tokens: int,
    lr_grid: str,
    seeds: int,
    best: int,
    validation_tokens: int | None,
    curve_points: int,
    window: int,
    max_eval_tokens: int | None,
    generations: int,
    generation_tokens: int,
    jobs: int,
    keep_runs: bool,
    checkpoint_every: int,
    minutes: float | None,
    device: str,
    dry_run: bool,
    force: bool,
) -> None:
    """Train variants of MODEL with one budget on one text, and leave a table, a plot and JSON in a folder.

    Learning rates are chosen for each variant from the same grid, on text kept back from the training text; a variant
    may take another's instead (rates-of), as the bundled ablations do, and is never its method's best then. A grid may
    grow. The same command goes on where it was stopped.
    """
    from rich.console import Console

    from rcpconv.compare import plan

    common, known = plan.read_variants(variants)
    common |= plan.common_settings(dict(map(plan.parse_setting, settings)), "set")
    comparison = plan.Comparison(
        model=model,
        revision=revision,
        data=data,
        text=text or "",
        common=common,
        variants=plan.choose(known, [name for names in only for name in names.split(",")]),
        grid=tuple(plan.Rates.parse(part) for part in lr_grid.split(",")),
        tokens=tokens,
        sweep_tokens=sweep_tokens,
        seeds=seeds,
        best=best,
        validation_tokens=validation_tokens or 0,
        curve_points=curve_points,
        window=window,
        max_eval_tokens=max_eval_tokens,
        generations=generations,
        generation_tokens=generation_tokens,
    )

    from rcpconv.compare.run import compare as run
    from rcpconv.train.stopping import Interrupted

    try:
        run(
            comparison,
            out,
            device=device,
            jobs=jobs,
            keep_runs=keep_runs,
            checkpoint_every=checkpoint_every,
            minutes=minutes,
            dry_run=dry_run,
            force=force,
            console=Console(),
        )
    except Interrupted as stop:
        ctx.exit(128 + stop.signal_number)
