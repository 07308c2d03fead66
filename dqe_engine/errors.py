"""The errors that users can mend. Command lines print them as one line and exit with code 2."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DQEError(Exception):
    """Base class. The message is one line: what came, what was expected, what to do.

    Line breaks, control characters and lone surrogates in it, which names in files and paths may hold, are escaped: `\\n`.
    """

    exit_code = 2
    """Of command lines: 2 for what was given, 1 where a check of what was made failed."""

    def __init__(self, message: object) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], str(message)))


class InputError(DQEError, ValueError):
    """An image, text, id or option that cannot be used."""


class UnknownItemError(InputError):
    """An id that no item of the index has."""


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


class NoAnswerError(BackendError):
    """Shards, or a database, that gave no answer: whoever asks them next would wait as long. parts: the names of those shards."""

    def __init__(self, message: object, *, parts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.parts = parts


class OverloadError(DQEError):
    """A queue that is full: ask again later, or elsewhere."""


class DeadlineError(DQEError):
    """An answer that was not there in time; nobody works on it any more, or nobody waits."""


def one_line(error: BaseException) -> str:
    """What another library's exception says, for a message of ours."""
    return " ".join(str(error).split())[:300]
