"""Retrieval metrics against brute force and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dqe_training.evaluation.metrics import (
    PerQuery,
    average_precision_at_k,
    mean_average_precisions,
    recalls,
    relative_precision,
    roc_auc,
)


def rankings(queries: int, items: int, depth: int, seed: int = 0) -> np.ndarray:
    """Random rankings, the second half of some rows padded with -1."""
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:depth] for _ in range(queries)])
    ranked[::3, depth // 2 :] = -1
    return ranked


@pytest.mark.parametrize("k", [1, 5, 10, 50])
def test_recall_equals_brute_force(k: int) -> None:
    ranked = rankings(40, 60, 50)
    targets = np.random.default_rng(1).integers(0, 60, 40)
    expected = sum(int(t) in row[:k].tolist() for row, t in zip(ranked, targets, strict=True)) / 40
    assert recalls(ranked, targets, [k])[f"recall_at_{k}"].value == pytest.approx(expected)


def test_recall_of_known_rankings() -> None:
    ranked = np.array([[3, 1, 2], [0, 2, -1], [-1, -1, -1]])
    targets = np.array([1, 1, 0])
    assert [figure.value for figure in recalls(ranked, targets, (1, 2, 3, 99)).values()] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert math.isnan(recalls(np.empty((0, 5), np.int64), np.empty(0, np.int64), [5])["recall_at_5"].value)


@pytest.mark.parametrize(
    ("ranked", "relevant", "k", "expected"),
    [
        ([1, 2, 3, 4], [1, 3], 4, (1 + 2 / 3) / 2),
        ([1, 2, 3, 4], [1, 3], 1, 1.0),  # divided by min(2, 1)
        ([5, 6, 7], [1, 2], 3, 0.0),
        ([5, 6, 7], [], 3, 0.0),
        ([1, -1, -1], [1], 3, 1.0),  # padding is no hit
        ([9, 8, 1], [1], 3, 1 / 3),
        ([9, 8, 1], [1], 2, 0.0),
        ([4, 2], [1, 2, 3, 4], 50, (1 + 1) / 4),  # divided by what there is to find, not by what was ranked
    ],
)
def test_average_precision_of_known_rankings(ranked: list[int], relevant: list[int], k: int, expected: float) -> None:
    assert average_precision_at_k(ranked, relevant, k) == pytest.approx(expected)


def test_mean_average_precision_leaves_out_queries_with_nothing_to_find() -> None:
    ranked = np.array([[1, 2], [3, 4], [5, 6]])
    figure = mean_average_precisions(ranked, [[1], [], [6]], [2])["map_at_2"]
    assert (figure.value, figure.queries) == (pytest.approx((1 + 0.5) / 2), 2)
    assert math.isnan(mean_average_precisions(ranked, [[], [], []], [2])["map_at_2"].value)


def test_precision_and_what_is_attainable() -> None:
    ranked = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [7, 8, 9, 0]])
    figure = relative_precision(ranked, [[1, 4, 30], [5], []], 4)
    assert figure.numerator == pytest.approx([2 / 4, 1 / 4, 0])
    assert figure.denominator == pytest.approx([3 / 4, 1 / 4, 0])
    assert figure.value == pytest.approx(3 / 4)
    assert relative_precision(ranked[:1], [list(range(20))], 4).value == 1


def test_precision_equals_brute_force() -> None:
    ranked = rankings(30, 40, 20)
    rng = np.random.default_rng(2)
    relevant = [rng.choice(40, size=int(rng.integers(0, 15)), replace=False).tolist() for _ in range(30)]
    expected = np.mean([sum(int(i) in wanted for i in row[:10]) / 10 for row, wanted in zip(ranked, relevant, strict=True)])
    assert relative_precision(ranked, relevant, 10).numerator.mean() == pytest.approx(expected)


@pytest.mark.parametrize("levels", [3, 1000])  # few levels: mostly ties
def test_auc_equals_counting_pairs(levels: int) -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, levels, 80) / levels
    positive = rng.random(80) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(pairs), rel=1e-12)


def test_auc_of_known_scores() -> None:
    positive = np.array([True, True, False, False])
    assert roc_auc(np.array([4.0, 3, 2, 1]), positive) == 1
    assert roc_auc(np.array([1.0, 2, 3, 4]), positive) == 0
    assert roc_auc(np.zeros(4), positive) == 0.5
    assert math.isnan(roc_auc(np.zeros(4), np.ones(4, bool)))
    assert math.isnan(roc_auc(np.zeros(4), np.zeros(4, bool)))


def test_the_interval_covers_the_mean() -> None:
    values = (np.random.default_rng(0).random(500) < 0.3).astype(float)
    low, high = PerQuery.of(values).interval()
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.15)
    assert PerQuery.of(values).interval() == (low, high)
    assert all(math.isnan(v) for v in PerQuery.of(np.empty(0)).interval())
    assert all(math.isnan(v) for v in PerQuery.of(np.ones(3), np.zeros(3)).interval())
    assert PerQuery.of(np.ones(7)).interval() == (1.0, 1.0)


def test_queries_that_do_not_count_change_neither_figure_nor_interval_width() -> None:
    rng = np.random.default_rng(1)
    values, counted = rng.random(400), rng.random(400) < 0.5
    figure = PerQuery.of(np.where(counted, values, np.nan), counted)
    assert (figure.value, figure.queries) == (pytest.approx(values[counted].mean()), int(counted.sum()))
    low, high = figure.interval()
    assert high - low == pytest.approx(2 * 1.96 * values[counted].std() / math.sqrt(counted.sum()), rel=0.15)
