"""Metadata in typed columns, and the bitmaps of the items that pass a filter."""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dqe_engine.zones.bitmaps import U64, WORD, cut, packed, words_for

from .filters import Combination, Condition, Test
from .metadata_values import Flags, Tally, Values, kind_of

FILTER_BYTES = 16 << 20
"""Maximum bytes of bitmaps kept for recent filters; older filters are evaluated again."""


class MetadataColumns:
    """The metadata of items by position, to be filtered. One thread appends at a time; any number may ask meanwhile.

    Each key has a column per kind of value, which lists the items that have one: strings as codes into a table, numbers as
    float64 (whole numbers beyond 2^53 apart, so that comparisons are exact), bools, nulls, lists as codes of their elements. Only
    appending changes a column, and a question about the first n items never sees what was appended after them.
    """

    def __init__(self) -> None:
        self._size = 0
        self._columns: dict[str, _Column] = {}
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()  # brief: guards what is kept

    def __len__(self) -> int:
        return self._size

    def append(self, metadata: Sequence[Mapping[str, Any] | None]) -> None:
        """Append n items, JSON objects or None. Costs their own size, amortised."""
        found: dict[str, tuple[list[int], list[Any]]] = {}
        for row, entry in enumerate(metadata, self._size):
            if entry:
                for key, value in entry.items():
                    if key not in found:
                        found[key] = ([], [])
                    rows, values = found[key]
                    rows.append(row)
                    values.append(value)
        for key, (rows, values) in found.items():
            column = self._columns.get(key) or _Column()
            column.append(rows, values)
            self._columns[key] = column
        self._size += len(metadata)

    def most_common_keys(self, most: int) -> list[str]:
        """Those that most items have, or had, since items that are gone count too; of as many, the one that was seen first."""
        sizes = [(-column.entries, order, key) for order, (key, column) in enumerate(list(self._columns.items()))]
        return [key for _, _, key in heapq.nsmallest(most, sizes)]

    def tallies(self, key: str, size: int, chosen: Flags | None) -> tuple[int, list[Tally]]:
        """How many of the first `size` items have the key, and their values by kind. `chosen`: of which items, None for all of them."""
        column = self._columns.get(key)
        return (0, []) if column is None else column.tallies(size, chosen)

    def mask(self, filter: Combination, size: int) -> U64:
        """Which of the first `size` items pass: bits as in `zones.bitmaps`, read-only. `size`: at most `len(self)`.

        Bitmaps of the latest filters are kept, and only items that were appended since are evaluated.
        """
        with self._lock:
            kept = self._kept.get(filter.digest)
        if kept is None or kept.size < size:
            start = 0 if kept is None else kept.size // WORD * WORD
            words = self._evaluate(filter, start, size)
            if kept is not None:
                words = np.concatenate((kept.words[: start // WORD], words))
            words.flags.writeable = False
            kept = _Kept(size, words)
        self._keep(filter.digest, kept)
        return cut(kept.words, size)

    def _keep(self, key: bytes, kept: _Kept) -> None:
        with self._lock:
            before = self._kept.pop(key, None)
            if before is not None and before.size > kept.size:
                kept = before  # of another thread, meanwhile
            self._kept[key] = kept
            self._kept_bytes += kept.words.nbytes - (before.words.nbytes if before is not None else 0)
            while self._kept_bytes > FILTER_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].words.nbytes

    def _evaluate(self, test: Test, start: int, stop: int) -> U64:
        """Of the items from `start`, a multiple of 64, to `stop`."""
        if isinstance(test, Condition):
            column = self._columns.get(test.key)
            if column is None:
                passes = np.full(stop - start, test.operator == "exists" and not test.operand)
            else:
                passes = column.passes(test, start, stop)
            return packed(passes)
        words = np.full(words_for(stop - start), 0 if test.operator == "or" else ~np.uint64(0), np.uint64)
        for part in test.parts:
            found = self._evaluate(part, start, stop)
            if test.operator == "or":
                words |= found
            else:
                words &= found if test.operator == "and" else ~found
        return cut(words, stop - start)


class _Kept(NamedTuple):
    size: int  # items that are evaluated
    words: U64


class _Column:
    """All values of one key, by kind."""

    def __init__(self) -> None:
        self._parts: dict[type[Values], Values] = {}

    def append(self, rows: Sequence[int], values: Sequence[Any]) -> None:
        types = set(map(type, values))
        extremes = (min(values), max(values)) if types == {int} else values[:1]
        if len(types) == 1 and len(set(map(kind_of, extremes))) == 1:  # as mostly: no value has to be looked at alone
            self._append(kind_of(values[0]), rows, values)
            return
        kinds = [kind_of(value) for value in values]
        for kind in dict.fromkeys(kinds):
            at = [i for i, other in enumerate(kinds) if other is kind]
            self._append(kind, [rows[i] for i in at], [values[i] for i in at])

    def _append(self, kind: type[Values], rows: Sequence[int], values: Sequence[Any]) -> None:
        part = self._parts.get(kind) or kind()
        part.append(rows, values)
        self._parts = self._parts | {kind: part}  # another dict: a reader may be going through this one

    @property
    def entries(self) -> int:
        return sum(map(len, self._parts.values()))

    def tallies(self, size: int, chosen: Flags | None) -> tuple[int, list[Tally]]:
        """How many items have a value, of whatever kind, and the tallies of the kinds that have one."""
        present, found = 0, list[Tally]()
        for part in self._parts.values():
            entries = part.entries(size, chosen)
            present += entries.stop if isinstance(entries, slice) else int(np.count_nonzero(entries))
            found += part.tally(entries)
        return present, found

    def passes(self, test: Condition, start: int, stop: int) -> Flags:
        flags = np.zeros(stop - start, np.bool_)
        asked = None if test.operator == "exists" else test
        for part in self._parts.values():
            part.mark(flags, start, stop, asked)
        if test.operator == "!=":
            present = np.zeros(stop - start, np.bool_)
            for part in self._parts.values():
                part.mark(present, start, stop, None)
            return present & ~flags
        return ~flags if test.operator == "exists" and not test.operand else flags
