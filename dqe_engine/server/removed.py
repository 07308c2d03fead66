"""`Removed`: the ids that somebody removed while a photo of that name lay in a watched folder, so that `--update` leaves the photo out."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from dqe_engine.contracts.parsing import NOT_JSON
from dqe_engine.files import fsync_path, open_in_place


def removed_beside(index: Path) -> Path:
    """Where `Removed` is kept of an index: INDEX.removed."""
    return index.with_name(index.name + ".removed")


class Removed:
    """A file of JSON strings, one a line, that only grows. Threads and processes may share it; it is made by the first `add`.

    An id is written before the save that removes its item, or puts an upload in the place of its photo, under the lock of the index, so
    whoever sees the item gone finds the id here. It stays when the save fails, or when it is given to a new item: it says nothing of an
    item that is in the index.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, ids: Iterable[str]) -> None:
        """On the disk when this returns. Raises OSError."""
        lines = b"\n" + b"".join(msgspec.json.encode(id) + b"\n" for id in ids)  # the first ends what a killed process began
        try:
            descriptor, made = open_in_place(self.file, os.O_WRONLY | os.O_APPEND), False
        except FileNotFoundError:
            descriptor, made = open_in_place(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), True
        try:
            written = os.write(descriptor, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, f"only {written} of {len(lines)} bytes were written", str(self.file))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if made:
            fsync_path(self.file.parent)

    def ids(self) -> frozenset[str]:
        """Raises OSError."""
        try:
            descriptor = open_in_place(self.file, os.O_RDONLY)
        except FileNotFoundError:
            return frozenset()
        with open(descriptor, "rb") as stream:
            return frozenset(id for line in stream if (id := _id(line)) is not None)

    def clear(self) -> None:
        """Forget all. Raises OSError."""
        self.file.unlink(missing_ok=True)
        if self.file.parent.is_dir():
            fsync_path(self.file.parent)


def _id(line: bytes) -> str | None:
    """None for an empty line, and for one that a kill cut short."""
    try:
        return msgspec.json.decode(line, type=str)
    except NOT_JSON:
        return None
