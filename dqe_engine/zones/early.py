"""Lists that stop early: most of the k best for less time, with a recall that was measured on queries of the caller's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

from .arrays import F32
from .screen import Screen
from .select import select_zones

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the angle of each list's cap, the cheapest first."""
LEAST_QUERIES = 100
_ERRORS = 2.0  # standard errors that the measured mean must be above what is asked


def stopping_early(
    screen: Screen, items: NDArray[Any] | Sequence[NDArray[Any]], queries: F32, *, recall: float, k: int, threads: int = 0
) -> tuple[Screen, float]:
    """A screen with which `select_zones` finds a share of at least `recall` of the k best on average, and the share that was measured.

    A query skips a list if no token within a share of the list's widest angle can matter. With the whole angle that is certain, with less
    it is likely. The least share is taken whose mean recall over `queries` is two standard errors above `recall`. So the promise holds
    for queries like these, for this k and these items, one query at a time; queries of another kind may lose more. Scores are exact,
    of whatever is found. The given screen and a recall of 1 come back where no share is enough.

    items: as `Screen.build` took them. queries: (B, D), at least 100. recall: above 0 and below 1.
    Raises InputError for other numbers, and for a screen without lists, which has nothing to stop.
    """
    if not 0.0 < recall < 1.0:
        raise InputError(f"recall={recall}: expected a number between 0 and 1; without `stopping_early` a search is exact")
    if screen.lists is None:
        raise InputError("screen: it has no lists, which Screen.build makes from 65,536 tokens on; search exactly")
    if len(queries) < LEAST_QUERIES:
        raise InputError(f"queries: {len(queries)}, at least {LEAST_QUERIES} are needed to measure a recall")
    truth = select_zones(queries, items, k=k, screen=screen, threads=threads)
    for share in SHARES:
        early = Screen(screen.shards, screen.lists.shrunk(share))
        # One by one: a batch is swept where that is faster, and then finds everything.
        found = np.concatenate([select_zones(query[None], items, k=k, screen=early, threads=threads).scores for query in queries])
        shares = (found >= truth.scores[:, -1:]).mean(axis=1)
        if shares.mean() - _ERRORS * shares.std(ddof=1) / len(shares) ** 0.5 >= recall:
            return early, float(shares.mean())
    return screen, 1.0
