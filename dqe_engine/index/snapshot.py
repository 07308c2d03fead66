"""The index at one moment: immutable, so that any number of threads search it, and read its tokens, without a lock."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError, UnknownItemError
from dqe_engine.zones import ZoneSelection, select_zones
from dqe_engine.zones.arrays import F32, I64
from dqe_engine.zones.bitmaps import U64, WORD, counted, unpacked

from .columns import Rows, ScreenCache
from .facets import Facets, collect_facets
from .filters import Combination, Filter, compiled_filter, described
from .table import Table
from .validation import check_count


class Item(NamedTuple):
    """An item's id, a copy of its metadata, and the hash of the image that it was made from (`Indexer`), where that is known."""

    id: str
    metadata: dict[str, Any] | None
    content: str | None


class Page(NamedTuple):
    """Items in their order, the row of the last where more follow, and how many pass in all."""

    items: tuple[Item, ...]
    next: int | None
    total: int


class Match(NamedTuple):
    """One gallery item: its score (MaxSim, higher is better) and a copy of its metadata."""

    id: str
    score: float
    metadata: dict[str, Any] | None


@dataclass(frozen=True)
class IndexMatches:
    """One query's result: `matches` by score descending, then by age in the index (oldest first).

    With zones: `zone_counts` (near, mid, easy) over all candidates, and `picks` out of the mid zone. exact: whether these are provably
    those of all items. lost: the shards that gave no answer, so that their items are missing.
    """

    matches: tuple[Match, ...]
    zone_counts: tuple[int, int, int] | None = None
    picks: tuple[Match, ...] = ()
    exact: bool = True
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The first `rows` rows of an index, of which `count` are live; what is added and removed later changes nothing in here."""

    table: Table
    rows: int
    count: int
    live: U64 | None  # None: all of them
    targets: tuple[Rows, ...]  # each (n, M, D)
    images: tuple[Rows, ...] | None  # each (n, P, Hv)
    screens: ScreenCache | None  # of `targets`, where they are to be screened
    revision: str | None = None  # of the save that has these rows; None where changes are unsaved
    generation: str | None = None  # of that save's files, in which rows keep their numbers

    def row(self, id: object) -> int | None:
        """Where the item with this id lies; None where there is none."""
        row = self.table.row_of(id, self.rows)
        return row if row is not None and self.is_live(row) else None

    def is_live(self, row: int) -> bool:
        """Whether the row's item is there still."""
        return self.live is None or bool(int(self.live[row // WORD]) >> row % WORD & 1)

    def existing(self, id: str) -> int:
        """`row`. Raises UnknownItemError."""
        if (row := self.row(id)) is None:
            raise unknown_item(id)
        return row

    def require(self, ids: Sequence[str]) -> None:
        """Raises UnknownItemError unless all of these are there."""
        for id in ids:
            self.existing(id)

    def find(self, ids: Sequence[str]) -> list[Item | None]:
        """The items with these ids, in this order; None where there is none."""
        return [None if row is None else self.item(row) for row in map(self.row, ids)]

    def key(self, row: int) -> Hashable:
        """A name for what is in the row, for good, whatever becomes of the index."""
        return self.table.identity, row

    def live_rows(self) -> I64:
        """Ascending: from the oldest item to the newest."""
        return self._rows_in(self.live)

    def ids(self) -> tuple[str, ...]:
        """The oldest first."""
        return tuple([self.table.ids[row] for row in self.live_rows().tolist()])

    def items(self, filter: Filter | None = None) -> Iterator[Item]:
        """Those that pass, the oldest first."""
        for row in self._rows_in(self.allowed(filter)).tolist():
            yield self.item(row)

    def page(self, filter: Filter | Combination | None = None, *, after: str | int | None = None, limit: int = 50) -> Page:
        """Up to `limit` items that pass, the oldest first, beginning behind an item's id or a row; what lies before costs nothing.

        An item that was removed since the last page is known still, until the index is compacted. One that was replaced since, or given
        other metadata, is the newest now, so that nothing lies behind it: who lists items while they change gives rows.
        Raises InputError for an id that is not known, and for `limit` below 1.
        """
        check_count("limit", limit, 1)
        row = self.table.row_of(after, self.rows) if isinstance(after, str) else -1 if after is None else after
        if row is None:
            raise InputError(f"after: {described(after)} is not in the index; begin again without it")
        allowed = self.allowed(filter)
        total = self.count if allowed is None else counted(allowed)
        start = min(max(row + 1, 0), self.rows)
        if allowed is None:
            rows = list(range(start, min(start + limit + 1, self.rows)))
        else:
            word = start // WORD
            found = np.flatnonzero(unpacked(allowed[word:], self.rows - word * WORD)) + word * WORD
            first = int(np.searchsorted(found, start))
            rows = found[first : first + limit + 1].tolist()
        items = tuple([self.item(row) for row in rows[:limit]])
        return Page(items, rows[limit - 1] if len(rows) > limit else None, total)

    def facets(self, filter: Filter | None = None, *, most: int = 50) -> Facets:
        """What the metadata of the items that pass holds, with the `most` most common values of each key. Raises InputError."""
        check_count("most", most, 1)
        allowed = self.allowed(filter)
        chosen, total = (None, self.count) if allowed is None else (unpacked(allowed, self.rows), counted(allowed))
        return collect_facets(self.table.columns, self.rows, chosen, total, most)

    def content(self, row: int) -> str | None:
        """The hash of the image that the row was made from, where it is known."""
        return self.table.contents[row]

    def contents(self) -> set[str]:
        """Of all items, as far as they are known."""
        contents = self.table.contents
        if self.live is None:
            return {content for content in contents[: self.rows] if content is not None}
        return {content for row in self.live_rows().tolist() if (content := contents[row]) is not None}

    def contents_among(self, contents: Collection[str]) -> set[str]:
        """Those of some contents that an item has."""
        rows = [row for row, content in enumerate(self.table.contents[: self.rows]) if content in contents]
        return {content for row in rows if self.is_live(row) and (content := self.content(row)) is not None}

    def item(self, row: int) -> Item:
        return Item(self.table.ids[row], _copied(self.table.metadata[row]), self.content(row))

    def target_tokens(self, row: int) -> Rows:
        """(M, D), as stored."""
        return _row(self.targets, row)

    def tokens_of(self, ids: Sequence[str]) -> list[Rows]:
        """`target_tokens` of each. Raises UnknownItemError."""
        return [self.target_tokens(self.existing(id)) for id in ids]

    def image_tokens(self, row: int) -> Rows:
        """(P, Hv), as stored, which may be on the disk. Raises InputError where none are kept."""
        if self.images is None:
            raise InputError(
                f"the index keeps no image tokens, so {self.table.ids[row]!r} cannot be a reference by id; pass its image instead"
            )
        return _row(self.images, row)

    def allowed(self, filter: Filter | Combination | None) -> U64 | None:
        """Which items are live and pass the filter, compiled or not; None for all. Raises InputError for one that says nothing sensible."""
        compiled = compiled_filter(filter)
        if compiled is None:
            return self.live
        passing = self.table.columns.mask(compiled, self.rows)
        return passing if self.live is None else passing & self.live

    def prepare(self, filter: Combination) -> None:
        """Make the bitmap of a filter ahead of a search, which finds it."""
        self.allowed(filter)

    def count_of(self, filter: Filter | Combination | None) -> int:
        """How many items pass."""
        if filter is None:
            return self.count
        allowed = self.allowed(filter)
        return self.count if allowed is None else counted(allowed)

    def search(
        self,
        queries: F32,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | Combination | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        anchors: F32 | None = None,
        threads: int = 0,
    ) -> tuple[IndexMatches, ...]:
        """See `GalleryIndex.search`, which checks the arguments; `filter` may also be compiled. anchors: (B,), the scores that Δ starts
        from in the place of each query's best hit here, for an index that is one of several shards."""
        allowed, excluded, count = self._candidates(exclude, filter)
        targets, screen = (self.targets, None) if self.screens is None else self.screens.screen(*self.targets, threads=threads)
        found = select_zones(
            np.ascontiguousarray(queries),
            targets,
            k=min(k, count),
            anchor=anchors,
            zones=zones,
            picks=min(picks, count) if zones is not None else 0,
            counts=zones is not None,
            exclude=excluded,
            allowed=allowed,
            screen=screen,
            threads=threads,
        )
        return self._answers(found)

    def _candidates(
        self, exclude: Sequence[Collection[str]] | None, filter: Filter | Combination | None
    ) -> tuple[U64 | None, list[I64] | None, int]:
        """The items that a search may find, the rows that each query excludes (None: none does), and how many the first are."""
        allowed = self.allowed(filter)
        excluded = [self._excluded(ids) for ids in exclude or ()]
        return allowed, excluded if any(map(len, excluded)) else None, self.rows if allowed is None else counted(allowed)

    def _answers(self, found: ZoneSelection, first: int = 0) -> tuple[IndexMatches, ...]:
        """A result per query. found: positions and scores as NumPy arrays; first: the row that position 0 is."""
        results = []
        for b in range(len(found.ids)):
            counts = None if found.counts is None else (int(found.counts[b, 0]), int(found.counts[b, 1]), int(found.counts[b, 2]))
            picked = () if found.picks is None or found.pick_scores is None else self._matches(found.picks[b], found.pick_scores[b], first)
            results.append(IndexMatches(self._matches(found.ids[b], found.scores[b], first), counts, picked))
        return tuple(results)

    def _rows_in(self, bitmap: U64 | None) -> I64:
        return np.arange(self.rows) if bitmap is None else np.flatnonzero(unpacked(bitmap, self.rows))

    def _excluded(self, ids: Collection[str]) -> I64:
        """Sorted and unique."""
        rows = {row for id in ids if (row := self.table.row_of(id, self.rows)) is not None}
        return np.array(sorted(rows), np.int64)

    def _matches(self, positions: I64, scores: F32, first: int) -> tuple[Match, ...]:
        ids, metadata = self.table.ids, self.table.metadata
        pairs = zip(positions.tolist(), scores.tolist(), strict=True)
        return tuple([Match(ids[first + at], score, _copied(metadata[first + at])) for at, score in pairs if at >= 0])


def unknown_item(id: str) -> UnknownItemError:
    return UnknownItemError(f"{described(id)} is not in the index")


def _row(shards: tuple[Rows, ...], row: int) -> Rows:
    for shard, end in zip(shards, accumulate(map(len, shards)), strict=True):
        if row < end:
            found: Rows = shard[row - end]
            return found
    raise IndexError(row)


def _copied(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if metadata is None else {key: _copied_json(value) for key, value in metadata.items()}


def _copied_json(value: Any) -> Any:
    """`copy.deepcopy` would take microseconds for each item."""
    if isinstance(value, list):
        return [_copied_json(element) for element in value]
    return _copied(value) if isinstance(value, dict) else value
