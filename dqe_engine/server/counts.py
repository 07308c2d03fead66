"""`Numbers`, what processes counted, and `CountFiles`, the files in which they share it.

A process lives while it holds the lock of its file. What a dead one counted is kept, added to what other dead ones did; its gauges go away.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

_MOST_SERIES = 2000
"""Series of one family in a process. Labels are of bounded sets; should one be not, further series are counted together as `other`."""


class Histogram(msgspec.Struct, array_like=True):
    counts: list[int]  # of each bucket alone, the last one of what is above all bounds
    total: float = 0.0


class Numbers(msgspec.Struct):
    """What one process counted, or several: by family, then by the values of its labels, joined by line breaks."""

    counters: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)
    histograms: dict[str, dict[str, Histogram]] = msgspec.field(default_factory=dict)
    gauges: dict[str, float] = msgspec.field(default_factory=dict)
    worker: int = 0  # process id
    index: tuple[int, str] | None = None  # generation, revision
    folded: list[str] = msgspec.field(default_factory=list)  # of the dead: names whose numbers are in, and whose files may be there still

    def add(self, other: Numbers) -> None:
        """Its counters and histograms, which only grow."""
        for family, series in other.counters.items():
            own = self.counters.setdefault(family, {})
            for labels, value in series.items():
                own[labels] = own.get(labels, 0.0) + value
        for family, histograms in other.histograms.items():
            mine = self.histograms.setdefault(family, {})
            for labels, one in histograms.items():
                if labels not in mine:
                    mine[labels] = Histogram(list(one.counts), one.total)
                elif len(mine[labels].counts) == len(one.counts):  # else another version's, with other buckets
                    mine[labels] = Histogram(
                        [a + b for a, b in zip(mine[labels].counts, one.counts, strict=True)], mine[labels].total + one.total
                    )


class CountFiles:
    """A folder with a file of numbers and a lock for each process, and one of what the dead ones left."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._told = False
        with self._reading():  # else a reader could take the file for a dead one's before its lock is held
            self._alive: BinaryIO | None = open(folder / f"{self._name}.alive", "wb")  # noqa: SIM115 - until `close`
            fcntl.flock(self._alive, fcntl.LOCK_EX)

    def close(self) -> None:
        with self._lock:
            if self._alive is not None:
                self._alive.close()
                self._alive = None

    def write(self, content: bytes) -> None:
        """The file of this process. A disk that refuses is told once: serving goes on."""
        with self._lock:
            if self._alive is None:
                return
            try:
                _replace(self._folder / f"{self._name}.json", content)
            except OSError as error:
                if not self._told:
                    self._told = True
                    logging.getLogger(__name__).warning(
                        "the metrics of this process cannot be written, so /metrics lacks them", exc_info=error
                    )

    def read(self) -> tuple[Numbers, list[Numbers]]:
        """What the dead counted, and the numbers of each other that lives. One process at a time reads: it also puts the dead aside."""
        try:
            with self._reading():
                return self._read()
        except OSError as error:
            logging.getLogger(__name__).warning("the metrics of other processes cannot be read, so /metrics lacks them", exc_info=error)
            return Numbers(), []

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with open(self._folder / "read.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> tuple[Numbers, list[Numbers]]:
        past = self._folder / "dead.json"
        dead = _parsed(past) or Numbers()
        living, gone = [], []
        for alive in sorted(self._folder.glob("*.alive")):
            name = alive.stem
            if name == self._name:
                continue
            if not _is_held(alive):
                gone.append(name)
            elif (numbers := _parsed(alive.with_suffix(".json"))) is not None:
                living.append(numbers)
        fresh = [name for name in gone if name not in dead.folded]
        for name in fresh:
            numbers = _parsed(self._folder / f"{name}.json")
            if numbers is not None:
                dead.add(numbers)
        if gone or dead.folded:
            dead.folded = gone
            with contextlib.suppress(OSError):
                _replace(past, msgspec.json.encode(dead))  # first, so that a crash in between counts nobody twice
                for name in gone:
                    (self._folder / f"{name}.json").unlink(missing_ok=True)
                    (self._folder / f"{name}.alive").unlink(missing_ok=True)
        return dead, living


def _is_held(file: Path) -> bool:
    """Whether a process that lives has it locked."""
    try:
        with open(file, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _parsed(file: Path) -> Numbers | None:
    """None for one that is missing, or no numbers: a power loss may leave it empty."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Numbers)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _replace(file: Path, content: bytes) -> None:
    """Whole or not at all for who reads; not flushed, as it is worth nothing after a power loss."""
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def bounded(series: Mapping[str, object], labels: str) -> str:
    if labels in series or len(series) < _MOST_SERIES:
        return labels
    return "\n".join("other" for _ in labels.split("\n"))
