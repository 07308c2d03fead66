"""The timed search of a gallery: every method at each of its settings, in turns, held against float64 MaxSim before the clock runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from dqe_engine.tuning.contenders import Found
from dqe_engine.zones.arrays import F32, I64

from ..harness import Agreement, Contender
from .galleries import Gallery
from .methods import Point

ATOL = 5e-6
"""Of unit vectors' float32 inner products at these widths, whatever the order of the additions."""
_CHECKED = 4
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class GalleryCase:
    """Batches of `batch` queries, one after the other through the query set. `points`: by name."""

    label: str
    gallery: Gallery
    queries: F32  # (Q, D)
    references: I64  # (Q,) positions, left out of the answers; -1: none
    points: dict[str, Point]
    batch: int
    k: int
    _truths: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        g = self.gallery
        return {"items": g.count, "tokens": g.tokens, "width": g.width, "batch": self.batch, "k": self.k, "queries": len(self.queries)}

    def small(self) -> GalleryCase:
        return self

    def inputs(self) -> GalleryCase:
        return self

    def contenders(self) -> Sequence[Contender]:
        return [Contender(name, partial(_prepare, point), partial(_Answer, point)) for name, point in self.points.items()]

    def checker(self, inputs: GalleryCase) -> Callable[[_Answer], Agreement]:
        return self.check

    def check(self, answer: _Answer) -> Agreement:
        """Positions are other items than the reference, each once; scores that claim to be MaxSim's are; an exact list is the best."""
        scores, found = answer.found
        rows = min(_CHECKED, self.batch)
        truth = self._truth(answer.point.stored)[:rows]
        error, same = 0.0, []
        for row in range(rows):
            got, mine = found[row][found[row] >= 0], scores[row][found[row] >= 0]
            if len(set(got.tolist())) < len(got) or self.references[row] in got or got.max(initial=-1) >= self.gallery.count:
                return Agreement(False, np.inf, 0.0, f"query {row}: an item twice, the reference, or a position outside the gallery")
            best = np.argsort(-truth[row], kind="stable")[: self.k]
            best = best[np.isfinite(truth[row][best])]
            same.append(len(set(got.tolist()) & set(best.tolist())) / len(best))
            if answer.point.scores == "exact" and len(got):
                error = max(error, float(np.abs(mine - truth[row][got]).max()))
            if answer.point.exact:
                if len(got) < len(best):
                    return Agreement(False, np.inf, same[-1], f"query {row}: {len(got)} items of {len(best)}")
                error = max(error, float(np.abs(mine - truth[row][best]).max()))
        detail = "" if error <= ATOL else f"score error {error:.2g}, above {ATOL:g}"
        return Agreement(not detail, error, float(np.mean(same)), detail)

    def _truth(self, stored: str) -> Any:
        """(rows, N) float64 MaxSim of the first batch's first queries over the items as stored; -inf for the reference."""
        if stored not in self._truths:
            rows = min(_CHECKED, self.batch)
            queries = self.queries[:rows].astype(np.float64)
            out = np.empty((rows, self.gallery.count))
            for start in range(0, self.gallery.count, _BLOCK):
                block = self.gallery.items[start : start + _BLOCK].astype(stored, copy=False).astype(np.float64)
                dots = queries @ block.reshape(-1, block.shape[-1]).T
                out[:, start : start + _BLOCK] = dots.reshape(rows, len(block), -1).max(axis=2)
            (out_of,) = np.nonzero(self.references[:rows] >= 0)
            out[out_of, self.references[out_of]] = -np.inf
            self._truths[stored] = out
        return self._truths[stored]


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    point: Point
    found: Found


def _prepare(point: Point, case: GalleryCase) -> Callable[[], Found]:
    """The first call searches the first batch, which is the one that is checked."""
    starts = range(0, len(case.queries) - case.batch + 1, case.batch)
    numbers = count()

    def run() -> Found:
        start = starts[next(numbers) % len(starts)]
        rows = slice(start, start + case.batch)
        return point.search(case.queries[rows], case.references[rows], case.k)

    return run
