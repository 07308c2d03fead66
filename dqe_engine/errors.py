"""The errors that users can mend. Command lines print them as one line and exit with code 2."""

from __future__ import annotations


class DQEError(Exception):
    """Base class. The message is one line: what came, what was expected, what to do."""

    exit_code = 2
    """Of command lines: 2 for what was given, 1 where a check of what was made failed."""


class InputError(DQEError, ValueError):
    """An image, text, id or option that cannot be used."""


class BundleError(DQEError):
    """A bundle that is missing, damaged, of a newer schema, or another model's."""


class IndexFormatError(DQEError):
    """A saved index that is missing, damaged, or belongs to another model."""


class IndexConflictError(IndexFormatError):
    """A save to a place where another writer has saved meanwhile, or another index lies; nothing was written."""


class CheckpointError(DQEError):
    """A training checkpoint that is missing, damaged, or does not fit the configuration."""


class ExportError(DQEError):
    """An export that cannot be made, or whose graphs are not the model's; nothing was written."""


class ParityError(ExportError):
    """An export that was made, and is not close enough to PyTorch; nothing was written."""

    exit_code = 1


class BackendError(DQEError):
    """A provider, kernel or library that was asked for and is not usable on this machine."""


class OverloadError(DQEError):
    """A queue that is full: ask again later, or elsewhere."""


class DeadlineError(DQEError):
    """An answer that was not there in time; nobody works on it any more, or nobody waits."""
