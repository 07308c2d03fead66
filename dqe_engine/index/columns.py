"""Rows in memory: what is saved stays memory-mapped, what was added since lies in one growing array beside it."""

from __future__ import annotations

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
        self.saved = np.empty((0, *shape), self.dtype) if saved is None else saved
        self._buffer = np.empty((0, *shape), self.dtype)
        self._added = 0

    def __len__(self) -> int:
        return len(self.saved) + self._added

    def __getitem__(self, position: int) -> Rows:
        """Row `position`, of the column's shape."""
        added = position - len(self.saved)
        row: Rows = self.saved[position] if added < 0 else self._buffer[: self._added][added]
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
        saved = len(self.saved)
        pieces = (self.saved[start:], self._buffer[max(0, start - saved) : self._added])
        return [piece for piece in pieces if len(piece)]

    def shards(self) -> tuple[Rows, ...]:
        """All rows as one or two C-contiguous arrays, read-only by agreement."""
        return tuple(self.since(0)) or (self.saved,)


class ScreenColumns:
    """The 8-bit copy of a column's rows (`Screen`), extended by what was appended to it. Not thread-safe."""

    def __init__(self) -> None:
        self._columns: tuple[Column, ...] | None = None

    def screen(self, column: Column) -> Screen:
        """The screen of `column.shards()`; quantises the rows that were not there at the last call."""
        if self._columns is None:
            (first,) = Screen.build(column.saved).shards
            self._columns = tuple(Column(array.shape[1:], array.dtype, array) for array in first)
        done = len(self._columns[0])
        for rows in column.since(done):
            (coded,) = Screen.build(rows).shards
            for own, name in zip(self._columns, CodedShard._fields, strict=True):
                own.append(getattr(coded, name))
        return Screen(tuple(CodedShard(*arrays) for arrays in zip(*(own.shards() for own in self._columns), strict=True)))
