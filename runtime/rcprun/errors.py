"""What can go wrong for somebody who runs a model, one class per kind, each with the exit code of `rcp-run`.

Every message is one line that names the subject, what was expected or found, and the remedy. Knows nothing of models.
"""

from __future__ import annotations

from typing import ClassVar


class RcpRunError(ValueError):
    """Base class of every error that a user of the runtime can cause; `exit_code` is what `rcp-run` returns for it."""

    exit_code: ClassVar[int] = 1


class BadRequest(RcpRunError):
    """An option, a prompt or a list of token ids makes no sense: empty, contradictory or out of range."""

    exit_code = 2


class BadModelFile(RcpRunError):
    """The model file is missing, is not a `.rcp` file, breaks the format, or fails its hashes."""

    exit_code = 3


class ContextOverflow(RcpRunError):
    """The prompt does not fit into the context."""

    exit_code = 4


class BackendUnavailable(RcpRunError):
    """The backend that was asked for cannot run here."""

    exit_code = 5


class HubError(RcpRunError):
    """A model could not be fetched from the Hugging Face Hub."""

    exit_code = 6


class ChatTemplateError(RcpRunError):
    """The file has no chat template, or its template failed, refused the messages or broke its limits."""

    exit_code = 7


class OutOfMemory(RcpRunError):
    """The model or its KV cache does not fit into memory."""

    exit_code = 8


class InputOutputError(RcpRunError):
    """The system does not let input be read or output be written: no such folder, no permission, disk full."""

    exit_code = 9


INTERRUPTED_EXIT_CODE = 130
"""What `rcp-run` returns after Ctrl-C (128 + SIGINT), as shells do."""
