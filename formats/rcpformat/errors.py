"""One exception class per way a `.rcp` file can lie. Knows nothing of bytes, models or devices.

Every message names the subject, what was expected, what was found, and (where there is one) the remedy.
"""

from __future__ import annotations


class FormatError(ValueError):
    """A `.rcp` file, or data meant for one, breaks a rule of formats/SPEC.md."""


class BadMetadata(FormatError):
    """A metadata entry is missing, is not the JSON that it has to be, or holds an impossible value."""


class UnsupportedVersion(FormatError):
    """The file's major format version is not the one this reader was written for."""


class UnknownRequiredFeature(FormatError):
    """The file needs a feature that this reader does not have; a newer release may."""
