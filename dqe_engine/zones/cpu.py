"""Zone selection on the CPU: BLAS scores a tile of queries x items, the compiled kernels select from it as it streams by.

Blocks of queries are independent. A block whose bounds or anchors depend on the scores needs them before it can select: its
rows are kept where they fit `KEPT_BYTES`, and else scored a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec

from .request import F32, I64, ZoneRequest, ZoneSelection

BLOCK_QUERIES = 1024
SMALLEST_KEPT_BLOCK = 64
"""Blocks of fewer queries waste more of BLAS's speed than scoring twice would."""
TILE_DOTS = 8 << 20
"""Queries x items x tokens per tile: 32 MiB of dot products."""
TILE_TOKENS = 1 << 17
"""Items x tokens per tile at most, however few the queries: a float16 tile is converted."""
TRANSPOSE_FROM = 32
"""Queries from which on it pays to copy a tile token by token (see `_max_sim`)."""
KEPT_BYTES = 256 << 20

_POLICIES = {"hardest": 0, "uniform": 1, "softmax": 2}

Tile = tuple[int, F32]
"""Position of the first item, and scores (b, n) with NaN for excluded candidates."""


@dataclass(frozen=True, slots=True, eq=False)
class _Buffers:
    """The result's arrays, in the state before the first tile; a block of queries works on a view of its rows."""

    scores: F32  # (B, k)
    ids: I64
    counts: I64  # (B, 3)
    pick_keys: NDArray[np.float64]  # (B, P)
    picks: I64
    pick_scores: F32
    anchor: F32  # (B,)
    lo: F32
    hi: F32

    @classmethod
    def empty(cls, batch: int, k: int, picks: int) -> _Buffers:
        return cls(
            scores=np.full((batch, k), -np.inf, np.float32),
            ids=np.full((batch, k), -1, np.int64),
            counts=np.zeros((batch, 3), np.int64),
            pick_keys=np.full((batch, picks), -np.inf),
            picks=np.full((batch, picks), -1, np.int64),
            pick_scores=np.full((batch, picks), -np.inf, np.float32),
            anchor=np.full(batch, np.nan, np.float32),
            lo=np.full(batch, np.nan, np.float32),
            hi=np.full(batch, np.nan, np.float32),
        )

    def rows(self, start: int, stop: int) -> _Buffers:
        return _Buffers(*(getattr(self, name)[start:stop] for name in self.__slots__))


def select(
    request: ZoneRequest, *, threads: int = 0, block_queries: int = BLOCK_QUERIES, tile_dots: int = TILE_DOTS, kept_bytes: int = KEPT_BYTES
) -> ZoneSelection:
    """Select with bounded memory; see `select_zones` for the contract.

    `threads`: of the selection kernels, 0 for one per processor; BLAS has its own. Neither it nor the three sizes change
    what is selected from given scores (they can change a score's last bit, through the order in which BLAS adds).
    """
    zones = request.zones
    depends = zones is not None and (request.anchor_scores is None or zones.bounds == "quantile")
    capacity = _ranking_capacity(request)
    row_bytes = 4 * max(len(request.items), 1)
    step = min(block_queries, kept_bytes // (8 * capacity))  # the ranking holds 2 * capacity float32 per query
    if depends and kept_bytes // row_bytes >= SMALLEST_KEPT_BLOCK:
        step = min(step, kept_bytes // row_bytes)
    step = max(step, 1)
    out = _Buffers.empty(request.batch, request.k, request.picks)
    for start in range(0, request.batch, step):
        stop = min(start + step, request.batch)
        block = _Block(request, start, stop, out.rows(start, stop), tile_dots, threads)
        kept = list(block.tiles()) if depends and (stop - start) * row_bytes <= kept_bytes else None
        if zones is not None:
            block.resolve(zones, (kept or block.tiles()) if depends else (), capacity)
        block.select(kept or block.tiles())
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
    )


def _ranking_capacity(request: ZoneRequest) -> int:
    """How many best scores decide the anchor and the bounds: one more than the largest rank that can be asked for."""
    largest = request.zones.hi if request.zones and request.zones.bounds == "quantile" else 0.0
    return 1 + math.floor(largest * max(len(request.items) - 1, 0))


def _max_sim(queries: F32, tile: NDArray[Any]) -> F32:
    """(b, D) and (n, M, D) to (b, n) float32; NaN in any token makes the score NaN.

    A maximum over M neighbours is slow. Many queries: order the tile token by token, then the maximum runs over whole rows.
    Few queries: the copy would cost more than the product; fold the M strided columns.
    """
    (count, tokens, width), batch = tile.shape, len(queries)
    with np.errstate(invalid="ignore", over="ignore"):
        if batch < TRANSPOSE_FROM or tokens == 1:
            dots = (queries @ tile.astype(np.float32, copy=False).reshape(-1, width).T).reshape(batch, count, tokens)
            return reduce(np.maximum, (dots[..., m] for m in range(tokens)))
        by_token = np.ascontiguousarray(tile.swapaxes(0, 1), np.float32)  # (M, n, D)
        dots = (queries @ by_token.reshape(-1, width).T).reshape(batch, tokens, count)
        scores: F32 = dots.max(axis=1)
        return scores


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The queries from `start` to `stop`, and their rows of the buffers."""

    request: ZoneRequest
    start: int
    stop: int
    rows: _Buffers
    tile_dots: int
    threads: int

    def tiles(self) -> Iterator[Tile]:
        """Score the block against all items. Anchors given by id are noted in `rows.anchor` as their tile passes."""
        queries, items = self.request.queries[self.start : self.stop], self.request.items
        size, tokens, _ = items.shape
        step = max(1, min(self.tile_dots // len(queries), TILE_TOKENS) // tokens)
        inside = slice(*np.searchsorted(self.request.excluded_rows, (self.start, self.stop)))
        excluded_rows, excluded_ids = self.request.excluded_rows[inside] - self.start, self.request.excluded_ids[inside]
        anchor_ids = None if self.request.anchor_ids is None else self.request.anchor_ids[self.start : self.stop]
        for first in range(0, size, step):
            scores = _max_sim(queries, items[first : first + step])
            if anchor_ids is not None:
                (hit,) = np.nonzero((anchor_ids >= first) & (anchor_ids < first + step))
                self.rows.anchor[hit] = scores[hit, anchor_ids[hit] - first]
            hidden = (excluded_ids >= first) & (excluded_ids < first + step)
            scores[excluded_rows[hidden], excluded_ids[hidden] - first] = np.nan
            yield first, scores

    def resolve(self, zones: ZoneSpec, tiles: Iterable[Tile], capacity: int) -> None:
        """Set the rows' anchors and absolute bounds; `tiles` may be empty where neither depends on the scores."""
        rows, batch = self.rows, self.stop - self.start
        ranking = (
            np.empty((batch, 2 * capacity), np.float32),
            np.zeros(batch, np.int64),
            np.full(batch, -np.inf, np.float32),
            np.zeros(batch, np.int64),
        )
        for _, scores in tiles:
            _kernels.update_ranking(scores, *ranking, self.threads)
        if self.request.anchor_scores is not None:
            rows.anchor[:] = self.request.anchor_scores[self.start : self.stop]
        elif self.request.anchor_ids is None:
            _kernels.score_at_rank(*ranking, 0.0, rows.anchor, self.threads)
        for bound, wanted in ((rows.lo, zones.lo), (rows.hi, zones.hi)):
            if zones.bounds == "absolute":
                bound[:] = wanted
                continue
            _kernels.score_at_rank(*ranking, wanted, bound, self.threads)
            with np.errstate(invalid="ignore"):
                np.subtract(rows.anchor, bound, out=bound)

    def select(self, tiles: Iterable[Tile]) -> None:
        """Stream the tiles through the top-k and the zones into the block's rows."""
        rows, zones = self.rows, self.request.zones
        for first, scores in tiles:
            if self.request.k:
                _kernels.update_top_k(scores, first, rows.scores, rows.ids, self.threads)
            if zones is not None:
                bounds = (rows.anchor, rows.lo, rows.hi, _POLICIES[zones.policy], zones.temperature, zones.seed)
                picks = (rows.counts, rows.pick_keys, rows.picks, rows.pick_scores)
                _kernels.update_zones(scores, first, self.request.first_query + self.start, *bounds, *picks, self.threads)
        _kernels.sort_top_k(rows.scores, rows.ids, self.threads)
        _kernels.sort_picks(rows.pick_keys, rows.picks, rows.pick_scores, self.threads)
