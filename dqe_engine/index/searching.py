"""One search over a snapshot of the index: filter, select, translate positions to ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.bitmaps import U64, counted

from .filters import Filter, compile_filter
from .metadata import MetadataColumns

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class Match(NamedTuple):
    """One gallery item: its score (MaxSim, higher is better) and a copy of its metadata."""

    id: str
    score: float
    metadata: dict[str, Any] | None


@dataclass(frozen=True)
class IndexMatches:
    """One query's result: `matches` by score descending, then by age in the index (oldest first).

    With zones: `zone_counts` (near, mid, easy) over all candidates, and `picks` out of the mid zone.
    """

    matches: tuple[Match, ...]
    zone_counts: tuple[int, int, int] | None = None
    picks: tuple[Match, ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The index as searches see it until it changes; adding, removing and saving meanwhile change nothing in here."""

    shards: tuple[NDArray[Any], ...]  # each (n, M, D)
    screen: Screen | None  # of the shards
    ids: list[str]  # by position, at least N
    metadata: list[dict[str, Any] | None]
    columns: MetadataColumns  # of the metadata, at least N
    live: U64 | None  # which items are not removed; None for all

    @property
    def size(self) -> int:
        """N, removed items included."""
        return sum(map(len, self.shards))

    def allowed(self, filter: Filter | None) -> U64 | None:
        """Which items are live and pass the filter; None for all."""
        if filter is None:
            return self.live
        passing = self.columns.mask(compile_filter(filter), self.size)
        return passing if self.live is None else passing & self.live


def search_snapshot(
    view: Snapshot,
    queries: F32,
    k: int,
    *,
    excluded: list[I64],
    filter: Filter | None,
    zones: ZoneSpec | None,
    picks: int,
    threads: int,
) -> tuple[IndexMatches, ...]:
    """See `GalleryIndex.search`. `excluded`: per query, positions, sorted and unique."""
    allowed = view.allowed(filter)
    count = view.size if allowed is None else counted(allowed)
    found = select_zones(
        np.ascontiguousarray(queries),
        view.shards,
        k=min(k, count),
        zones=zones,
        picks=min(picks, count) if zones is not None else 0,
        counts=zones is not None,
        exclude=excluded if any(map(len, excluded)) else None,
        allowed=allowed,
        screen=view.screen,
        threads=threads,
    )

    def matches(rows: I64, scores: F32) -> tuple[Match, ...]:
        pairs = zip(rows.tolist(), scores.tolist(), strict=True)
        return tuple([Match(view.ids[at], score, _copied(view.metadata[at])) for at, score in pairs if at >= 0])

    results = []
    for b in range(len(queries)):
        counts = None if found.counts is None else (int(found.counts[b, 0]), int(found.counts[b, 1]), int(found.counts[b, 2]))
        picked = () if found.picks is None or found.pick_scores is None else matches(found.picks[b], found.pick_scores[b])
        results.append(IndexMatches(matches(found.ids[b], found.scores[b]), counts, picked))
    return tuple(results)


def _copied(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if metadata is None else {key: _copied_json(value) for key, value in metadata.items()}


def _copied_json(value: Any) -> Any:
    """`copy.deepcopy` would take microseconds for each item."""
    if isinstance(value, list):
        return [_copied_json(element) for element in value]
    return _copied(value) if isinstance(value, dict) else value
