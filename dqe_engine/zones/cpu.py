"""Zone selection on the CPU: one sweep of the compiled kernels over the gallery for each block of queries (cpp_ext/sweep.hpp).

Where a zone's bounds depend on the scores (an own-best anchor, ranks), the sweep keeps each query's candidates of interest
until the bounds are known. A query with more of them than there is room for is swept a second time, with its bounds given; and
one whose thresholds were guessed too high from a sample, without the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.processors import available_cpus

from .arrays import F32, I64
from .lists import TokenLists
from .prefix import Prefix
from .request import ZoneRequest, ZoneSelection

BLOCK_QUERIES = 4096
KEPT_BYTES = 256 << 20
"""What the kernels may hold of all queries of a block on all threads; blocks are made smaller to fit."""
LEAST_FIELD = 1024
"""Candidates of interest per query, at least, while its zone is not known."""
SAMPLE = 4096
"""Items to guess thresholds from before the rest is swept; at most an eighth of them all."""
ESTIMATED_SAMPLE = 16_384
"""The same where many queries are screened: there the sample costs bounds alone."""
RESCORE_COST = 10_000
"""Multiply-adds that cost about as much as scoring one item again, in panels: zones that need too many are found without the screen."""
SHORT_RESCORE_COST = {"avx2": 150}
"""The same, times D (64 at least), with sums of 16 bits. Their bounds are coarser, and the more so the longer vectors are."""

SWEPT_ROW_COST = 0.06
"""Nanoseconds for a byte of codes that is swept for a few queries, by all threads. As the next three it comes from two processors of an AMD
EPYC (`python -m benchmarks.lists`), and decides nothing but time."""
SWEPT_PANEL_COST = 0.007
"""Nanoseconds of one thread for a product of two codes, of queries in panels."""
VISIT_COST = 20.0
"""Nanoseconds for a token of a list whose codes a query looks at, and"""
VISIT_BYTE_COST = 0.15
"""for each of its codes."""
LEAST_PANEL_TOKENS = 1 << 22
"""Fewer tokens are swept faster by queries in panels than by lists: one query that lists do not help costs its batch a sweep."""

_STATE_BYTES = 384
"""Of a query on a thread beside what it keeps; QueryState of cpp_ext/query_state.hpp and a threshold, rounded up."""
_POLICIES = {"hardest": 0, "uniform": 1, "softmax": 2}
_NO_ZONES = ZoneSpec(lo=0, hi=0)


class Zoning(IntEnum):
    """How zones are found (cpp_ext/sweep.hpp)."""

    NONE = 0
    GIVEN = 1
    FROM_BEST = 2
    RANK = 3


class Status(IntEnum):
    """What became of a query (cpp_ext/sweep.hpp)."""

    COMPLETE = 0
    OUTGROWN = 1
    MISJUDGED = 2
    SCATTERED = 3


@dataclass(slots=True, eq=False)  # not frozen: that takes a microsecond of each search
class _Rows:
    """The result's arrays; a block of queries works on a view of its rows."""

    scores: F32  # (B, k)
    ids: I64
    anchor: F32  # (B,)
    lo: F32
    hi: F32
    counts: I64  # (B, 3)
    pick_keys: NDArray[np.float64]  # (B, P)
    picks: I64
    pick_scores: F32
    status: NDArray[np.int8]  # (B,)

    @classmethod
    def empty(cls, batch: int, k: int, picks: int, *, zoned: bool = True) -> _Rows:
        """The kernels write the scores and ids of every query, and the others only where zones are asked for."""
        anchor, lo, hi, counts, keys, ids, scores = _unzoned_of_one() if batch == 1 and not zoned else _zoned(batch, picks)
        top = np.empty((batch, k), np.float32), np.empty((batch, k), np.int64)
        return cls(*top, anchor, lo, hi, counts, keys, ids, scores, np.zeros(batch, np.int8))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in self.__slots__}

    def rows(self, start: int, stop: int) -> _Rows:
        return _Rows(*(array[start:stop] for array in self.arrays().values()))

    def take(self, rows: I64) -> _Rows:
        return _Rows(*(array[rows] for array in self.arrays().values()))

    def put(self, rows: I64, part: _Rows) -> None:
        for name, array in self.arrays().items():
            array[rows] = getattr(part, name)


def _zoned(batch: int, picks: int) -> tuple[F32, F32, F32, I64, NDArray[np.float64], I64, F32]:
    """What lies between `ids` and `status`."""
    anchor, lo, hi = (np.full(batch, np.nan, np.float32) for _ in range(3))
    keys, scores = np.full((batch, picks), -np.inf), np.full((batch, picks), -np.inf, np.float32)
    return anchor, lo, hi, np.zeros((batch, 3), np.int64), keys, np.full((batch, picks), -1, np.int64), scores


@cache
def _unzoned_of_one() -> tuple[F32, F32, F32, I64, NDArray[np.float64], I64, F32]:
    """The same, never written: for a single query, which takes little time, once and for all."""
    return _zoned(1, 0)


def select(
    request: ZoneRequest,
    *,
    threads: int = 0,
    block_queries: int = BLOCK_QUERIES,
    kept_bytes: int = KEPT_BYTES,
    least_field: int = LEAST_FIELD,
    sample: int | None = None,
    rescore_cost: int | None = None,
    instruction_set: str = "",
    list_limit: int | None = None,
) -> ZoneSelection:
    """Select with bounded memory; see `select_zones` for the contract.

    list_limit: tokens that a query may visit by lists before it is swept; 0: none, no lists; None: as many as save time.
    rescore_cost: that of an item in multiply-adds, by which it is judged whether a screen pays; None: as measured.
    `threads`, the sizes, the limit and the cost change nothing in the result. `instruction_set` ("": the best; `_kernels.instruction_sets`
    has the list) can change a score's last bit, through the order in which products are added.
    """
    threads = threads or available_cpus()
    instruction_set = instruction_set or _best_instruction_set()
    by_rows = request.batch <= _kernels.MAX_ROW_QUERIES
    candidates = request.candidates
    field = _field(request, candidates, least_field)
    screened = request.screen is not None and request.batch <= _screened_queries(instruction_set)
    if not by_rows:
        share = candidates / max(request.size, 1)
        room = field // 2 if _zoning(request) is Zoning.FROM_BEST else field  # seldom filled: what will be kept is not known
        kept = room + min(request.k, candidates)
        screened = screened and screening_pays(
            kept, request.shards, share=share, rescore_cost=rescore_cost, instruction_set=instruction_set
        )
    lists = _lists(request, candidates, gainful=list_limit is None) if screened and list_limit != 0 else None
    prefix = _prefix(request) if screened and by_rows else None
    if sample is None:
        sample = ESTIMATED_SAMPLE if screened and not by_rows else SAMPLE
    sweeper = _Sweeper(
        request, candidates, field, min(sample, candidates // 8), by_rows, screened, threads, instruction_set, lists, list_limit, prefix
    )
    step = max(1, min(block_queries, kept_bytes // sweeper.bytes_per_query(threads if sweeper.sample else 1)))
    out = _Rows.empty(request.batch, request.k, request.picks, zoned=request.zones is not None)
    rescored = 0
    for start in range(0, request.batch, step):
        stop = min(start + step, request.batch)
        part = out if stop - start == request.batch else out.rows(start, stop)
        rescored += sweeper.sweep(np.arange(start, stop), part, kept_bytes)
    zones = request.zones
    return ZoneSelection(
        scores=out.scores,
        ids=out.ids,
        counts=out.counts if request.counts else None,
        picks=out.picks if request.picks else None,
        pick_scores=out.pick_scores if request.picks else None,
        lo=out.lo if zones else None,
        hi=out.hi if zones else None,
        anchor_scores=out.anchor if zones else None,
        backend="cpu",
        rescored=rescored if screened else None,
    )


_best_instruction_set = cache(lambda: _kernels.instruction_sets()[0])
_screened_queries = cache(_kernels.screened_queries)


def screening_pays(
    kept: int, shards: Sequence[NDArray[Any]], *, share: float = 1.0, rescore_cost: int | None = None, instruction_set: str = ""
) -> bool:
    """Whether panels of queries that keep so many candidates each, of a `share` of these (n, M, D) shards, are found faster screened.

    `rescore_cost`: None: what was measured with this instruction set ("": the best).
    """
    if rescore_cost is None:
        short = SHORT_RESCORE_COST.get(instruction_set or _best_instruction_set())
        rescore_cost = short * max(shards[0].shape[2], 64) if short else RESCORE_COST
    return kept * rescore_cost <= share * sum(shard.size for shard in shards)


def _lists(request: ZoneRequest, candidates: int, *, gainful: bool) -> TokenLists | None:
    """The screen's lists where the request can use them; `gainful`: only where they may also save time."""
    lists = None if request.screen is None else request.screen.lists
    if lists is None or lists.covered > request.size or (request.zones is not None and request.zones.bounds == "rank"):
        return None
    if request.size * request.shards[0].shape[1] >= 1 << 32:  # tokens are counted in 32 bits
        return None
    if not gainful:
        return lists
    whole = 2 * lists.covered >= request.size and 2 * candidates >= request.size
    enough = request.batch <= _kernels.MAX_ROW_QUERIES or len(lists.rows) >= LEAST_PANEL_TOKENS
    return lists if whole and enough and request.k <= candidates // 64 else None


def _prefix(request: ZoneRequest) -> Prefix | None:
    """The screen's prefixes where they are of this request's items and their tokens are counted in 32 bits."""
    prefix = None if request.screen is None else request.screen.prefix
    fits = prefix is not None and prefix.covered <= request.size and request.size * request.shards[0].shape[1] < 1 << 32
    return prefix if fits else None


def _expected_s(request: ZoneRequest, by_rows: bool) -> float:
    """Seconds that a sweep is guessed to take, four times off or less."""
    _, tokens, width = request.shards[0].shape
    cost = SWEPT_ROW_COST * (width + 12) if by_rows else SWEPT_PANEL_COST * width * request.batch
    if by_rows and request.screen is not None and request.screen.prefix is not None:
        cost *= request.screen.prefix.cost
    return float(1e-9 * request.size * tokens * cost)


def most_listed(request: ZoneRequest, by_rows: bool) -> int:
    """Tokens that a query may visit by lists before sweeping all of them, with the others of its batch, takes less time."""
    swept_s = _expected_s(request, by_rows) / (1 if by_rows else request.batch)
    return max(1, int(1e9 * swept_s / (VISIT_COST + VISIT_BYTE_COST * request.shards[0].shape[2])))


def rank_field(hi: float, size: int) -> int:
    """Candidates to keep per query: those up to the rank that `hi` is at among `size`, and some with equal Δ."""
    ranked = int(hi * max(size - 1, 0)) + 1
    return ranked + max(16, ranked // 16)


def _zoning(request: ZoneRequest) -> Zoning:
    if request.zones is None:
        return Zoning.NONE
    if request.zones.bounds == "rank":
        return Zoning.RANK
    own_best = request.anchor_ids is None and request.anchor_scores is None
    return Zoning.FROM_BEST if own_best else Zoning.GIVEN


def _field(request: ZoneRequest, candidates: int, least: int) -> int:
    """Candidates of interest to keep per query: those that decide a rank and some with equal Δ, or a guess."""
    if request.zones is None:
        return 0
    match _zoning(request):
        case Zoning.FROM_BEST:
            return max(least, candidates // 32)
        case Zoning.RANK:
            return rank_field(request.zones.hi, candidates)
        case _:
            return 0


@dataclass(slots=True, eq=False)
class _Sweeper:
    request: ZoneRequest
    candidates: int
    field: int
    sample: int
    by_rows: bool
    screened: bool
    threads: int
    instruction_set: str
    lists: TokenLists | None
    list_limit: int | None
    prefix: Prefix | None

    def bytes_per_query(self, field_threads: int) -> int:
        """On all threads, of which the field is shared out among `field_threads`; half as much again as is kept (cpp_ext/reservoir.hpp)."""
        size = self.candidates
        top, picks, field = min(self.request.k, size), min(self.request.picks, size), min(self.field, size)
        if field_threads > 1:
            field = min(field, 3 * field // (2 * field_threads) + 64)
        kept = top + field
        return self.threads * (8 * (kept + kept // 2 + 32) + 20 * picks + _STATE_BYTES)

    def sweep(self, rows: I64, out: _Rows, kept_bytes: int) -> int:
        """Select for the queries in `rows` (ascending) of the request; returns how many pairs were scored again."""
        request, zones, zoning = self.request, self.request.zones, _zoning(self.request)
        if request.anchor_scores is not None:
            out.anchor[:] = request.anchor_scores[rows]
        if zones is not None and zoning is Zoning.GIVEN:
            out.lo[:], out.hi[:] = zones.lo, zones.hi
        rescored = self._by_lists(rows, out, zoning)
        if rescored is None:
            rescored = self._call(rows, out, zoning, request.anchor_ids, self.sample)
        if not np.count_nonzero(out.status):
            return rescored
        (again,) = np.nonzero(out.status == Status.MISJUDGED)
        step = max(1, kept_bytes // self.bytes_per_query(1))  # without a sample, each thread may have to hold the whole field
        for some in (again[at : at + step] for at in range(0, len(again), step)):
            part = out.take(some)
            rescored += self._call(rows[some], part, zoning, request.anchor_ids, 0)
            out.put(some, part)
        (again,) = np.nonzero(out.status == Status.OUTGROWN)
        if len(again):  # anchors and bounds are known by now
            part = out.take(again)
            rescored += self._call(rows[again], part, Zoning.GIVEN, None, 0)
            out.put(again, part)
        assert not out.status.any()
        return rescored

    def _by_lists(self, rows: I64, out: _Rows, zoning: Zoning) -> int | None:
        """By lists first, and without them for the queries that they leave too much; None where nothing was done."""
        if self.lists is None:
            return None
        begun, tally = perf_counter(), self.lists.tally_of(len(rows))
        if self.list_limit is None and not self.lists.always and not tally.lists_pay(_expected_s(self.request, self.by_rows)):
            rescored = self._call(rows, out, zoning, self.request.anchor_ids, self.sample)
            tally.note_sweep(perf_counter() - begun)
            return rescored
        most = self.list_limit or most_listed(self.request, self.by_rows)
        rescored = self._call(rows, out, zoning, self.request.anchor_ids, 0, most)
        again = np.flatnonzero(out.status == Status.SCATTERED) if np.count_nonzero(out.status) else rows[:0]
        if len(again):
            part, listed = out.take(again), perf_counter()
            rescored += self._call(rows[again], part, zoning, self.request.anchor_ids, self.sample)
            out.put(again, part)
            tally.note_sweep(perf_counter() - listed)
        tally.note(perf_counter() - begun, scattered=len(again) > 0)
        return rescored

    def _call(self, rows: I64, out: _Rows, zoning: Zoning, anchor_ids: I64 | None, sample: int, most: int = 0) -> int:
        """`most`: with lists, and so many of their tokens at most."""
        request, lists = self.request, self.lists if most else None
        prefix = self.prefix if lists is None else lists.prefix
        zones = request.zones or _NO_ZONES
        first, last = int(rows[0]), int(rows[-1]) + 1
        some: slice | I64
        if len(rows) == last - first:
            queries, offsets, some = request.queries[first:last], request.offsets[first : last + 1], slice(first, last)
            begin = int(offsets[0])
            excluded, offsets = request.excluded[begin : offsets[-1]], offsets - begin if begin else offsets
        else:
            queries, offsets = request.queries[rows], np.concatenate(([0], np.cumsum(np.diff(request.offsets)[rows])))
            excluded = np.concatenate([request.excluded[request.offsets[b] : request.offsets[b + 1]] for b in rows.tolist()])
            some = rows
        return _kernels.sweep(
            queries,
            list(request.shards),
            request.screen.for_kernels() if (self.screened or lists) and request.screen is not None else None,
            offsets,
            excluded,
            request.allowed if request.allowed is None or len(request.allowed) == 1 else request.allowed[some],
            query_rows=rows + request.first_query,
            zoning=zoning,
            anchor_is_best=request.anchor_ids is None and request.anchor_scores is None,
            anchor_ids=None if anchor_ids is None else anchor_ids[rows],
            lo_of_all=zones.lo,
            hi_of_all=zones.hi,
            policy=_POLICIES[zones.policy],
            temperature=zones.temperature,
            seed=zones.seed,
            sample=sample,
            field=self.field,
            by_rows=self.by_rows or lists is not None,
            threads=self.threads,
            instruction_set=self.instruction_set,
            lists=None if lists is None else lists.for_kernels(),
            most_listed=most,
            prefix=None if prefix is None else prefix.for_kernels(),
            **out.arrays(),
        )
