"""Chat messages to a prompt, by the chat template in the model file. Knows nothing of tokens or models.

A template is foreign code. jinja2's sandbox keeps it from the interpreter's internals, but bounds neither its time nor
its memory: nested loops, joins and formats blow up under it. So each rendering has a child process (template_child.py)
that gets an almost empty environment, limits on address space and CPU time from the operating system, and a wall-clock
deadline after which it is killed. Where the system has no such limits (macOS, Windows) the deadline is what holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcprun.errors import BadRequest, ChatTemplateError

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
    """Wall clock, the child's start included."""
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


def render_chat(
    template: str | None,
    messages: Sequence[Message],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    limits: TemplateLimits | None = None,
) -> str:
    """The prompt, special tokens included, that the template makes of the messages.

    Raises ChatTemplateError when there is no template, or when it fails, refuses the messages (`raise_exception`) or
    exceeds a limit; BadRequest for messages that are none.
    """
    template = require_template(template)
    check_messages(messages)
    limits = limits or TemplateLimits()
    variables = {
        "messages": [dict(message) for message in messages],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    request = {
        "template": template,
        "variables": variables,
        "seconds": int(limits.seconds) + 1,
        "memory": limits.memory,
        "largest_output": limits.largest_output,
    }
    passed = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=limits.seconds,
            env=passed | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ChatTemplateError(
            f"the model's chat template took longer than {limits.seconds:g} s and was stopped"
        ) from None
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last_words = child.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"status {child.returncode}"
        raise ChatTemplateError(
            f"the process that renders the model's chat template died within its limits of {limits.memory >> 20} MiB "
            f"and {limits.seconds:g} s: {last_words[:_LONGEST_REASON]}"
        ) from None
    if "error" in answer:
        raise ChatTemplateError(f"the model's chat template failed: {answer['error'][:_LONGEST_REASON]}")
    return str(answer["text"])
