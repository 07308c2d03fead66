"""How far the indexing of the photo folders is: written by the process that does it, read by those that serve."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from dqe_engine.contracts.parsing import NOT_JSON
from dqe_engine.files import atomic_write

_DEAD = ("Z", "X")


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """done, total: images compared, then images indexed. skipped: images that were left out, how many by reason. started: when, in
    seconds of the epoch. pid, born: of the process; a later one may have the same pid, but was not born then."""

    state: Literal["comparing", "indexing", "done", "failed"]
    done: int = 0
    total: int = 0
    message: str = ""
    skipped: dict[str, int] = {}
    started: float = msgspec.field(default_factory=time.time)
    pid: int = msgspec.field(default_factory=os.getpid)
    born: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed")


def write_progress(file: Path, progress: Progress) -> None:
    """Whoever reads finds this or what was there before. Raises OSError."""
    with atomic_write(file) as stream:
        stream.write(msgspec.json.encode(progress))


def read_progress(file: Path) -> Progress | None:
    """None where nobody has written any. Of a process that ended without a word, a failure that says so."""
    try:
        progress = msgspec.json.decode(file.read_bytes(), type=Progress)
    except (OSError, *NOT_JSON):
        return None
    if progress.is_over or (progress.born and born(progress.pid) == progress.born):
        return progress
    message = f"indexing ended unexpectedly after {progress.done} of {progress.total} images; it goes on at the next start"
    return msgspec.structs.replace(progress, state="failed", message=message)


def born(pid: int) -> str:
    """A name for when this process began; empty for one that is not there, or has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0].decode() in _DEAD else fields[19].decode()
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:  # no such files on this system: a pid will have to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "there"
