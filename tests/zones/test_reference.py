"""The definition itself, held against plain Python loops and hand-made cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dqe_engine.contracts.zones import Policy, ZoneSpec
from dqe_engine.zones import ZoneSelection, select_zones
from dqe_engine.zones.philox import gumbel, uniform

NAN, INF = math.nan, math.inf


def from_scores(scores: list[float], **options: Any) -> ZoneSelection:
    """Select over items whose scores for the one query are given."""
    items = np.array(scores, np.float32)[:, None].copy()
    return select_zones(np.ones((1, 1), np.float32), items, backend="reference", **options)


@pytest.mark.parametrize("policy", ["hardest", "uniform", "softmax"])
def test_against_plain_loops(policy: Policy, rng: np.random.Generator) -> None:
    queries = rng.integers(-3, 4, (7, 4)).astype(np.float32)
    items = rng.integers(-3, 4, (111, 8, 4)).astype(np.float32)
    exclude = [rng.integers(0, 111, 3) for _ in range(7)]
    targets = rng.integers(0, 111, 7)
    spec = ZoneSpec(lo=1, hi=6, policy=policy, seed=11, temperature=0.5)
    result = select_zones(queries, items, k=5, anchor=targets, zones=spec, picks=4, counts=True, exclude=exclude, backend="reference")
    assert result.counts is not None
    assert result.picks is not None
    for b, query in enumerate(queries):
        scores = [max(float(np.dot(query, token)) for token in item) for item in items]
        candidates = [i for i in range(111) if i not in exclude[b]]
        assert result.ids[b].tolist() == sorted(candidates, key=lambda i: (-scores[i], i))[:5]
        delta = {i: scores[targets[b]] - scores[i] for i in candidates}
        mid = [i for i in candidates if 1 <= delta[i] <= 6]
        assert result.counts[b].tolist() == [sum(d < 1 for d in delta.values()), len(mid), sum(d > 6 for d in delta.values())]

        def key(i: int, b: int = b, scores: list[float] = scores) -> float:
            u = uniform(11, np.array([b]), np.array([i]))
            return {"hardest": scores[i], "uniform": float(u[0]), "softmax": scores[i] / 0.5 + float(gumbel(u)[0])}[policy]

        assert result.picks[b].tolist() == sorted(mid, key=lambda i: (-key(i), i))[:4]


def test_both_bounds_are_inclusive_and_the_anchor_is_not_excluded() -> None:
    result = from_scores([1.0, 0.75, 0.5, 0.25, 0.0], zones=ZoneSpec(lo=0.25, hi=0.75, policy="hardest"), picks=5, counts=True)
    assert result.picks is not None
    assert result.picks.tolist() == [[1, 2, 3, -1, -1]]
    assert result.pick_scores is not None
    assert result.pick_scores.tolist() == [[0.75, 0.5, 0.25, -INF, -INF]]
    assert result.counts is not None
    assert result.counts.tolist() == [[1, 3, 1]]


def test_nan_never_ranks_and_infinities_do() -> None:
    zones = ZoneSpec(lo=-INF, hi=INF)
    result = from_scores([NAN, -INF, 2.0, NAN, 2.0], k=5, zones=zones, counts=True)
    assert result.ids.tolist() == [[2, 4, 1, -1, -1]]
    assert result.scores.tolist() == [[2.0, 2.0, -INF, -INF, -INF]]
    assert result.counts is not None
    assert result.counts.tolist() == [[0, 3, 0]]


def test_an_undefined_difference_is_in_no_zone() -> None:
    result = from_scores([INF, INF, 1.0], k=3, zones=ZoneSpec(lo=-INF, hi=INF), counts=True)  # inf - inf
    assert result.ids.tolist() == [[0, 1, 2]]
    assert result.counts is not None
    assert result.counts.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(("p", "rank"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_a_rank_is_an_existing_difference(p: float, rank: int) -> None:
    scores = [0.125, 1.0, NAN, 0.75, 0.5, 0.25]
    result = from_scores(scores, zones=ZoneSpec(lo=p, hi=1.0, bounds="rank"), counts=True)
    differences = sorted(1.0 - score for score in scores if not math.isnan(score))
    assert result.lo is not None
    assert result.hi is not None
    assert (result.lo[0], result.hi[0]) == (differences[rank], differences[-1])
    assert result.counts is not None
    assert result.counts.tolist() == [[rank, 5 - rank, 0]]


def test_ranks_leave_out_what_is_excluded() -> None:
    spec = ZoneSpec(lo=0.0, hi=0.5, bounds="rank", policy="hardest")
    anchor = np.array([0], np.int64)
    result = from_scores([1.0, 0.75, 0.5, 0.25], anchor=anchor, zones=spec, picks=4, exclude=[[0]])
    assert result.anchor_scores is not None
    assert result.anchor_scores.tolist() == [1.0]  # an excluded item may be the anchor
    assert result.picks is not None
    assert result.picks.tolist() == [[1, 2, -1, -1]]


@pytest.mark.parametrize("scores", [[], [NAN]])
@pytest.mark.parametrize("bounds", ["absolute", "rank"])
def test_no_candidate(scores: list[float], bounds: Any) -> None:
    result = from_scores(scores, k=2, zones=ZoneSpec(lo=0, hi=1, bounds=bounds), picks=1, counts=True)
    assert result.ids.tolist() == [[-1, -1]]
    assert result.counts is not None
    assert result.counts.tolist() == [[0, 0, 0]]
    assert result.picks is not None
    assert result.picks.tolist() == [[-1]]
    assert result.anchor_scores is not None
    assert np.isnan(result.anchor_scores).all()
