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


class BadOption(ConversionError):
    """An option or recipe key is unknown, has a value that it cannot have, or contradicts another."""


class BadTrainingData(ConversionError):
    """A training or evaluation text cannot be read, or there is too little of it."""


class NotEnoughMachine(ConversionError):
    """The training does not fit this machine: memory, or a reasonable time."""


class ProcessDied(ConversionError):
    """One of the processes that train together has failed, or was killed."""

    def __init__(self, message: str, exit_code: int) -> None:
        """exit_code: as subprocess gives it, below 0 for a signal."""
        super().__init__(message)
        self.exit_code = exit_code


class RunNotFound(ConversionError):
    """There is no run folder of this name, or none in the state that was asked for."""


class BadRun(ConversionError):
    """A run folder cannot be used: in use, incomplete, or of another recipe."""


class NotSaved(ConversionError):
    """What a run has to keep cannot be written: no room, or no permission."""


class BadCompiler(ConversionError):
    """torch.compile was asked for, and changes what the model would learn."""


class TrainingDiverged(ConversionError):
    """The loss or a gradient is not finite, or the loss has exploded."""
