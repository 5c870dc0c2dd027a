"""`rcpconv inspect`, `verify` and `push`: what is done to a finished file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from rcpconv.cli.options import FILE
from rcpformat.errors import FormatError, UnreadableFile


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the file in a FormatError, which names a tensor or metadata key."""
    try:
        yield
    except FormatError as error:
        raise click.ClickException(_message(path, error)) from error


def _message(path: Path, error: ValueError) -> str:
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


@click.command(short_help="Show what is in a file.")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Show what is in a .rcp FILE: model, scheme, origin, tensors and how their levels are used."""
    import json

    from rich.console import Console

    from rcpconv.inspection import inspect_file, render

    with _about(file):
        report = inspect_file(file)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        render(report, Console())


@click.command(short_help="Check files completely.")
@click.argument("files", type=FILE, nargs=-1, required=True)
def verify(files: tuple[Path, ...]) -> None:
    """Check .rcp FILES completely: structure, values and SHA-256s.

    Prints a line for each file; the exit code is 1 if one of them is not valid.
    """
    from rcpformat.reader import RcpFile

    valid = True
    for path in files:
        try:
            with RcpFile.open(path, verify=True) as file:
                click.echo(f"{path}: ok, {len(file.header_tensors)} tensors")
        except (FormatError, UnreadableFile) as error:
            valid = False
            click.echo(f"{_message(path, error)} [{type(error).__name__}]")
    sys.exit(0 if valid else 1)


@click.command(short_help="Upload a file to the Hugging Face Hub.")
@click.argument("file", type=FILE)
@click.argument("repository", metavar="USER/REPO")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--evaluation", type=FILE, help="JSON from `rcpconv eval`, for the model card.", metavar="FILE")
def push(file: Path, repository: str, private: bool, evaluation: Path | None) -> None:
    """Check a .rcp FILE and upload it, with a model card, to USER/REPO on the Hugging Face Hub.

    Needs a token with write permission: run `hf auth login`, or set HF_TOKEN.
    """
    from rcpconv.hub import push as upload

    with _about(file):
        pushed = upload(file, repository, private=private, evaluation=evaluation)
    for warning in pushed.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(pushed.url)
    click.echo(f'Run it anywhere: rcp-run {repository} --prompt "..."')
