"""The `rcpconv` command line. Each command calls one function, imported in its body, so that --help stays quick.

Exit codes: 0 done, 1 an error (one message, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import errno
from typing import Any

import click

from rcpconv.cli.compare import compare
from rcpconv.cli.evaluation import eval_command
from rcpconv.cli.export import export
from rcpconv.cli.files import inspect, push, verify
from rcpconv.cli.quantize import quantize
from rcpconv.cli.report import report
from rcpconv.errors import ConversionError
from rcpformat.errors import FormatError, OutputExists, OutputNotWritable, UnreadableFile

INTERRUPTED_EXIT_CODE = 130
"""128 + SIGINT, as shells do."""
CONVERTER_PACKAGES = ("matplotlib", "sentencepiece", "torch", "transformers")
"""What the extra `convert` adds and commands import."""


class _Main(click.Group):
    """Turns what a user can cause into a message and an exit code; lists the commands in their order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConversionError, FormatError, UnreadableFile, OutputExists, OutputNotWritable) as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in CONVERTER_PACKAGES:
                raise
            raise click.ClickException(
                f"this command needs {error.name}, which the runtime does without; "
                "install the converter's packages with: pip install 'rcpconv[convert]'"
            ) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has left: click ends quietly
                raise
            reason = error.strerror or str(error)
            raise click.ClickException(f"{error.filename}: {reason}" if error.filename else reason) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(INTERRUPTED_EXIT_CODE)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rcpconv")
def main() -> None:
    """Converts LLaMA-family checkpoints to 2-bit .rcp files.

    quantize trains, export writes the file, rcp-run runs it.
    """


for _command in (quantize, export, inspect, verify, eval_command, report, compare, push):
    main.add_command(_command)
