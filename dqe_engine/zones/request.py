"""What every zone backend receives, already validated, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from .arrays import (
    F32,
    I64,
    MAX_ITEMS,
    Exclusions,
    Items,
    check_array,
    check_counts,
    check_ids,
    checked_bitmap,
    exclusions,
    shards_of,
)
from .bitmaps import U64, counted
from .screen import Screen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZoneSelection:
    """One row per query. Ties: key descending, then id ascending; rows are padded with id -1 and score -inf.

    Fields that were not asked for are None. The zone of Δ = anchor - score follows `lo` and `hi`: near Δ < lo,
    mid lo <= Δ <= hi, easy Δ > hi.
    """

    scores: F32
    """(B, k), descending."""
    ids: I64
    """(B, k), positions in `items`."""
    counts: I64 | None
    """(B, 3): candidates in near, mid and easy."""
    picks: I64 | None
    """(B, P), positions in `items`, by pick key descending."""
    pick_scores: F32 | None
    """(B, P), the picks' scores (not their keys)."""
    lo: F32 | None
    """(B,), the absolute bounds that applied; NaN where ranks were asked of a query without candidates."""
    hi: F32 | None
    anchor_scores: F32 | None
    """(B,), NaN where the query's own best was asked for and it has no candidate."""
    backend: str
    """What ran: "reference", "cpu" or "cuda" (then the arrays are on the device)."""
    rescored: int | None = None
    """(query, item) pairs whose bound from the screen did not decide them and that were scored in full; None: no screen was used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZoneRequest:
    """Validated arguments of `select_zones`; shards always have their token axis, and zones are absolute or by rank."""

    queries: F32  # (B, D)
    shards: tuple[NDArray[Any], ...]  # each (n, M, D), all float32 or all float16; at least one
    k: int
    anchor_ids: I64 | None  # at most one of the two; neither: the query's own best
    anchor_scores: F32 | None
    zones: ZoneSpec | None
    picks: int
    counts: bool
    offsets: I64  # (B + 1,): query b excludes excluded[offsets[b] : offsets[b + 1]]
    excluded: I64  # (E,), ascending and distinct within a query
    allowed: U64 | None  # (1, W) or (B, W), bits as in `bitmaps`: what may be returned, unless `excluded`; None for all
    first_query: int
    screen: Screen | None

    def __post_init__(self) -> None:
        assert self.zones is None or self.zones.bounds != "pooled", "pooled bounds are resolved before a request is made"

    @property
    def batch(self) -> int:
        return len(self.queries)

    @property
    def size(self) -> int:
        """N, the items of all shards."""
        return sum(map(len, self.shards))

    @property
    def candidates(self) -> int:
        """The most items that `allowed` lets one query return."""
        return self.size if self.allowed is None else max(map(counted, self.allowed), default=0)


def validated(
    queries: F32,
    items: Items,
    *,
    k: int,
    anchor: I64 | F32 | None,
    zones: ZoneSpec | None,
    picks: int,
    counts: bool,
    exclude: Exclusions | None,
    allowed: U64 | None = None,
    first_query: int = 0,
    screen: Screen | None = None,
) -> ZoneRequest:
    """Check shapes, dtypes, contiguity and options; `zones` must not be pooled. Raises InputError; copies nothing the size of an input."""
    check_array("queries", queries, (np.float32,), (2,))
    shards = shards_of(items)
    (batch, width), (_, tokens, item_width), size = queries.shape, shards[0].shape, sum(map(len, shards))
    if width != item_width or width == 0:
        raise InputError(f"queries have D={width} and items D={item_width}; both must be the same, at least 1")
    if tokens == 0:
        raise InputError(f"items of shape {shards[0].shape} have no tokens; the middle axis (M) must be at least 1")
    if size > MAX_ITEMS:
        raise InputError(f"items: {size} in all, expected at most {MAX_ITEMS}; search parts and merge them")
    check_counts(batch, k=k, picks=picks, first_query=first_query)
    if zones is None and (picks or counts or anchor is not None):
        raise InputError("anchor, picks and counts need zones: pass zones=ZoneSpec(lo=..., hi=...)")
    if screen is not None:
        screen.check_fits(shards)
    anchor_ids, anchor_scores = _split_anchor(anchor, batch, size)
    offsets, excluded = exclusions(exclude, batch, size)
    return ZoneRequest(
        queries=queries,
        shards=shards,
        k=k,
        anchor_ids=anchor_ids,
        anchor_scores=anchor_scores,
        zones=zones,
        picks=picks,
        counts=counts,
        offsets=offsets,
        excluded=excluded,
        allowed=None if allowed is None else checked_bitmap(allowed, batch, size),
        first_query=first_query,
        screen=screen,
    )


def _split_anchor(anchor: Any, batch: int, size: int) -> tuple[I64 | None, F32 | None]:
    if anchor is None:
        return None, None
    check_array("anchor", anchor, (np.int64, np.float32), (1,))
    if len(anchor) != batch:
        raise InputError(f"anchor: {len(anchor)} entries, expected {batch}, one for each query")
    if anchor.dtype == np.float32:
        return None, anchor
    check_ids("anchor", anchor, size)
    return anchor, None
