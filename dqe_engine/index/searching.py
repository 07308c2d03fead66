"""One search over a snapshot of the index: filter, restrict to candidates, select, translate positions to ids."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, select_zones

from .filters import Filter, compile_filter

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


@dataclass(frozen=True)
class Snapshot:
    """The index as one search sees it; adding, removing and saving meanwhile change nothing in here."""

    shards: tuple[NDArray[Any], ...]  # each (n, M, D)
    screen: Screen | None  # of the shards
    ids: list[str]  # by position, at least N
    metadata: list[dict[str, Any] | None]
    dead: I64  # positions of removed items, sorted

    @property
    def size(self) -> int:
        """N, removed items included."""
        return sum(map(len, self.shards))


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
    if filter is None and not len(view.dead):
        count, gathered = view.size, None
    else:
        passes = _passes(view, filter)
        count = int(np.count_nonzero(passes))
        # Few candidates are gathered; otherwise the rows are searched where they are, and the others excluded.
        gathered = np.flatnonzero(passes) if 2 * count <= view.size else None
        excluded = _excluded(excluded, passes, gathered)
    found = select_zones(
        np.ascontiguousarray(queries),
        view.shards if gathered is None else _gather(view, gathered),
        k=min(k, count),
        zones=zones,
        picks=min(picks, count) if zones is not None else 0,
        counts=zones is not None,
        exclude=excluded if any(map(len, excluded)) else None,
        screen=view.screen if gathered is None else None,
        threads=threads,
    )

    def matches(rows: I64, scores: F32) -> tuple[Match, ...]:
        positions = rows if gathered is None else np.where(rows >= 0, gathered[rows], -1)
        pairs = zip(positions.tolist(), scores.tolist(), strict=True)
        return tuple([Match(view.ids[at], score, _copied(view.metadata[at])) for at, score in pairs if at >= 0])

    results = []
    for b in range(len(queries)):
        counts = None if found.counts is None else (int(found.counts[b, 0]), int(found.counts[b, 1]), int(found.counts[b, 2]))
        picked = () if found.picks is None or found.pick_scores is None else matches(found.picks[b], found.pick_scores[b])
        results.append(IndexMatches(matches(found.ids[b], found.scores[b]), counts, picked))
    return tuple(results)


def _copied(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    flat = all(isinstance(value, str | int | float | None) for value in metadata.values())
    return dict(metadata) if flat else copy.deepcopy(metadata)  # the latter takes microseconds an item


def _passes(view: Snapshot, filter: Filter | None) -> NDArray[np.bool_]:
    """(N,) whether the item is live and passes the filter."""
    passes = np.ones(view.size, np.bool_)
    if filter is not None:
        predicate = compile_filter(filter)
        passes[:] = [predicate(view.metadata[at]) for at in range(len(passes))]
    passes[view.dead] = False
    return passes


def _gather(view: Snapshot, positions: I64) -> NDArray[Any]:
    """(C, M, D): these rows; they keep their order, so ties still go to the older item."""
    starts = np.cumsum([0, *map(len, view.shards)])
    cuts = np.searchsorted(positions, starts)
    return np.concatenate([shard[positions[cuts[s] : cuts[s + 1]] - starts[s]] for s, shard in enumerate(view.shards)])


def _excluded(excluded: list[I64], passes: NDArray[np.bool_], gathered: I64 | None) -> list[I64]:
    """Per query, the rows of the searched items that are none of its candidates, sorted."""
    if gathered is not None:
        return [np.searchsorted(gathered, np.intersect1d(gathered, ids)) for ids in excluded]
    others = np.flatnonzero(~passes)
    return [np.union1d(others, ids) if len(ids) else others for ids in excluded]
