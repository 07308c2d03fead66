"""QuRe's hard negatives (arXiv 2507.12416), a rival of TRNS's: what lies between the two steepest drops of the scores below the target."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

GAP = 1
"""The two drops lie more than this many ranks apart; closer pairs are passed over. QuRe's setting."""
_BLOCK = 256  # queries whose scores are in memory at once


def two_drop_negatives(
    queries: NDArray[np.float32],
    tokens: NDArray[np.float32],
    target: NDArray[np.int64],
    *,
    picks: int,
    seed: int,
    exclude: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """(T, picks) int64: image positions drawn uniformly, without replacement, from each query's set; -1 where it holds fewer.

    A query's candidates are ranked by score (ties: the lower position first), and those below the target kept. Steepest first, the
    drops from one to the next are paired with the next steepest; the first pair that lies more than `GAP` ranks apart bounds the set,
    which starts after its upper drop and ends before its lower one.

    Args:
        queries: (T, D) float32. tokens: (I, M, D) float32 of the gallery. target: (T,) positions in it.
        exclude: (T, E), positions that are no candidates of a query (its reference), padded with -1.
    """
    found = np.full((len(queries), picks), -1, np.int64)
    items, count, width = tokens.shape
    flat = tokens.reshape(items * count, width).T
    for first in range(0, len(queries), _BLOCK):
        scores = (queries[first : first + _BLOCK] @ flat).reshape(-1, items, count).max(axis=2)  # (b, I)
        for at, row in enumerate(scores):
            query = first + at
            own = row[target[query]]
            if exclude is not None:
                hidden = exclude[query]
                row[hidden[hidden >= 0]] = -np.inf
            order = np.argsort(-row, kind="stable")
            below = order[row[order] < own]
            below = below[np.isfinite(row[below])]
            inside = between_drops(row[below])
            drawn = np.random.default_rng([seed, query]).permutation(below[inside])[:picks]
            found[query, : len(drawn)] = drawn
    return found


def between_drops(scores: NDArray[np.float32], gap: int = GAP) -> slice:
    """The places of descending `scores` (n,) between the two steepest drops; an empty slice where no pair lies `gap` ranks apart."""
    steepest = np.argsort(np.diff(scores), kind="stable")
    for one, other in itertools.pairwise(steepest):
        upper, lower = sorted((int(one), int(other)))
        if lower - upper > gap:
            return slice(upper + 1, lower + 1)
    return slice(0, 0)
