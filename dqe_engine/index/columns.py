"""Token rows in memory: what is saved stays memory-mapped, what was added since is appended, and search sees one array."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]


class TokenColumn:
    """An append-only column of (T, W) rows in float32 or float16. Not thread-safe; arrays it gave out never change."""

    def __init__(self, shape: tuple[int, int], dtype: str, saved: Rows | None = None) -> None:
        """`saved`: (n, T, W) rows to start from, typically a memory map."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._pieces: list[Rows] = []
        self._ends: list[int] = []  # _ends[i]: rows in pieces 0 to i
        self._buffer: Rows | None = None  # owned; the first piece is a prefix of it, the rest is room to grow
        if saved is not None and len(saved):
            self._push(saved)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Rows:
        """Row `position`: (T, W)."""
        piece = bisect_right(self._ends, position)
        row: Rows = self._pieces[piece][position - (self._ends[piece - 1] if piece else 0)]
        return row

    def append(self, rows: Rows) -> None:
        """Append (n, T, W) rows, already of this column's dtype; the column keeps the array."""
        if len(rows):
            self._push(np.ascontiguousarray(rows))

    def since(self, start: int) -> list[Rows]:
        """Rows from `start` on, as views."""
        first = bisect_right(self._ends, start)
        skip = start - (self._ends[first - 1] if first else 0)
        return [piece[skip:] if i == 0 else piece for i, piece in enumerate(self._pieces[first:])]

    def matrix(self) -> Rows:
        """All rows as one C-contiguous (n, T, W) array, read-only by agreement.

        Free for a saved column. With unsaved rows the column moves to memory on the first call (until it is saved and
        mapped again); later appends then cost their own size, amortised.
        """
        if not self._pieces:
            return np.empty((0, *self.shape), self.dtype)
        if len(self._pieces) > 1:
            size = len(self)
            held = self._ends[0]
            if self._buffer is None or len(self._buffer) < size:
                grown = np.empty((size + size // 2, *self.shape), self.dtype)
                grown[:held] = self._pieces[0]
                self._buffer = grown
            for piece, end in zip(self._pieces[1:], self._ends[1:], strict=True):
                self._buffer[end - len(piece) : end] = piece  # beyond every view given out so far
            self._pieces, self._ends = [self._buffer[:size]], [size]
        return self._pieces[0]

    def _push(self, rows: Rows) -> None:
        self._ends.append(len(self) + len(rows))
        self._pieces.append(rows)
