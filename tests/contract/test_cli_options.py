"""The options of both command lines are frozen in cli_options.json, so that changing them is a deliberate edit.

After such an edit: `.venv/bin/python tests/contract/test_cli_options.py` rewrites the file.
"""

import difflib
import json
from pathlib import Path

import click

import rcpconv.cli
import rcprun.cli

SNAPSHOT = Path(__file__).with_name("cli_options.json")
COMMANDS = {"rcpconv": rcpconv.cli.main, "rcp-run": rcprun.cli.main}


def describe(name: str, command: click.Command) -> dict[str, list[str]]:
    """Each command to its parameters: arguments in order and upper case, then options with all their spellings."""
    if isinstance(command, click.Group):
        children = [describe(f"{name} {child}", command.commands[child]) for child in sorted(command.commands)]
    else:
        children = []
    arguments = [
        parameter.human_readable_name.upper() for parameter in command.params if isinstance(parameter, click.Argument)
    ]
    options = sorted(
        ", ".join(parameter.opts + parameter.secondary_opts)
        for parameter in command.params
        if isinstance(parameter, click.Option)
    )
    return {name: arguments + options} | {key: value for child in children for key, value in child.items()}


def render() -> str:
    commands: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        commands |= describe(name, command)
    return json.dumps(commands, indent=2) + "\n"


def test_options_are_frozen() -> None:
    recorded, present = SNAPSHOT.read_text(encoding="utf-8"), render()
    changes = "\n".join(
        difflib.unified_diff(recorded.splitlines(), present.splitlines(), "recorded", "present", lineterm="")
    )
    assert recorded == present, f"\n{changes}\nIf meant: python {SNAPSHOT.parent / 'test_cli_options.py'}"


if __name__ == "__main__":
    SNAPSHOT.write_text(render(), encoding="utf-8")
