"""What an index knows of its rows besides their tokens: ids, metadata and content hashes, append-only, so that any number of snapshots
share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dqe_engine.zones.bitmaps import U64, packed

from .metadata import MetadataColumns

Metadata = dict[str, Any]


class Table:
    """Rows by position, the oldest first. One thread appends; what a reader learns of the first `rows` of them never changes.

    An id that is given again has a further row. All its rows are known, the newest first, so that a snapshot finds the one of its time.
    """

    def __init__(self) -> None:
        self.identity = object()  # with a row's number, a name for what is in that row, for good
        self.ids: list[str] = []
        self.metadata: list[Metadata | None] = []
        self.contents: list[str | None] = []
        self.columns = MetadataColumns()
        self._newest: dict[str, int] = {}
        self._older: dict[int, int] = {}  # the row of the same id before this one

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[str], metadata: Sequence[Metadata | None], contents: Sequence[str | None]) -> None:
        """A row for each of `ids`. An id that comes twice has two rows."""
        start = len(self.ids)
        self.columns.append(metadata)
        self.metadata.extend(metadata)
        self.contents.extend(contents)
        self.ids.extend(ids)
        for row, id in enumerate(ids, start):
            if (before := self._newest.get(id)) is not None:
                self._older[row] = before  # first: a reader that meets the new row goes on to this one
            self._newest[id] = row

    def row_of(self, id: object, rows: int) -> int | None:
        """The newest of the first `rows` that has this id, removed or not."""
        row = self._newest.get(id) if isinstance(id, str) else None
        while row is not None and row >= rows:
            row = self._older.get(row)
        return row


class Live:
    """Which rows are there, as flags that grow. Bitmaps that it gave out never change."""

    def __init__(self, rows: int = 0) -> None:
        self._flags = np.ones(rows, np.bool_)
        self._rows = self.count = rows

    def __getitem__(self, row: int) -> bool:
        return bool(self._flags[row])

    def append(self, rows: int) -> None:
        if self._rows + rows > len(self._flags):
            grown = np.zeros((self._rows + rows) * 3 // 2, np.bool_)
            grown[: self._rows] = self._flags[: self._rows]
            self._flags = grown
        self._flags[self._rows : self._rows + rows] = True
        self._rows += rows
        self.count += rows

    def remove(self, rows: Iterable[int]) -> None:
        """Rows that are there."""
        gone = np.fromiter(rows, np.int64)
        self._flags[gone] = False
        self.count -= len(gone)

    def count_from(self, start: int) -> int:
        """How many are there of those from `start` on."""
        return int(np.count_nonzero(self._flags[start : self._rows]))

    def rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Those that are there, ascending."""
        return np.flatnonzero(self._flags[: self._rows])

    def bitmap(self) -> U64 | None:
        """None where nothing was removed."""
        return None if self.count == self._rows else packed(self._flags[: self._rows])
