"""Lists that stop early: most of the k best for less time, with a recall that was measured on queries of the caller's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

from .arrays import F32
from .lists import LEAST_TOKENS
from .screen import Screen
from .select import select_zones

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the angle of each list's cap, the cheapest first."""
LEAST_QUERIES = 100
_ERRORS = 2.0  # standard errors that the promise is below the measured mean


def stopping_early(
    screen: Screen, items: NDArray[Any] | Sequence[NDArray[Any]], queries: F32, *, recall: float, k: int, threads: int = 0
) -> tuple[Screen, float]:
    """A screen with which `select_zones` finds a share of at least `recall` of the k best on average, and the share that was measured.

    A query skips a list if no token within a share of the list's widest angle can matter. With the whole angle that is certain, with less
    it is likely. The least share is taken whose mean recall over `queries` shows that of all such queries to be `recall` or more
    (`shown`). So the promise holds for queries like these, for this k and these items, one query at a time; queries of another kind may
    lose more. Scores are exact, of whatever is found. A query that is swept in full, because lists have ruled out too little, finds
    everything; while recall is measured, no query is swept because others before it were. The given screen and a recall of 1 come back
    where no share is enough.

    items: as `Screen.build` took them. queries: (B, D), at least 100. recall: above 0 and below 1.
    Raises InputError for other numbers, for a recall that so few queries cannot show, and for a screen without lists.
    """
    if not 0.0 < recall < 1.0:
        raise InputError(f"recall={recall}: expected a number between 0 and 1; without `stopping_early` a search is exact")
    if screen.lists is None:
        raise InputError(
            f'screen: it has no lists; Screen.build(items, lists="always") makes them from {LEAST_TOKENS:,} tokens on; or search exactly'
        )
    if len(queries) < LEAST_QUERIES:
        raise InputError(f"queries: {len(queries)}, at least {LEAST_QUERIES} are needed to measure a recall")
    if (most := shown(1.0, len(queries))) < recall:
        needed = math.ceil(_ERRORS**2 * recall / (1.0 - recall))
        raise InputError(
            f"recall={recall}: {len(queries)} queries can prove a recall of {most:.4f} at most; pass at least {needed:,} queries"
        )

    def alone(by: Screen) -> F32:
        """Scores (B, k) of each query asked alone: a batch is swept where that is faster, finds everything, and adds in another order."""
        return np.concatenate([select_zones(query[None], items, k=k, screen=by, threads=threads).scores for query in queries])

    exact = alone(screen)
    for share in SHARES:
        found = alone(Screen(screen.shards, screen.lists.shrunk(share, always=True), screen.prefix))
        measured = _recall(found, exact)
        if shown(measured, len(queries)) >= recall:
            return Screen(screen.shards, screen.lists.shrunk(share), screen.prefix), measured
    return screen, 1.0


def _recall(found: F32, exact: F32) -> float:
    """Share of the exact scores (B, k) that were found; of those equal to the lowest, any counts, but no more than there are."""
    lowest = exact[:, -1:]
    equal = np.minimum((found == lowest).sum(axis=1), (exact == lowest).sum(axis=1))
    return float(((found > lowest).sum(axis=1) + equal).mean() / exact.shape[1])


def shown(measured: float, queries: int) -> float:
    """The mean recall of all queries that a mean over some of them shows: Wilson's lower bound, two standard errors below.

    Each query counts once, whatever its k: its answers are lost together. Its share lies between 0 and 1, so it varies no more than a
    coin of the same mean, which this bound is for. Where all is found, it is n / (n + 4) and not 1: what 100 queries do not show may
    befall one in 26.
    """
    square = _ERRORS**2 / queries
    error = math.sqrt(measured * (1.0 - measured) * square + square**2 / 4)
    return (measured + square / 2 - error) / (1.0 + square)
