"""The errors that users can mend. Command lines print them as one line and exit with code 2."""

from __future__ import annotations


class DQEError(Exception):
    """Base class. The message is one line: what came, what was expected, what to do."""


class InputError(DQEError, ValueError):
    """An image, text, id or option that cannot be used."""


class BundleError(DQEError):
    """A bundle that is missing, damaged, of a newer schema, or another model's."""


class IndexFormatError(DQEError):
    """A saved index that is missing, damaged, or belongs to another model."""


class CheckpointError(DQEError):
    """A training checkpoint that is missing, damaged, or does not fit the configuration."""


class ExportError(DQEError):
    """An export whose graphs failed validation; nothing was written."""


class BackendError(DQEError):
    """A provider, kernel or library that was asked for and is not usable on this machine."""
