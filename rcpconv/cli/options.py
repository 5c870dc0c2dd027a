"""Options that several commands take. Knows nothing of what they are for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rcpconv.config import Option
from rcpconv.errors import BadOption
from rcpformat.errors import OutputNotWritable

if TYPE_CHECKING:
    from rcpconv.runs import Run

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
DEVICES = ("auto", "cpu", "cuda")


class Value(click.ParamType):  # type: ignore[type-arg]
    """A value of an Option, checked as in a recipe."""

    def __init__(self, name: str, option: Option) -> None:
        self.name, self.option = name, option

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices, or the kind of value."""
        if self.option.choices:
            return f"[{'|'.join(map(str, self.option.choices))}]"
        return "COUNT" if self.option.count else {int: "N", float: "X", str: "TEXT"}[self.option.type]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The checked value; a failure ends in a usage error."""
        try:
            if isinstance(value, str) and not self.option.count:
                value = self.option.type(value)
            return self.option.check_one(self.name, value)
        except BadOption as error:
            self.fail(str(error).partition(": ")[2], param, ctx)
        except ValueError:
            self.fail(f"{value!r} is not {'an integer' if self.option.type is int else 'a number'}", param, ctx)


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


def require_writable(path: Path, option: str) -> None:
    """Raise OutputNotWritable where no file can be written, and leave nothing there."""
    folder = path.parent
    if path.is_dir():
        found = "a folder"
    elif not folder.is_dir():
        found = f"no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        found = "no permission to write"
    else:
        return
    raise OutputNotWritable(f"{path}: expected a place for the results, found {found}; choose another {option}")
