"""Retrieval metrics from ranked ids: pure NumPy, the same for a checkpoint and for a bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def recall_at_k(ranked: NDArray[np.int64], targets: NDArray[np.int64], k: int) -> float:
    """Share of queries whose labelled target (Q,) is among the first `k` of `ranked` (Q, K), padded with -1."""
    if len(targets) == 0:
        return float("nan")
    return float((ranked[:, :k] == targets[:, None]).any(axis=1).mean())


def average_precision_at_k(ranked: Sequence[int], relevant: Sequence[int], k: int) -> float:
    """AP@K = sum over the first k of P@i * rel(i), divided by min(|relevant|, k) (CIRCO). 0 when nothing is relevant."""
    wanted = set(relevant)
    hits, total = 0, 0.0
    for position, item in enumerate(ranked[:k], start=1):
        if item in wanted:
            hits += 1
            total += hits / position
    return total / min(len(wanted), k) if wanted else 0.0


def mean_average_precision_at_k(ranked: NDArray[np.int64], relevant: Sequence[Sequence[int]], k: int) -> float:
    """Mean of `average_precision_at_k` over the queries that have a relevant item."""
    values = [average_precision_at_k(row.tolist(), wanted, k) for row, wanted in zip(ranked, relevant, strict=True) if len(wanted)]
    return float(np.mean(values)) if values else float("nan")


def precision_at_k(ranked: NDArray[np.int64], relevant: Sequence[Sequence[int]], k: int) -> tuple[float, float]:
    """Mean share of the first `k` that is relevant, and the most that any ranking could reach (min(|relevant|, k) / k)."""
    found = [np.isin(row[:k], list(wanted)).sum() / k for row, wanted in zip(ranked, relevant, strict=True)]
    attainable = [min(len(wanted), k) / k for wanted in relevant]
    return (float(np.mean(found)), float(np.mean(attainable))) if found else (float("nan"), float("nan"))


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


def bootstrap_interval(values: NDArray[np.floating], *, level: float = 0.95, rounds: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-query `values`."""
    if len(values) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
