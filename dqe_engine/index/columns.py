"""Rows in memory: what is saved stays memory-mapped, what was added since lies in one growing array beside it."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.processors import available_cpus
from dqe_engine.zones import Screen
from dqe_engine.zones.lists import LEAST_TOKENS, NoLists, TokenLists
from dqe_engine.zones.prefix import Prefix
from dqe_engine.zones.screen import CodedShard

_LOG = logging.getLogger(__name__)
_UNLISTED_SHARE = 8
"""Lists and prefixes are made anew when more than one in so many rows is in none."""
_CLUSTERED_AFTER = 256
"""Searches after which lists and prefixes are made: they take the time of some hundreds, lost on a process that asks few."""

Rows = NDArray[Any]


class Column:
    """An append-only column of rows of one shape and dtype. Not thread-safe; arrays it gave out never change."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, saved: Rows | None = None) -> None:
        """`saved`: (n, *shape) rows to start from, typically a memory map."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._saved = np.empty((0, *shape), self.dtype) if saved is None else saved
        self._buffer = np.empty((0, *shape), self.dtype)
        self._added = 0

    def __len__(self) -> int:
        return len(self._saved) + self._added

    def __getitem__(self, position: int) -> Rows:
        """Row `position`, of the column's shape."""
        added = position - len(self._saved)
        row: Rows = self._saved[position] if added < 0 else self._buffer[: self._added][added]
        return row

    def append(self, rows: Rows) -> None:
        """Append (n, *shape) rows, already of this column's dtype; costs their own size, amortised."""
        self.reserve(len(rows))
        size = self._added + len(rows)
        self._buffer[self._added : size] = rows  # beyond every view given out so far
        self._added = size

    def reserve(self, rows: int) -> None:
        """Have memory for that many more."""
        size = self._added + rows
        if size > len(self._buffer):
            grown = np.empty((size + size // 2, *self.shape), self.dtype)
            grown[: self._added] = self._buffer[: self._added]
            self._buffer = grown

    def taken(self, positions: NDArray[np.int64]) -> Column:
        """A column of copies of these rows, ascending or not."""
        found = Column(self.shape, self.dtype)
        found.reserve(len(positions))
        saved = positions < len(self._saved)
        rows = found._buffer[: len(positions)]
        rows[saved] = self._saved[positions[saved]]
        rows[~saved] = self._buffer[positions[~saved] - len(self._saved)]
        found._added = len(positions)
        return found

    def followed_by(self, rows: Rows) -> Column:
        """The saved rows and these."""
        found = Column(self.shape, self.dtype, self._saved)
        found.append(rows)
        return found

    def rows(self) -> Rows:
        """All rows, where none are saved."""
        assert not len(self._saved)
        return self._buffer[: self._added]

    def since(self, start: int) -> list[Rows]:
        """Rows from `start` on, as views."""
        saved = len(self._saved)
        pieces = (self._saved[start:], self._buffer[max(0, start - saved) : self._added])
        return [piece for piece in pieces if len(piece)]

    def shards(self) -> tuple[Rows, Rows]:
        """What is saved and what was added: two C-contiguous arrays, read-only by agreement."""
        return self._saved, self._buffer[: self._added]


class ScreenCache:
    """The 8-bit copy (`Screen`) of rows that are appended to, made at the first call. Threads may ask at the same time.

    It follows the rows, not the arrays that they lie in: saving, after which the same rows lie in a file, changes nothing in it.
    """

    def __init__(self, codes: CodedShard | None = None) -> None:
        """`codes`: of the first rows, where they are known."""
        self._lock = threading.Lock()
        self._first = codes
        self._added: tuple[Column, ...] = ()  # of the rows after those
        self._lists: TokenLists | None = None
        self._prefix: Prefix | None = None
        self._listed = 0  # rows there were when lists were last begun
        self._searches = 0
        self._clustering = threading.Lock()

    def screen(self, *shards: Rows, threads: int = 0) -> tuple[tuple[Rows, ...], Screen]:
        """The shards, cut where the codes are, and their screen.

        `shards`: all rows in their order; those of one call are a prefix of those of another. Only what is new is quantised.
        threads: at most; 0: one per processor.
        """
        with self._lock:
            if self._first is None:
                (self._first,) = Screen.build(shards[0], threads=threads, lists=False, prefix=False).shards
            if not self._added:
                self._added = tuple(Column(array.shape[1:], array.dtype) for array in self._first)
            first = len(self._first.codes)
            if new := _rows_from(shards, first + len(self._added[0])):
                grown = tuple(copy.copy(column) for column in self._added)
                for coded in Screen.build(new, threads=threads, lists=False, prefix=False).shards:
                    arrays: tuple[Rows, ...] = tuple(coded)
                    for column, rows in zip(grown, arrays, strict=True):
                        column.append(rows)
                self._added = grown  # all four or none, should memory run out
            parts = (self._first, _coded(self._added))
        pieces, codes, start = [], [], 0
        for shard in shards:
            for begin, end in pairwise(sorted({0, min(max(first - start, 0), len(shard)), len(shard)})):
                part, origin = (parts[0], start) if start + begin < first else (parts[1], start - first)
                pieces.append(shard[begin:end])
                codes.append(_rows(part, slice(origin + begin, origin + end)))
            start += len(shard)
        return (tuple(pieces), Screen(tuple(codes), *self._current_levels(shards, threads))) if pieces else (shards[:1], Screen(parts[:1]))

    def _current_levels(self, shards: Sequence[Rows], threads: int) -> tuple[TokenLists | None, Prefix | None]:
        """Lists and prefixes of all rows but the last few; None until they are made, by a thread of their own, while searches go on."""
        self._searches += 1
        count = sum(map(len, shards))
        due = self._searches > _CLUSTERED_AFTER and count * shards[0].shape[1] >= LEAST_TOKENS
        if due and count > self._listed + self._listed // _UNLISTED_SHARE and self._clustering.acquire(blocking=False):
            self._listed = count  # also if it fails: it is tried again when there are more rows
            threading.Thread(target=self._cluster, args=(shards, threads), name="dqe-lists").start()
        lists, prefix = self._lists, self._prefix
        return (
            lists if lists is not None and lists.covered <= count else None,
            prefix if prefix is not None and prefix.covered <= count else None,
        )

    def _cluster(self, shards: Sequence[Rows], threads: int) -> None:
        threads = threads or available_cpus()
        try:
            # A try of its own each: where there is no memory for the larger, there may be for the other.
            lists: TokenLists | NoLists = NoLists()
            prefix = None
            try:
                lists = TokenLists.weighed(shards, threads=threads)
            except MemoryError as error:
                _LOG.warning("searches go on without lists of these rows, for there is no memory for them: %s", error)
                if self._lists is not None:
                    return  # those of fewer rows serve on
            try:
                if isinstance(lists, TokenLists):
                    lists = lists.prefixed(shards, threads=threads)
                else:
                    prefix = Prefix.build(shards, threads=threads)
            except MemoryError as error:
                _LOG.warning("searches go on without prefixes of these rows, for there is no memory for them: %s", error)
                prefix = None if isinstance(lists, TokenLists) else self._prefix
            self._lists, self._prefix = lists if isinstance(lists, TokenLists) else None, prefix
        finally:
            self._clustering.release()

    @property
    def nbytes(self) -> int:
        """Of the codes made so far."""
        with self._lock:
            parts = [part for part in (self._first, _coded(self._added) if self._added else None) if part is not None]
        return Screen(tuple(parts), self._lists, self._prefix).nbytes

    def taken(self, rows: NDArray[np.int64]) -> ScreenCache:
        """The cache of these rows alone, ascending, with the codes of all that have been made."""
        with self._lock:
            if self._first is None:
                return ScreenCache()
            parts = [self._first, *([_coded(self._added)] if self._added else [])]
        found, begin = [], 0
        for part in parts:
            end = begin + len(part.codes)
            found.append(_rows(part, rows[np.searchsorted(rows, begin) : np.searchsorted(rows, end)] - begin))
            begin = end
        return ScreenCache(
            CodedShard(
                np.concatenate([part.codes for part in found]),
                np.concatenate([part.scales for part in found]),
                np.concatenate([part.errors for part in found]),
                np.concatenate([part.norms for part in found]),
            )
        )


def _coded(columns: Sequence[Column]) -> CodedShard:
    codes, scales, errors, norms = (column.shards()[1] for column in columns)
    return CodedShard(codes, scales, errors, norms)


def _rows(coded: CodedShard, which: slice | NDArray[np.int64]) -> CodedShard:
    return CodedShard(coded.codes[which], coded.scales[which], coded.errors[which], coded.norms[which])


def _rows_from(shards: Sequence[Rows], start: int) -> list[Rows]:
    """The rows from `start` on of all shards."""
    found, begin = [], 0
    for shard in shards:
        if len(rows := shard[max(0, start - begin) :]):
            found.append(rows)
        begin += len(shard)
    return found
