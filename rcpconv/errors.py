"""What a user can do wrong, one exception class per kind. Knows nothing of tensors, files or models.

Every message names the subject, what was expected, what was found, and the remedy.
"""

from __future__ import annotations


class ConversionError(ValueError):
    """Base of every error that a user of rcpconv can cause."""


class CheckpointNotFound(ConversionError):
    """There is no folder and no Hub repository of this name, or it holds no checkpoint."""


class AccessDenied(ConversionError):
    """The Hub repository is gated or private, and the caller has no access to it."""


class DownloadFailed(ConversionError):
    """The Hub could not be reached, or the download could not be finished."""


class CorruptCheckpoint(ConversionError):
    """A file of the checkpoint is missing, cut short, or not what its name says."""


class UnsafeCheckpoint(ConversionError):
    """A pickle holds Python objects beside tensors; loading it could run code."""


class BadConfig(ConversionError):
    """config.json or params.json is not valid, or contradicts the tensors."""


class UnsupportedArchitecture(ConversionError):
    """The model computes something that the `.rcp` format does not describe."""


class UnsupportedRope(UnsupportedArchitecture):
    """The RoPE scaling rule is not one of the static ones."""


class UnsupportedFormat(ConversionError):
    """A checkpoint in a form that is not read: quantized, GGUF, a LoRA adapter."""


class MissingTensor(ConversionError):
    """The architecture asks for a tensor that the checkpoint does not hold."""


class UnexpectedTensor(ConversionError):
    """The checkpoint holds a tensor that the architecture has no place for."""


class WrongTensorShape(ConversionError):
    """A tensor's shape is not the one that the architecture asks for."""


class BadTokenizer(ConversionError):
    """The tokenizer is missing, unreadable, or does not fit the model."""


class ExportMismatch(ConversionError):
    """The written file does not hold, bit for bit, what was trained."""


class EvaluationFailed(ConversionError):
    """There is nothing to evaluate, or a run, a file and a text do not go together, or the runtime failed."""


class PushFailed(ConversionError):
    """The Hub refused an upload, or could not be reached."""
