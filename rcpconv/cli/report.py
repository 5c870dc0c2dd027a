"""`rcpconv report`."""

from __future__ import annotations

from pathlib import Path

import click

from rcpconv.cli.options import DEVICES, FILE, FOLDER, Value, find_run, require_writable
from rcpconv.config import DATA, Option

_MAX_TOKENS = Value("max_tokens", Option(help="", group=DATA, type=int, count=True, low=2))


@click.command(short_help="Show a finished run as an HTML page.")
@click.argument("run", type=FOLDER, required=False)
@click.option("--runs", type=FOLDER, metavar="FOLDER", help="Where run folders are, if no RUN is given.")
@click.option("--out", type=FILE, metavar="FILE", help="The page to write. Default: report.html in the run folder.")
@click.option("--force", is_flag=True, help="Overwrite the page if it exists.")
@click.option("--text", type=FILE, metavar="FILE", help="What to measure on. Default: demo's held-out text.")
@click.option("--max-tokens", type=_MAX_TOKENS, default=4096, show_default=True, help="Use this much of the text.")
@click.option("--generations", type=click.IntRange(0), default=8, show_default=True, help="Prompts to continue.")
@click.option(
    "--generation-tokens", type=click.IntRange(1), default=64, show_default=True, help="Length of a continuation."
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute.")
def report(
    run: Path | None,
    runs: Path | None,
    out: Path | None,
    force: bool,
    text: Path | None,
    max_tokens: int,
    generations: int,
    generation_tokens: int,
    device: str,
) -> None:
    """Show a finished RUN as one HTML page that needs nothing else.

    Loss, perplexity, errors by layer, levels, clips, ranges, memory, and what the model writes.
    The original model is read again.
    """
    from rich.console import Console

    from rcpconv.heldout import read_text
    from rcpconv.report.write import write_report

    if out is not None:
        require_writable(out, "--out")
    found = find_run(run, runs)
    with Console(stderr=True).status("Measuring") as status:
        path = write_report(
            found,
            out,
            force=force,
            text=None if text is None else read_text(text),
            max_tokens=max_tokens,
            generations=generations,
            generation_tokens=generation_tokens,
            device=device,
            tell=lambda what: status.update(f"Measuring: {what}"),
        )
    click.echo(f"{path}: {path.stat().st_size:,} bytes, from {found.folder}")
