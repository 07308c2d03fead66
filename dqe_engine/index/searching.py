"""One search over a snapshot of the index: filter, restrict to candidates, select, translate positions to ids."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, select_zones

from .filters import Filter, Predicate, compile_filter, filter_key

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

KEPT_FILTERS = 8
"""Of one state of the index: what passed them is not asked for again."""
KEPT_BYTES = 32 << 20
"""Of the rows of the items that passed a filter; more are gathered anew for each search."""


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
class Candidates:
    """Items that are live and pass a filter: few are gathered, otherwise all are searched where they are, and the others excluded."""

    passes: NDArray[np.bool_]  # (N,)
    count: int
    positions: I64 | None = None  # (C,) where they are few
    items: NDArray[Any] | None = None  # (C, M, D), where they may be kept
    screen: Screen | None = None  # of `items`
    others: I64 = field(default_factory=lambda: np.empty(0, np.int64))  # (N - C,) where they are many


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The index as searches see it until it changes; adding, removing and saving meanwhile change nothing in here."""

    shards: tuple[NDArray[Any], ...]  # each (n, M, D)
    screen: Screen | None  # of the shards
    ids: list[str]  # by position, at least N
    metadata: list[dict[str, Any] | None]
    dead: I64  # positions of removed items, sorted
    candidates: dict[str, Candidates] = field(default_factory=dict)  # by filter

    @property
    def item_bytes(self) -> int:
        shard = self.shards[0]
        return shard.dtype.itemsize * int(np.prod(shard.shape[1:]))

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
    items: NDArray[Any] | tuple[NDArray[Any], ...] = view.shards
    screen, count, gathered = view.screen, view.size, None
    if filter is not None or len(view.dead):
        candidates = _candidates(view, filter)
        count, gathered = candidates.count, candidates.positions
        excluded = [_excluded(ids, candidates) for ids in excluded]
        if gathered is not None:
            screen = candidates.screen
            items = _gather(view, gathered) if candidates.items is None else candidates.items
    found = select_zones(
        np.ascontiguousarray(queries),
        items,
        k=min(k, count),
        zones=zones,
        picks=min(picks, count) if zones is not None else 0,
        counts=zones is not None,
        exclude=excluded if any(map(len, excluded)) else None,
        screen=screen,
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


def _candidates(view: Snapshot, filter: Filter | None) -> Candidates:
    """Of these items; kept with the view, since the next queries often have the same filter, and asking each item takes long."""
    predicate = None if filter is None else compile_filter(filter)
    key = "" if filter is None else filter_key(filter)
    found = view.candidates.get(key)
    if found is None:
        if len(view.candidates) >= KEPT_FILTERS:
            view.candidates.clear()
        found = view.candidates[key] = _find_candidates(view, predicate)
    return found


def _find_candidates(view: Snapshot, predicate: Predicate | None) -> Candidates:
    passes = np.ones(view.size, np.bool_)
    if predicate is not None:
        passes[:] = [predicate(metadata) for metadata in view.metadata[: view.size]]
    passes[view.dead] = False
    positions = np.flatnonzero(passes)
    if 2 * len(positions) > view.size:
        return Candidates(passes, len(positions), others=np.flatnonzero(~passes))
    if len(positions) * view.item_bytes > KEPT_BYTES:
        return Candidates(passes, len(positions), positions)
    items = _gather(view, positions)
    return Candidates(passes, len(positions), positions, items, None if view.screen is None else Screen.build(items))


def _gather(view: Snapshot, positions: I64) -> NDArray[Any]:
    """(C, M, D): these rows; they keep their order, so ties still go to the older item."""
    starts = np.cumsum([0, *map(len, view.shards)])
    cuts = np.searchsorted(positions, starts)
    return np.concatenate([shard[positions[cuts[s] : cuts[s + 1]] - starts[s]] for s, shard in enumerate(view.shards)])


def _excluded(ids: I64, candidates: Candidates) -> I64:
    """The rows of the searched items that are no candidates of a query which leaves out `ids`; both sorted and unique."""
    ids = ids[candidates.passes[ids]]
    if candidates.positions is not None:
        return np.searchsorted(candidates.positions, ids)
    return np.insert(candidates.others, np.searchsorted(candidates.others, ids), ids)
