"""Renders one chat template in a process of its own: JSON lines on standard input and on standard output.

The first line in is the set-up, and each further one a template's variables, answered by {"text": …} or {"error": …}.
Run as a script by chat.py, which explains why; it needs jinja2 and the standard library, nothing of this package.
The dialect is that of transformers: trimmed blocks, loop controls, `{% generation %}`, `tojson`, `raise_exception`,
`strftime_now`. The environment is jinja2's immutable sandbox with `*` and `**` bounded as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sized
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_REPEAT = 1 << 20
"""Elements of a sequence that `*` may build."""
LARGEST_NUMBER_BITS = 4096
"""Size of an integer that `*` or `**` may build."""


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks assistant text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of the content, without a mark."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which bounds only `range`, with multiplication and powers bounded too."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse a `*` or `**` whose result would be huge, before it is computed."""
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, Sized) and isinstance(count, int) and len(sequence) * count > LARGEST_REPEAT:
                    raise SecurityError(f"a repetition to {len(sequence) * count} elements is too long")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_NUMBER_BITS:
                raise SecurityError(f"the result of {operator!r} would have more than {LARGEST_NUMBER_BITS} bits")
        return super().call_binop(context, operator, left, right)


def raise_exception(message: str) -> None:
    """For templates: refuse the messages."""
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    """For templates: the local time in this strftime form."""
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike jinja2's own, it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(template: str) -> Template:
    """The template in the bounded sandbox. Raises jinja2's TemplateError."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def render(template: Template, variables: dict[str, Any], largest_output: int) -> str:
    """The rendered text. Raises jinja2's TemplateError, or whatever Python error the template's expressions give."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > largest_output:
            raise SecurityError(f"the output is longer than {largest_output} characters")
        pieces.append(piece)
    return "".join(pieces)


def limit_resources(memory: int) -> None:
    """Bound this process's address space, and forbid writing files, where the system can."""
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent's deadline remains
        return
    for name, value in {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            continue


def limit_seconds(seconds: int) -> None:
    """Bound the CPU time that this process may take from now on, where the system can."""
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def main() -> None:
    """Answer every line, within the limits that the first one sets."""
    setup = json.loads(sys.stdin.buffer.readline())
    limit_resources(setup["memory"])
    template: Template | None = None
    for line in sys.stdin.buffer:
        limit_seconds(setup["seconds"])
        try:
            template = template or compiled(setup["template"])
            answer = {"text": render(template, json.loads(line), setup["largest_output"])}
        except MemoryError:
            answer = {"error": "it ran out of the memory that templates may use"}
        except Exception as error:  # a template is foreign code and may fail in any way
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
