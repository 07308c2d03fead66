"""Pooled bounds: fractions of the Δ >= 0 of all queries taken together, made into absolute bounds once for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec

from .arrays import F32, I64, Exclusions, Items
from .bitmaps import U64, WORD, unpacked
from .philox import uniform
from .reference import max_sim
from .request import validated

PAIRS = 1 << 22
"""Pairs of query and item that the bounds are read from; up to as many, from all there are."""
LEAST_QUERIES = 1024
"""Queries among them, at least, where there are as many: what differs between queries is what a sample must average."""
NO_DELTA = float(np.finfo(np.float32).max)
"""Both bounds where nothing scores at or below its target: finite, so that JSON can hold it."""

_CHUNK_VALUES = 1 << 24
_ANY = ZoneSpec(lo=0.0, hi=0.0)


def resolve_pooled(
    spec: ZoneSpec,
    queries: F32,
    items: Items,
    *,
    anchor: I64 | F32 | None = None,
    exclude: Exclusions | None = None,
    allowed: U64 | None = None,
) -> ZoneSpec:
    """The absolute zones that pooled ones are for these queries and items; a `spec` that is not pooled comes back as it is.

    The pool: Δ = anchor - s of every query and candidate, where Δ >= 0 and finite. Items that are excluded or not allowed and the
    anchor's own item (its id, or the query's own best) are no part of it, nor is a NaN. A fraction p becomes the value at rank
    floor(p * (n - 1)) of the n values in ascending order, and lo = 0 becomes 0. An empty pool gives lo = hi = `NO_DELTA`: nothing
    is mid, all is near.

    Up to `PAIRS` pairs, the pool is exact. Above, it is that of `LEAST_QUERIES` queries or more and some thousand items, one
    from each of as many equal parts of the rows, always the same. The fraction of the whole pool below a bound is then off by up to
    a tenth of itself at 0.002 and a twentieth at 0.02 (measured: docs/method.md).

    Arguments are those of `select_zones`, except that NumPy arrays alone are taken; they must be those of *all* queries.
    The result depends on them alone, not on blocks, threads or ranks, and is the same for every backend. Times two in all
    scores is times two in the bounds. Raises InputError.
    """
    if spec.bounds != "pooled":
        return spec
    request = validated(queries, items, k=0, anchor=anchor, zones=_ANY, picks=0, counts=False, exclude=exclude, allowed=allowed)
    shards = request.shards
    starts = np.cumsum([0, *map(len, shards)])

    def gather(positions: I64) -> NDArray[Any]:
        cuts = np.searchsorted(positions, starts)
        parts = [shard[positions[a:b] - start] for shard, start, a, b in zip(shards, starts, cuts, cuts[1:], strict=False) if a < b]
        return np.concatenate(parts) if parts else shards[0][:0]

    return resolve(
        spec,
        Pool(
            batch=request.batch,
            size=request.size,
            tokens=shards[0].shape[1],
            queries=lambda rows: request.queries[rows],
            items=gather,
            anchor_ids=request.anchor_ids,
            anchor_scores=request.anchor_scores,
            offsets=request.offsets,
            excluded=request.excluded,
            allowed=request.allowed,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pool:
    """Queries, items and anchors of a call, wherever they lie; `request.ZoneRequest` says what the arrays are."""

    batch: int
    size: int
    tokens: int
    queries: Callable[[I64], F32]
    """The queries in some rows, ascending: (b, D)."""
    items: Callable[[I64], NDArray[Any]]
    """The items at some positions, ascending: (n, M, D)."""
    anchor_ids: I64 | None
    """-1 for a query without an anchor."""
    anchor_scores: F32 | None
    offsets: I64
    excluded: I64
    allowed: U64 | None

    def places(self) -> I64:
        """The items that any query may return."""
        if self.allowed is None:
            return np.arange(self.size)
        return np.flatnonzero(unpacked(np.bitwise_or.reduce(self.allowed, axis=0), self.size))


def resolve(spec: ZoneSpec, pool: Pool) -> ZoneSpec:
    """`resolve_pooled`, from wherever the arrays lie."""
    places = pool.places()
    rows, drawn = sample(pool.batch, len(places))
    positions = places[drawn]
    if not len(rows) or not len(positions):
        return msgspec.structs.replace(spec, bounds="absolute", lo=NO_DELTA, hi=NO_DELTA)
    queries = pool.queries(rows)  # (b, D)
    hidden = _excluded_of(pool, rows)
    scores = np.empty((len(rows), len(positions)), np.float32)
    for columns, part in _scores(pool, queries, positions):
        scores[:, columns] = part
    anchors, ids = _anchors(pool, rows, queries, places, hidden)
    _hide(scores, positions, *hidden)
    _hide_others(scores, positions, pool, rows)
    _hide(scores, positions, np.arange(len(rows)), ids)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = anchors[:, None] - scores  # (b, n)
    values = delta[(delta >= 0) & (delta < np.inf)]
    if not len(values):
        return msgspec.structs.replace(spec, bounds="absolute", lo=NO_DELTA, hi=NO_DELTA)
    ranks = [int(fraction * (len(values) - 1)) for fraction in (spec.lo, spec.hi)]
    values.partition(ranks)
    lo, hi = values[ranks].tolist()
    return msgspec.structs.replace(spec, bounds="absolute", lo=lo if spec.lo else 0.0, hi=hi)


def sample(batch: int, size: int) -> tuple[I64, I64]:
    """The rows of the queries and the positions of the items whose pairs are the pool, ascending: all, up to `PAIRS` pairs."""
    rows = min(batch, max(LEAST_QUERIES, PAIRS // max(size, 1)))
    return _spread(rows, batch, 0), _spread(min(size, PAIRS // max(rows, 1)), size, 1)


def _spread(count: int, total: int, stream: int) -> I64:
    """One position of each of `count` equal parts of `total`, drawn: even steps would be in time with a period of the data's order."""
    parts = np.arange(count)
    edges = np.arange(count + 1) * total // max(count, 1)
    widths = edges[1:] - edges[:-1]
    drawn: I64 = edges[:-1] + (uniform(0, np.asarray(stream), parts) * widths).astype(np.int64)
    return drawn


def _scores(pool: Pool, queries: F32, positions: I64) -> Iterator[tuple[slice, F32]]:
    """(columns, scores (b, n)) of the items at `positions`, a chunk of them at a time."""
    wide = pool.tokens * max(len(queries), queries.shape[1])
    step = max(1, _CHUNK_VALUES // max(wide, 1))
    for start in range(0, len(positions), step):
        columns = slice(start, start + step)
        yield columns, max_sim(queries, pool.items(positions[columns]))


def _anchors(pool: Pool, rows: I64, queries: F32, places: I64, hidden: tuple[I64, I64]) -> tuple[F32, I64]:
    """(b,) what Δ starts from, NaN for nothing, and the item of each that is the anchor itself, -1 for none."""
    anchors, ids = np.full(len(rows), np.nan, np.float32), np.full(len(rows), -1, np.int64)
    if pool.anchor_scores is not None:
        return pool.anchor_scores[rows], ids
    ids = _best(pool, rows, queries, places, hidden) if pool.anchor_ids is None else pool.anchor_ids[rows]
    (known,) = np.nonzero(ids >= 0)
    distinct, at = np.unique(ids[known], return_inverse=True)
    items = pool.items(distinct).astype(np.float32, copy=False)
    step = max(1, _CHUNK_VALUES // max(1, pool.tokens * queries.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(known), step):
            some = slice(start, start + step)
            anchors[known[some]] = np.einsum("bd,bmd->bm", queries[known[some]], items[at[some]]).max(axis=1)
    return anchors, ids


def _best(pool: Pool, rows: I64, queries: F32, places: I64, hidden: tuple[I64, I64]) -> I64:
    """(b,) the best candidate of all items at `places`, -1 where there is none."""
    best, ids = np.full(len(queries), np.nan, np.float32), np.full(len(queries), -1, np.int64)
    every_query = np.arange(len(queries))
    for columns, scores in _scores(pool, queries, places):
        _hide(scores, places[columns], *hidden)
        _hide_others(scores, places[columns], pool, rows)
        first = np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)
        found = scores[every_query, first]
        better = ~np.isnan(found) & ~(found <= best)
        best[better], ids[better] = found[better], places[columns.start + first[better]]
    return ids


def _excluded_of(pool: Pool, rows: I64) -> tuple[I64, I64]:
    """(E,) the index into `rows` and the id of every exclusion of these queries."""
    counts = np.diff(pool.offsets)[rows]
    before = np.cumsum(counts) - counts
    entries = np.repeat(pool.offsets[rows] - before, counts) + np.arange(counts.sum())
    return np.repeat(np.arange(len(rows)), counts), pool.excluded[entries]


def _hide(scores: F32, positions: I64, rows: I64, ids: I64) -> None:
    """Make the score of each (row, id) NaN, where `positions`, those of the columns, have the id."""
    if not len(positions):
        return
    columns = np.minimum(np.searchsorted(positions, ids), len(positions) - 1)
    there = positions[columns] == ids
    scores[rows[there], columns[there]] = np.nan


def _hide_others(scores: F32, positions: I64, pool: Pool, rows: I64) -> None:
    """Make the scores of what the queries in `rows` may not return NaN, where they differ in that."""
    if pool.allowed is not None and len(pool.allowed) > 1:
        words = pool.allowed[np.ix_(rows, positions // WORD)]  # (b, n)
        scores[(words >> (positions % WORD).astype(np.uint64)) & np.uint64(1) == 0] = np.nan
