"""Renders chat messages by a checkpoint's chat template, in the runtime's sandbox. Knows nothing of tokens or texts.

A template is foreign code, so it runs in a child process with limits (`python -m rcprun.chat`): nothing of the runtime
is imported. One child renders a whole stream of conversations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer

from rcpconv.errors import BadTrainingData
from rcpformat.architecture import TokenizerInfo

SECONDS = 10.0
"""That one conversation may take, and all of them beside MEAN_SECONDS."""
MEAN_SECONDS = 0.05
"""That a conversation may take on average."""


class ChatRenderer:
    """A Render (rcpconv.train.texts) by a model's chat template; to be closed, as by a with statement."""

    def __init__(self, model: str, tokenizer: Tokenizer, info: TokenizerInfo) -> None:
        """model: what error messages call the template's owner."""
        self._model, self._template = model, info.chat_template
        self._setup = {
            "template": info.chat_template,
            "bos_token": "" if info.bos_id is None else tokenizer.id_to_token(info.bos_id),
            "eos_token": tokenizer.id_to_token(info.eos_ids[0]) if info.eos_ids else "",
            "add_generation_prompt": False,
            "limits": {"seconds": SECONDS},
        }
        self._child: subprocess.Popen[str] | None = None
        self._seconds_left = SECONDS

    def __call__(self, messages: list[Any]) -> str | None:
        """The text of a conversation; None where there is no template. Raises BadTrainingData."""
        if self._template is None:
            return None
        began = time.perf_counter()
        answer = self._ask(json.dumps(messages))
        self._seconds_left += MEAN_SECONDS - (time.perf_counter() - began)
        if "error" in answer:
            raise self._failed(answer["error"])
        if self._seconds_left < 0:
            raise self._failed(f"the model's chat template takes longer than {MEAN_SECONDS:g} s for a conversation")
        return str(answer["text"])

    def _ask(self, line: str) -> dict[str, str]:
        lines = line + "\n"
        if self._child is None:
            # In a session of its own: Ctrl-C is this process's to answer.
            command = [sys.executable, "-m", "rcprun.chat"]
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
            lines = json.dumps(self._setup) + "\n" + lines
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(lines)
            child.stdin.flush()
            return json.loads(child.stdout.readline())  # type: ignore[no-any-return]
        except (BrokenPipeError, ValueError):
            raise self._failed("the process that renders its chat template ended") from None

    def _failed(self, reason: str) -> BadTrainingData:
        return BadTrainingData(
            f"{self._model}: {reason}; give plain text (rows with a `text`), or fix the model's chat_template"
        )

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            child.terminate()
            child.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
