"""Retrieval metrics from ranked ids: pure NumPy, the same for a checkpoint and for a bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PerQuery:
    """A figure over Q queries: the sum of `numerator` over the sum of `denominator`, both (Q,) float64.

    A query that the figure does not concern counts 0 in both. Kept by query, so that intervals and paired differences can be worked out.
    """

    numerator: F64
    denominator: F64

    @classmethod
    def of(cls, values: NDArray[np.generic] | Sequence[float], counted: NDArray[np.generic] | Sequence[float] | float = 1.0) -> PerQuery:
        """The mean of `values` (Q,), weighted by `counted`: 0 or 1 says which queries count, where what is 0 there may be NaN."""
        above = np.asarray(values, np.float64)
        below = np.broadcast_to(np.asarray(counted, np.float64), above.shape)
        return cls(np.where(below == 0, 0.0, above * below), below)

    @property
    def value(self) -> float:
        """NaN where nothing counts."""
        below = float(self.denominator.sum())
        return float(self.numerator.sum()) / below if below else float("nan")

    @property
    def influence(self) -> F64:
        """(Q,): what each query adds to the figure beyond its share; their variance over Q is the figure's (delta method). NaN where
        nothing counts."""
        below = self.denominator
        return (self.numerator - self.value * below) / below.mean() if below.any() else np.full(len(below), np.nan)

    @property
    def half(self) -> float:
        """Half-width of the figure's 95 % interval over queries (normal, delta method); inf for a single query."""
        count = len(self.numerator)
        return 1.959964 * float(self.influence.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf

    @property
    def queries(self) -> int:
        """How many queries count."""
        return int(np.count_nonzero(self.denominator))

    def interval(self, *, level: float = 0.95, rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap interval over the queries; NaN where nothing counts."""
        if not self.denominator.any():
            return float("nan"), float("nan")
        rng = np.random.default_rng(seed)
        rows = rng.integers(len(self.numerator), size=(rounds, len(self.numerator)))
        above, below = self.numerator[rows].sum(axis=1), self.denominator[rows].sum(axis=1)
        low, high = np.quantile(above[below > 0] / below[below > 0], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def hits_at_k(ranked: NDArray[np.int64], targets: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """(Q,): whether the labelled target (Q,) is among the first `k` of `ranked` (Q, K), padded with -1. A target of -1, which is not known,
    never is."""
    found: NDArray[np.bool_] = (ranked[:, :k] == targets[:, None]).any(axis=1) & (targets >= 0)
    return found


def average_precision_at_k(ranked: Sequence[int], relevant: Sequence[int], k: int) -> float:
    """AP@K = sum over the first k of P@i * rel(i), divided by min(|relevant|, k) (CIRCO). 0 when nothing is relevant."""
    wanted = set(relevant)
    hits, total = 0, 0.0
    for position, item in enumerate(ranked[:k], start=1):
        if item in wanted:
            hits += 1
            total += hits / position
    return total / min(len(wanted), k) if wanted else 0.0


def jaccard(one: set[int], other: set[int]) -> float:
    """Items in both over items in either; 1 where both are empty."""
    return len(one & other) / len(one | other) if one | other else 1.0


def recalls(ranked: NDArray[np.int64], targets: NDArray[np.int64], depths: Sequence[int]) -> dict[str, PerQuery]:
    """`recall_at_{k}`: the share of queries whose labelled target is among the first k."""
    return {f"recall_at_{k}": PerQuery.of(hits_at_k(ranked, targets, k)) for k in depths}


def mean_average_precisions(ranked: NDArray[np.int64], relevant: Sequence[Sequence[int]], depths: Sequence[int]) -> dict[str, PerQuery]:
    """`map_at_{k}`: the mean of `average_precision_at_k` over the queries that have a relevant item."""
    has = [bool(len(wanted)) for wanted in relevant]
    rows = ranked.tolist()
    return {
        f"map_at_{k}": PerQuery.of([average_precision_at_k(row, wanted, k) for row, wanted in zip(rows, relevant, strict=True)], has)
        for k in depths
    }


def relative_precision(ranked: NDArray[np.int64], relevant: Sequence[Sequence[int]], k: int) -> PerQuery:
    """How many of the first `k` are relevant, over the most that any ranking could have: min(|relevant|, k)."""
    found = np.asarray([np.isin(row[:k], list(wanted)).sum() for row, wanted in zip(ranked, relevant, strict=True)], np.float64)
    return PerQuery(found / k, np.asarray([min(len(wanted), k) / k for wanted in relevant], np.float64))


def negative_recalls(
    ranked: NDArray[np.int64], negatives: Sequence[Sequence[int]], named: Sequence[int], depths: Sequence[int]
) -> dict[str, PerQuery]:
    """`negative_recall_at_{k}` (PinPoint's NegRecall): of the wrong answers that a dataset names, how many are among the first k, over
    min(`named`, k). `negatives`: those in the gallery; `named`: how many there are. 0 where none are named. Low is good."""
    return {
        f"negative_recall_at_{k}": PerQuery.of([
            np.isin(row[:k], wrong).sum() / min(count, k) if count else 0.0
            for row, wrong, count in zip(ranked, negatives, named, strict=True)
        ])
        for k in depths
    }  # fmt: skip


def filter_ranking(ranked: NDArray[np.int64], subsets: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Each row of `ranked` (Q, K), with only its subset's ids left, in their order: (Q, largest subset), padded with -1."""
    filtered = np.full((len(ranked), max(map(len, subsets), default=0)), -1, np.int64)
    for row, (ranking, subset) in enumerate(zip(ranked, subsets, strict=True)):
        kept = ranking[np.isin(ranking, subset)]
        filtered[row, : len(kept)] = kept
    return filtered


def preference_accuracy(first: NDArray[np.floating], second: NDArray[np.floating], preferred: NDArray[np.int64]) -> float:
    """Share of queries (Q,) whose higher score is that of the `preferred` (1 or 2) side; equal scores count half."""
    if len(preferred) == 0:
        return float("nan")
    agreement = np.where(preferred == 1, first - second, second - first)
    return float(((agreement > 0) + 0.5 * (agreement == 0)).mean())


def preference_ratio(first: NDArray[np.floating], second: NDArray[np.floating], preferred: NDArray[np.int64]) -> float:
    """QuRe's: among the queries whose first side scores higher, the share whose first side is preferred; NaN without any."""
    higher = first > second
    return float((preferred[higher] == 1).mean()) if higher.any() else float("nan")


def roc_auc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN when one class is missing."""
    positives, negatives = scores[positive], scores[~positive]
    if len(positives) == 0 or len(negatives) == 0:
        return float("nan")
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    not_above = np.searchsorted(ordered, positives, side="right")
    return float((below + not_above).sum() / (2 * len(positives) * len(negatives)))
