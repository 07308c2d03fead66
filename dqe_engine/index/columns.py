"""Rows in memory: what is saved stays memory-mapped, what was added since lies in one growing array beside it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones import Screen
from dqe_engine.zones.screen import CodedShard

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
        size = self._added + len(rows)
        if size > len(self._buffer):
            grown = np.empty((size + size // 2, *self.shape), self.dtype)
            grown[: self._added] = self._buffer[: self._added]
            self._buffer = grown
        self._buffer[self._added : size] = rows  # beyond every view given out so far
        self._added = size

    def since(self, start: int) -> list[Rows]:
        """Rows from `start` on, as views."""
        saved = len(self._saved)
        pieces = (self._saved[start:], self._buffer[max(0, start - saved) : self._added])
        return [piece for piece in pieces if len(piece)]

    def shards(self) -> tuple[Rows, Rows]:
        """What is saved and what was added: two C-contiguous arrays, read-only by agreement."""
        return self._saved, self._buffer[: self._added]


class ScreenCache:
    """The 8-bit copy of a column's two shards (`Screen`), made at the first call. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._saved: CodedShard | None = None
        self._added: tuple[Column, ...] = ()

    def screen(self, saved: Rows, added: Rows) -> Screen:
        """`saved` is the same at every call, `added` a prefix of what it was or will be: only what is new is quantised."""
        with self._lock:
            if self._saved is None:
                (self._saved,) = Screen.build(saved).shards
            if not self._added:
                self._added = tuple(Column(array.shape[1:], array.dtype) for array in self._saved)
            done = len(self._added[0])
            if len(added) > done:
                grown = tuple(copy.copy(column) for column in self._added)
                (coded,) = Screen.build(added[done:]).shards
                for column, name in zip(grown, CodedShard._fields, strict=True):
                    column.append(getattr(coded, name))
                self._added = grown  # all four or none, should memory run out
            return Screen((self._saved, CodedShard(*(column.shards()[1][: len(added)] for column in self._added))))
