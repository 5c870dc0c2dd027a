"""`rcpconv quantize`. Its options are the fields of rcpconv.config.QuantizeConfig, and a few about the run itself."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from rcpconv.cli.options import FOLDER, Value
from rcpconv.config import DEFAULT_RECIPE, DEFAULTS, GROUPS, OPTIONS, RUN, Option, read_recipe
from rcpconv.errors import ProcessDied

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of processes that were asked to stop, and said so."""
_NEWEST = "newest"
"""What --resume means without a run (rcpconv.quantize.NEWEST)."""


class _GroupedHelp(click.Command):
    """Lists the options under the headings of rcpconv.config."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        defaults = DEFAULTS | read_recipe(DEFAULT_RECIPE)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                name = parameter.name or ""
                if option := OPTIONS.get(name):
                    record = (record[0], record[1] + _default(option, defaults[name]))
                groups[RUN if option is None else option.group].append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _default(option: Option, value: Any) -> str:
    """What help says of a default."""
    if value in (None, ()):
        return ""
    if option.type is bool:
        value = "yes" if value else "no"
    return f" Default: {' '.join(map(str, value)) if option.many == 2 else value}."


def _click_option(name: str, option: Option) -> Callable[[Any], Any]:
    spelled = name.replace("_", "-")
    if option.type is bool:
        return click.option(f"--{spelled}/--no-{spelled}", default=None, help=option.help)
    many = {0: {"multiple": True}, 1: {}}.get(option.many, {"nargs": option.many})
    return click.option(f"--{spelled}", type=Value(name, option), help=option.help, **many)


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every field of QuantizeConfig but the model."""
    for name, option in reversed(OPTIONS.items()):
        if name != "model":
            command = _click_option(name, option)(command)
    return command


@click.command(cls=_GroupedHelp)
@click.argument("model", required=False)
@_settings
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="TOML file with any of these settings, or a bundled one: paper (RCP after its paper, reconstructed), demo or "
    "default. Options beat it, and a file beats the default recipe.",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value=_NEWEST,
    metavar="[RUN]",
    help="Continue an interrupted run. Without RUN: the newest unfinished one.",
)
@click.option("--out", type=FOLDER, metavar="FOLDER", help="Run folder to make. Default: <runs>/<model>-<time>.")
@click.option(
    "--runs", type=FOLDER, metavar="FOLDER", help="Where run folders are. Default: $RCPCONV_RUNS, else rcp-runs."
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train on so many GPUs of this machine (CPU: processes). On several machines: torchrun -m rcpconv quantize. "
    "With --dry-run: plan for so many, whatever is here; MODEL may be a folder with config.json alone.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan (shapes, bytes, memory, steps, time) and stop.")
@click.option(
    "--gpu-memory", type=click.FloatRange(1), metavar="GIB", help="With --dry-run: memory of each of them. Default: 80."
)
@click.option("--force", is_flag=True, help="Train even where memory or time are estimated not to suffice.")
@click.pass_context
def quantize(
    ctx: click.Context,
    /,
    model: str | None,
    recipe: str | None,
    resume: str | None,
    out: Path | None,
    runs: Path | None,
    gpus: int | None,
    dry_run: bool,
    gpu_memory: float | None,
    force: bool,
    **settings: Any,
) -> None:
    """Train a 2-bit model from MODEL: a folder, a Hub id such as meta-llama/Llama-2-7b, or demo.

    Leaves a run folder, from which `rcpconv export` makes the file. Settings come from the command line, else from
    --recipe, else from defaults that suit the model and the machine.
    """
    from rich.console import Console

    from rcpconv import distributed

    if gpus and gpus > 1 and not dry_run and not distributed.launched():
        try:
            distributed.launch(gpus, sys.executable, "-m", "rcpconv", *sys.argv[1:])
        except ProcessDied as died:
            if died.exit_code in _STOPPED:
                ctx.exit(died.exit_code)
            raise
        return

    from rcpconv.quantize import quantize as train
    from rcpconv.train.stopping import Interrupted

    given = {name: settings[name] for name in settings if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    try:
        with distributed.joined():
            train(
                model,
                given,
                recipe=recipe,
                resume=resume,
                out=out,
                runs=runs,
                dry_run=dry_run,
                gpus=gpus if dry_run else None,
                gpu_memory=gpu_memory,
                force=force,
                console=Console(),
            )
    except Interrupted as stop:
        ctx.exit(128 + stop.signal_number)
