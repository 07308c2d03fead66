"""One search over a snapshot of the index: filter, restrict to candidates, select, translate positions to ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import select_zones

from .filters import Filter, compile_filter

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Match:
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

    items: NDArray[Any]  # (N, M, D)
    ids: list[str]  # by position, at least N
    metadata: list[dict[str, Any] | None]
    dead: I64  # positions of removed items, sorted
    excluded: list[I64]  # per query, positions, sorted and unique


def search_snapshot(
    view: Snapshot, queries: F32, k: int, *, filter: Filter | None, zones: ZoneSpec | None, picks: int
) -> tuple[IndexMatches, ...]:
    """See `GalleryIndex.search`."""
    candidates = _candidates(view, filter)
    items, positions, excluded = _restrict(view, candidates)
    found = select_zones(
        np.ascontiguousarray(queries),
        items,
        k=min(k, len(candidates)),
        zones=zones,
        picks=min(picks, len(candidates)) if zones is not None else 0,
        counts=zones is not None,
        exclude=excluded,
    )

    def matches(rows: I64, scores: F32) -> tuple[Match, ...]:
        hits = [(int(row if positions is None else positions[row]), float(s)) for row, s in zip(rows, scores, strict=True) if row >= 0]
        return tuple(Match(view.ids[at], score, copy.deepcopy(view.metadata[at])) for at, score in hits)

    results = []
    for b in range(len(queries)):
        counts = None if found.counts is None else (int(found.counts[b, 0]), int(found.counts[b, 1]), int(found.counts[b, 2]))
        picked = () if found.picks is None or found.pick_scores is None else matches(found.picks[b], found.pick_scores[b])
        results.append(IndexMatches(matches(found.ids[b], found.scores[b]), counts, picked))
    return tuple(results)


def _candidates(view: Snapshot, filter: Filter | None) -> I64:
    """Sorted positions of the live items that pass the filter."""
    passes = np.ones(len(view.items), np.bool_)
    if filter is not None:
        predicate = compile_filter(filter)
        passes[:] = [predicate(view.metadata[at]) for at in range(len(passes))]
    passes[view.dead] = False
    return np.flatnonzero(passes).astype(np.int64)


def _restrict(view: Snapshot, candidates: I64) -> tuple[NDArray[Any], I64 | None, Sequence[I64] | None]:
    """Items to search, their positions (None: as they are), and per query the rows of them to exclude.

    Few candidates are gathered; otherwise the mapped array is searched in place and the others are excluded. Either way
    rows keep their order, so ties still go to the older item.
    """
    if 2 * len(candidates) <= len(view.items):
        rows = [np.searchsorted(candidates, np.intersect1d(candidates, ids)) for ids in view.excluded]
        return view.items[candidates], candidates, rows
    others = np.setdiff1d(np.arange(len(view.items)), candidates, assume_unique=True)
    excluded = [np.union1d(others, ids) if len(ids) else others for ids in view.excluded] if len(others) else view.excluded
    return view.items, None, excluded if any(map(len, excluded)) else None
