"""`rcpconv export`."""

from __future__ import annotations

from pathlib import Path

import click

from rcpconv.cli.options import FILE, find_run, run_options


@click.command(short_help="Write a finished run as one file.")
@run_options
@click.option("--out", type=FILE, default=Path("model.rcp"), show_default=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def export(run: Path | None, runs: Path | None, out: Path, force: bool) -> None:
    """Write a finished run as one .rcp file, bit for bit what was trained.

    Before the file takes its name, every weight is decoded from it and compared with the run's.
    """
    from rich.console import Console

    from rcpconv.export import export as write
    from rcpconv.inspection import model_size, size_json, size_table

    found = find_run(run, runs)
    report = write(found, out, force=force)
    console = Console()
    tokenizer_bytes = len(found.tokenizer_json)
    sizes = model_size(found.architecture, found.quantization, found.provenance, tokenizer_bytes, report.nbytes)
    console.print(size_table(size_json(sizes)))
    console.print(f"{out}: {report.nbytes:,} bytes, from {found.folder}; every weight is as trained.", soft_wrap=True)
