"""`rcpconv eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rcpconv.cli.options import DEVICES, FILE, Value, find_run, require_writable, run_options
from rcpconv.config import DATA, Option

_MODELS = ("original", "fake-quant", "rcp")
_MAX_TOKENS = Option(
    help="Use this much of the text, such as 20k. Default: all.", group=DATA, type=int, count=True, low=2
)


@click.command("eval", short_help="Measure perplexity: original, run and file.")
@run_options
@click.option("--rcp", type=FILE, help="A .rcp file, evaluated in the runtime.", metavar="FILE")
@click.option("--text", type=FILE, metavar="FILE", help="Default: WikiText-2 test, or demo's held-out text.")
@click.option("--window", type=click.IntRange(2), help="Tokens of a window. Default: 1024, or the context if shorter.")
@click.option("--max-tokens", type=Value("max_tokens", _MAX_TOKENS), help=_MAX_TOKENS.help)
@click.option("--skip", type=click.Choice(_MODELS), multiple=True, help="Leave out a model; may be repeated.")
@click.option("--agreement", is_flag=True, help="Compare the runtime's predictions with torch's, token by token.")
@click.option(
    "--generations",
    type=click.IntRange(1),
    is_flag=False,
    flag_value=64,
    metavar="[N]",
    help="Continue N prompts with the torch models. Without N: 64.",
)
@click.option(
    "--generation-tokens", type=click.IntRange(1), default=256, show_default=True, help="Length of a continuation."
)
@click.option("--tasks", metavar="NAME[,NAME]", help="Run tasks of lm-evaluation-harness instead (extra lm-eval).")
@click.option(
    "--tasks-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Task definitions (YAML), searched before the harness's own.",
)
@click.option("--num-fewshot", type=click.IntRange(0), metavar="N", help="Examples before each question of a task.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only so many questions of each task.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Of the torch models.")
@click.option("--json", "json_file", type=FILE, help="Write the results to a file too.", metavar="FILE")
def eval_command(
    run: Path | None,
    runs: Path | None,
    rcp: Path | None,
    text: Path | None,
    window: int | None,
    max_tokens: int | None,
    skip: tuple[str, ...],
    agreement: bool,
    generations: int | None,
    generation_tokens: int,
    tasks: str | None,
    tasks_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    device: str,
    json_file: Path | None,
) -> None:
    """Perplexity of the original, of the trained run, and of the .rcp file in the runtime.

    All on the same text, in windows without overlap; the first token of each window is not scored.
    With --generations, also how repetitive the torch models' texts are, how far they agree, and which have collapsed.

    With --tasks, tasks of lm-evaluation-harness on the same models, instead of perplexity.
    """
    import dataclasses

    from rich.console import Console

    from rcpconv.errors import BadOption, RunNotFound
    from rcpconv.evaluate import evaluate, render
    from rcpconv.heldout import read_text

    if json_file is not None:
        require_writable(json_file, "--json")
    if tasks is not None:
        for option, given in {"--text": text, "--window": window, "--max-tokens": max_tokens}.items():
            if given is not None:
                raise BadOption(f"{option}: --tasks have texts of their own; leave one of the two out")
        if agreement or generations:
            raise BadOption("--tasks: run them without --agreement and --generations")
    elif tasks_path is not None or num_fewshot is not None or limit is not None:
        raise BadOption("--tasks-path, --num-fewshot and --limit go with --tasks")
    found = None
    if not {"original", "fake-quant"} <= set(skip):
        try:
            found = find_run(run, runs)
        except RunNotFound:
            if rcp is None or run is not None or runs is not None:
                raise
    console = Console()
    if tasks is not None:
        from rcpconv.harness import Tasks, evaluate_tasks, task_table

        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        chosen = Tasks(names=names, folder=tasks_path, num_fewshot=num_fewshot, limit=limit)
        by_model = evaluate_tasks(chosen, run=found, rcp=rcp, skip=skip, device=device)
        console.print(task_table(by_model))
        _write(by_model, json_file)
        return
    result = evaluate(
        run=found,
        rcp=rcp,
        text=None if text is None else read_text(text),
        window=window,
        max_tokens=max_tokens,
        skip=skip,
        compare=agreement,
        generations=generations or 0,
        generation_tokens=generation_tokens,
        device=device,
    )
    render(result, console)
    _write(dataclasses.asdict(result), json_file)


def _write(results: dict[str, Any], json_file: Path | None) -> None:
    import json

    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
