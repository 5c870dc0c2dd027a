"""Chat messages to a prompt, by the chat template in the model file. Knows nothing of tokens or models.

A template is foreign code. jinja2's sandbox keeps it from the interpreter's internals, but bounds neither its time nor
its memory: nested loops, joins and formats blow up under it. So a template has a child process (template_child.py)
that gets an almost empty environment, limits on address space and CPU time from the operating system, and for each
conversation a wall-clock deadline after which it is killed. Where the system has no such limits (macOS, Windows) the
deadline is what holds.

`python -m rcprun.chat` renders for other programs, as JSON lines: the first is the keywords of ChatRenderer, each
further one a list of messages, answered by {"text": …} or {"error": …}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rcprun.errors import BadRequest, ChatTemplateError, RcpRunError

_CHILD = Path(__file__).with_name("template_child.py")
_LONGEST_REASON = 500
"""Characters of the template's own words that an error message repeats."""
_PASSED_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | …, "content": text}, as in transformers."""


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one rendering may use."""

    seconds: float = 10
    """Wall clock; for the first one, the child's start included."""
    memory: int = 512 << 20
    """Address space in bytes, Python's own included."""
    largest_output: int = 4_000_000
    """Characters."""


def check_messages(messages: Sequence[Message]) -> None:
    """Raise BadRequest unless this is a non-empty list of messages with a role and a content."""
    if isinstance(messages, str) or not messages:
        raise BadRequest(f"messages: expected a non-empty list of messages, found {messages!r}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadRequest(f"messages[{index}]: expected an object with a role and a content, found {message!r}")


def require_template(template: str | None) -> str:
    """The template. Raises ChatTemplateError when there is none."""
    if template is None:
        raise ChatTemplateError("this model has no chat template; use a plain prompt, without --chat")
    return template


class ChatRenderer:
    """A chat template in a child process, for any number of conversations; to be closed, as by a with statement.

    The child starts with the first conversation, and anew after one that it did not survive.
    """

    def __init__(
        self,
        template: str | None,
        *,
        bos_token: str = "",
        eos_token: str = "",
        add_generation_prompt: bool = True,
        limits: TemplateLimits | None = None,
    ) -> None:
        """Raises ChatTemplateError when there is no template."""
        self._limits = limits = limits or TemplateLimits()
        self._setup = {
            "template": require_template(template),
            "seconds": int(limits.seconds) + 1,
            "memory": limits.memory,
            "largest_output": limits.largest_output,
        }
        self._variables = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """The text, special tokens included, that the template makes of the messages.

        Raises ChatTemplateError when the template fails, refuses the messages (`raise_exception`) or exceeds a limit;
        BadRequest for messages that are none.
        """
        check_messages(messages)
        try:
            request = json.dumps({"messages": [dict(message) for message in messages]} | self._variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequest(f"messages: expected values that JSON has, found others: {error}") from error
        line = self._ask(request)
        try:
            answer = json.loads(line)
        except ValueError:
            raise ChatTemplateError(self._last_words()) from None
        if "error" in answer:
            raise ChatTemplateError(f"the model's chat template failed: {answer['error'][:_LONGEST_REASON]}")
        return str(answer["text"])

    def _ask(self, request: str) -> bytes:
        """The child's answer; no whole line when it died. Raises ChatTemplateError after the deadline."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        lines = request + "\n"
        if self._child is None:
            self._child = self._start()
            lines = json.dumps(self._setup) + "\n" + lines
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        deadline = threading.Timer(self._limits.seconds, stop)
        deadline.start()
        try:
            child.stdin.write(lines.encode())
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C: what the child answers later would be taken for another answer
            self.close()
            raise
        finally:
            deadline.cancel()
        if late.is_set():
            self.close()
            raise ChatTemplateError(
                f"the model's chat template took longer than {self._limits.seconds:g} s and was stopped"
            )
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        passed = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=passed | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def _last_words(self) -> str:
        """What is to be said about a child that died."""
        child, self._child = self._child, None
        assert child is not None
        child.kill()
        _, stderr = child.communicate()
        reason = stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {child.returncode}"
        return (
            f"the process that renders the model's chat template died within its limits of "
            f"{self._limits.memory >> 20} MiB and {self._limits.seconds:g} s: {reason[:_LONGEST_REASON]}"
        )

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    """Render what comes on standard input, for another program."""
    setup = json.loads(sys.stdin.buffer.readline())
    limits = TemplateLimits(**setup.pop("limits", {}))
    with ChatRenderer(**setup, limits=limits) as renderer:
        for line in sys.stdin.buffer:
            try:
                answer = {"text": renderer.render(json.loads(line))}
            except RcpRunError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
