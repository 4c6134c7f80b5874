"""The errors that a user can cause, and mend.

Each message says what was given, what was expected and the remedy. The command line prints the message alone and
exits with status 1; anything that is not a `GroodError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "AlteredFileError",
    "FormatError",
    "GroodError",
    "MissingDependencyError",
    "ModelMismatchError",
    "NewerFormatError",
    "NotFittedError",
    "TruncatedFileError",
]


class GroodError(ValueError):
    """Bad input or misuse, with the remedy in its message."""


class NotFittedError(GroodError):
    """A detector was asked to score before `fit`, or to decide before `calibrate`."""


class FormatError(GroodError):
    """A file is no detector file, or one that cannot be read; its subclasses tell why."""


class NewerFormatError(FormatError):
    """A detector file was written by a newer version of the library."""


class TruncatedFileError(FormatError):
    """The end of a detector file is missing."""


class AlteredFileError(FormatError):
    """A detector file differs from what was written, or says what no fit can have written."""


class ModelMismatchError(GroodError):
    """A detector file was fitted on another model than the one it is loaded with."""


class MissingDependencyError(ImportError, GroodError):
    """An optional package is not installed; the message names the extra that brings it."""
