"""Whether an answer is right: held against float64 scores of the vectors as the contender stores them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones.arrays import F32, I64

from ..harness import Agreement
from .vectors import Storage

ATOL = 5e-6
"""Of unit vectors' float32 inner products, whatever the order of the additions: seven times what was seen at D = 256."""
_TRUTH_VALUES = 1 << 23
_BLOCK_ITEMS = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class ZoneAnswer:
    """What was asked of the zones, and what came back."""

    lo: F32  # (B,)
    hi: F32
    anchors: F32
    counts: I64  # (B, 3)
    picks: I64  # (B, P), padded with -1


@dataclass(frozen=True, slots=True, eq=False)
class SearchAnswer:
    """Top-k by score descending, of queries against items stored in `stored`."""

    scores: NDArray[Any]  # (B, k)
    ids: NDArray[Any]
    stored: Storage = "float32"
    zones: ZoneAnswer | None = None
    atol: float = ATOL
    notes: dict[str, float] = field(default_factory=dict)


class SearchCheck:
    """Compares answers on evenly spaced queries, as many as keep the true scores small.

    An answer is right when each score is that of its id within `ATOL`, the list is as good as the true one rank by rank
    within `ATOL`, no id comes twice, zone counts differ by no more candidates than lie within `ATOL` of a bound, and picks
    are different members of the mid zone, as many as there are.
    """

    def __init__(self, queries: F32, items: NDArray[Any], k: int) -> None:
        count = max(1, min(len(queries), _TRUTH_VALUES // max(len(items), 1), 64))
        self.rows = np.unique(np.linspace(0, len(queries) - 1, count).astype(np.int64))
        self.queries, self.items, self.k = queries[self.rows], items, min(k, len(items))
        self._known: dict[Storage, NDArray[np.float64]] = {}

    def truth(self, stored: Storage) -> NDArray[np.float64]:
        """(b, N) scores, the maximum over tokens."""
        if stored not in self._known:
            self._known[stored] = self._true_scores(stored)
        return self._known[stored]

    def _true_scores(self, stored: Storage) -> NDArray[np.float64]:
        out = np.empty((len(self.queries), len(self.items)))
        step = max(1, _BLOCK_ITEMS * self.items.shape[0] // max(self.items[..., 0].size, 1))
        for start in range(0, len(self.items), step):
            block = self.items[start : start + step].astype(stored, copy=False).astype(np.float64)
            dots = self.queries.astype(np.float64) @ block.reshape(-1, block.shape[-1]).T
            out[:, start : start + step] = dots.reshape(len(self.queries), len(block), -1).max(axis=2)
        return out

    def __call__(self, answer: SearchAnswer) -> Agreement:
        truth = self.truth(answer.stored)
        scores, ids = np.asarray(answer.scores)[self.rows], np.asarray(answer.ids).astype(np.int64)[self.rows]
        if scores.shape != (len(truth), self.k) or ids.shape != scores.shape:
            return Agreement(False, np.inf, 0.0, f"shape {scores.shape} of the checked scores, expected {(len(truth), self.k)}")
        if ids.min() < 0 or ids.max() >= truth.shape[1] or any(len(set(row)) < self.k for row in ids.tolist()):
            return Agreement(False, np.inf, 0.0, "ids outside the gallery or twice in a list")
        best = np.argpartition(truth, -self.k, axis=1)[:, -self.k :]
        expected = -np.sort(-np.take_along_axis(truth, best, axis=1), axis=1)
        error = float(np.abs(scores - np.take_along_axis(truth, ids, axis=1)).max())
        rank_error = float(np.abs(scores - expected).max())
        same = float(np.mean([len(set(a) & set(b)) / self.k for a, b in zip(ids.tolist(), best.tolist(), strict=True)]))
        detail = (
            "" if max(error, rank_error) <= answer.atol else f"score error {error:.2g}, by rank {rank_error:.2g}, above {answer.atol:g}"
        )
        notes = dict(answer.notes)
        if answer.zones is not None and not detail:
            detail = self._zone_error(answer.zones, truth)
            notes["mid_share"] = float(answer.zones.counts[:, 1].mean() / truth.shape[1])
        return Agreement(not detail, max(error, rank_error), same, detail, notes)

    def _zone_error(self, zones: ZoneAnswer, truth: NDArray[np.float64]) -> str:
        for place, row in enumerate(self.rows):
            delta = float(zones.anchors[row]) - truth[place]
            lo, hi = float(zones.lo[row]), float(zones.hi[row])
            true = np.array([(delta < lo).sum(), ((delta >= lo) & (delta <= hi)).sum(), (delta > hi).sum()])
            doubtful = int(((np.abs(delta - lo) <= ATOL) | (np.abs(delta - hi) <= ATOL)).sum())
            if np.abs(zones.counts[row] - true).max() > doubtful:
                return f"query {row}: zone counts {zones.counts[row].tolist()}, expected {true.tolist()} (± {doubtful})"
            picks = zones.picks[row][zones.picks[row] >= 0]
            if len(picks) != min(zones.picks.shape[1], int(zones.counts[row][1])) or len(set(picks.tolist())) < len(picks):
                return f"query {row}: {len(picks)} picks, or one twice, of a mid zone of {zones.counts[row][1]}"
            if len(picks) and ((delta[picks] < lo - ATOL) | (delta[picks] > hi + ATOL)).any():
                return f"query {row}: a pick outside the mid zone"
        return ""
