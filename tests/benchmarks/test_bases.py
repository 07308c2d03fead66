"""Sums of arms: what a part adds to one base beyond what it adds to the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.bases import BASES, PARTS, contrast, contrasts, label
from dqe_training.ablation.statistics import compare, student_t
from dqe_training.evaluation.metrics import PerQuery

ARMS = [label(base, part) for part in PARTS for base in BASES]


def cells(hits: dict[tuple[str, int], list[int]]) -> tuple[Any, Any]:
    """A plan and its results, of arm and seed -> hits by query."""
    plan = SimpleNamespace(cells=[SimpleNamespace(arm=arm, seed=seed, key=f"{arm} {seed}") for arm, seed in hits])
    found = {f"{arm} {seed}": SimpleNamespace(scores={"r": SimpleNamespace(figure=PerQuery.of(row))}) for (arm, seed), row in hits.items()}
    return plan, found


def drawn(seeds: int = 3, queries: int = 40) -> dict[tuple[str, int], list[int]]:
    rng = np.random.default_rng(0)
    return {(arm, seed): rng.integers(0, 2, queries).tolist() for seed in range(seeds) for arm in ARMS}


def test_a_difference_of_two_arms_is_the_ablations() -> None:
    hits = drawn()
    found = contrast(*cells(hits), {"mean+law": 1, "mean": -1}, "r")
    of = [[PerQuery.of(hits[arm, seed]) for seed in range(3)] for arm in ("mean+law", "mean")]
    assert found == compare(*of)


def test_a_difference_of_differences_by_hand() -> None:
    hits = drawn()
    weights = contrasts()["+law: what two_pass gains beyond mean"]
    assert weights == {"two_pass+law": 1, "two_pass": -1, "mean+law": -1, "mean": 1}
    found = contrast(*cells(hits), weights, "r")
    assert found is not None
    rows = np.array([sum(n * np.array(hits[arm, seed]) for arm, n in weights.items()) for seed in range(3)])  # (S, Q)
    by_seed, by_query = rows.mean(axis=1), rows.mean(axis=0)
    assert found.value == pytest.approx(by_seed.mean())
    assert found.half_seeds == pytest.approx(student_t(2) * by_seed.std(ddof=1) / 3**0.5)
    assert found.half_queries == pytest.approx(1.959964 * by_query.std(ddof=1) / 40**0.5)


def test_what_the_labels_give_is_law_without_its_control() -> None:
    """Of hits that are the same in both, nothing; of one more of ten, 10 points, whatever the bases without pools do."""
    hits = drawn(queries=10)
    for seed in range(3):
        hits["mean+law", seed] = hits["mean+law:unlabelled", seed]
        hits["two_pass+law:unlabelled", seed] = [0] * 5 + [1] * 5
        hits["two_pass+law", seed] = [0] * 4 + [1] * 6
    found = {name: contrast(*cells(hits), contrasts()[name], "r") for name in contrasts() if name.startswith("the labels")}
    assert {name: round(difference.value, 12) for name, difference in found.items() if difference} == {
        "the labels on mean: +law, from +law:unlabelled": 0, "the labels on two_pass: +law, from +law:unlabelled": 0.1,
        "the labels: what two_pass gains beyond mean": 0.1,
    }  # fmt: skip


def test_a_seed_counts_when_all_its_arms_are_there() -> None:
    hits = drawn()
    weights = contrasts()["+trns: what two_pass gains beyond mean"]
    del hits["mean+trns", 2]
    found = contrast(*cells(hits), weights, "r")
    assert found is not None
    assert found.seeds == 2
    assert contrast(*cells({}), weights, "r") is None


def test_every_contrast_is_of_arms_that_train_and_sums_to_zero() -> None:
    for weights in contrasts().values():
        assert set(weights) <= set(ARMS)
        assert sum(weights.values()) == 0
