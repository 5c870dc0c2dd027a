"""Options that several commands take. Knows nothing of what they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rcpconv.runs import Run

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)


def run_options(command: Command) -> Command:
    """--run and --runs, for `find_run`."""
    one = click.option("--run", type=FOLDER, metavar="FOLDER", help="Run folder. Default: the one that finished last.")
    root = click.option(
        "--runs", type=FOLDER, metavar="FOLDER", help="Where run folders are. Default: $RCPCONV_RUNS, else rcp-runs."
    )
    return one(root(command))


def find_run(run: Path | None, runs: Path | None) -> Run:
    """The run named by --run, else the newest finished one under --runs. Raises RunNotFound or BadRun."""
    from rcpconv.runs import Run, newest_finished, runs_root

    found = newest_finished(runs_root(runs)) if run is None else Run.open(run)
    found.require_finished()
    return found
