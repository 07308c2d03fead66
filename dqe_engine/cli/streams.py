"""The standard streams of a command: all three open, able to take every character, and done with before the interpreter ends."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ESCAPE = "dqe-escape"
_RAISING = frozenset({"strict", "surrogateescape"})
"""Error handlers that raise for a character which the encoding lacks. Any other one was chosen, and stays."""


def prepare_streams() -> None:
    """Make the standard streams usable, whatever this process was started with.

    One that is closed (`2>&-`) is opened on the null device. Left closed, its number would go to the next file that is opened,
    and a library's complaint to "standard error" would be written into, say, an index. A character that the encoding lacks (Δ in
    Latin-1) is written as JSON's escape `\\u0394`, so that `--json` prints JSON in any encoding; the bytes of a file name that are
    not Unicode leave as they came in.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python's word for a closed one
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)
    codecs.register_error(_ESCAPE, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors=_ESCAPE)


def drop_unwritten() -> None:
    """Throw away what a full disk or a reader that has gone did not take: the interpreter would complain of it once more as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of an encoder."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte of a file name that is not Unicode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)), error.start + 1
