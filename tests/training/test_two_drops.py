"""QuRe's two drops against a reference written out in loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dqe_training.trns.two_drops import between_drops, two_drop_negatives


def unit(*shape: int, seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def reference(scores: np.ndarray, target: int, excluded: set[int], gap: int) -> set[int]:
    """The set that negatives are drawn from."""
    below = sorted((i for i in range(len(scores)) if i not in excluded and scores[i] < scores[target]), key=lambda i: (-scores[i], i))
    drops = sorted(range(len(below) - 1), key=lambda at: (scores[below[at + 1]] - scores[below[at]], at))
    for one, other in itertools.pairwise(drops):
        if abs(one - other) > gap:
            return set(below[min(one, other) + 1 : max(one, other) + 1])
    return set()


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_set_is_the_references(tokens: int) -> None:
    queries, items = unit(300, 8, seed=0), unit(60, tokens, 8, seed=1)
    rng = np.random.default_rng(2)
    target, exclude = rng.integers(60, size=300), rng.integers(-1, 60, size=(300, 2))
    found = two_drop_negatives(queries, items, target, picks=60, seed=0, exclude=exclude)
    for row in range(300):
        scores = np.array([max(float(t @ queries[row]) for t in item) for item in items], np.float32)
        wanted = reference(scores, int(target[row]), set(exclude[row].tolist()), 1)
        drawn = found[row][found[row] >= 0].tolist()
        assert set(drawn) == wanted
        assert len(drawn) == len(wanted)


def test_negatives_score_below_the_target_and_follow_the_seed() -> None:
    queries, items = unit(200, 8, seed=0), unit(500, 1, 8, seed=1)
    target = np.random.default_rng(2).integers(500, size=200)
    first = two_drop_negatives(queries, items, target, picks=4, seed=0)
    scores = queries @ items[:, 0].T
    for row, picked in enumerate(first):
        assert (scores[row, picked[picked >= 0]] < scores[row, target[row]]).all()
    np.testing.assert_array_equal(two_drop_negatives(queries, items, target, picks=4, seed=0), first)
    assert (two_drop_negatives(queries, items, target, picks=4, seed=1) != first).any()


@pytest.mark.parametrize(
    ("scores", "places"),
    [
        ([0.9, 0.85, 0.5, 0.48, 0.47, 0.1, 0.09], slice(2, 5)),
        ([0.9, 0.45, 0.1, 0.09, 0.08, 0.0], slice(2, 5)),  # the two steepest are neighbours: the second and the third
        ([0.9, 0.5, 0.1], slice(0, 0)),
        ([0.9], slice(0, 0)),
        ([], slice(0, 0)),
    ],
)
def test_between_drops(scores: list[float], places: slice) -> None:
    assert between_drops(np.asarray(scores, np.float32)) == places
