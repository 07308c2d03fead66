"""The protocols' figures: hand-computed rankings, CIRCO's formula, ties, and what theory expects of random rankings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dqe_engine.errors import InputError
from dqe_engine.zones import select_zones
from dqe_training.data.queries import Preference, Query, QuerySet
from dqe_training.evaluation.benchmarks import circo_figures, cirr_figures, fashioniq_figures, figures, preference_figures, summary
from dqe_training.evaluation.metrics import PerQuery, average_precision_at_k, filter_ranking, preference_accuracy, preference_ratio
from dqe_training.evaluation.protocol import Embeddings


def names(count: int) -> tuple[str, ...]:
    return tuple(f"i{at:04d}" for at in range(count))


def values(figures: dict[str, PerQuery]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def found(ranked: np.ndarray) -> Embeddings:
    empty = np.zeros((0, 0), np.float32)
    return Embeddings(empty, empty, empty, ranked, empty)


# -- by hand ---------------------------------------------------------------------------------------------------------------


def test_fashioniq_by_hand() -> None:
    gallery = names(60)
    queries = QuerySet("dress", tuple(Query(str(q), gallery[0], "x", (gallery[t],)) for q, t in enumerate((9, 10, 49, 50))), gallery)
    ranked = np.tile(np.arange(50), (4, 1))
    assert values(fashioniq_figures(queries, ranked)) == {"recall_at_10": 1 / 4, "recall_at_50": 3 / 4}
    sets = [{"recall_at_10": r, "recall_at_50": 2 * r} for r in (0.1, 0.2, 0.3)]
    assert summary("fashioniq", sets) == pytest.approx({"recall_at_10": 0.2, "recall_at_50": 0.4, "mean": 0.3})


def test_cirr_by_hand() -> None:
    gallery = names(60)
    members = gallery[:6]

    def query(reference: int, target: int) -> Query:
        others = tuple(m for at, m in enumerate(members) if at != reference)
        return Query(f"{reference}-{target}", members[reference], "x", (members[target],), exclude=(members[reference],), subset=others)

    queries = QuerySet("val", (query(0, 3), query(1, 2), query(5, 0)), gallery)
    rest = list(range(6, 60))
    ranked = np.asarray(
        [
            [3, *rest, 1, 2, 4, 5],  # first in both
            [*rest[:4], 4, *rest[4:8], 2, *rest[8:], 0, 3, 5],  # tenth; second of the five
            [*rest[:50], 1, 2, 3, *rest[50:], 0, 4],  # not in 50; fourth of the five
        ]
    )
    result = values(cirr_figures(queries, ranked))
    assert result == pytest.approx(
        {"recall_at_1": 1 / 3, "recall_at_5": 1 / 3, "recall_at_10": 2 / 3, "recall_at_50": 2 / 3,
         "subset_recall_at_1": 1 / 3, "subset_recall_at_2": 2 / 3, "subset_recall_at_3": 2 / 3}
    )  # fmt: skip
    assert summary("cirr", [result]) == pytest.approx({"mean_of_recall_at_5_and_subset_recall_at_1": 1 / 3})


def test_a_filtered_ranking_keeps_its_order() -> None:
    ranked = np.asarray([[4, 2, 0, 3, -1], [1, 0, 4, 2, 3]])
    assert filter_ranking(ranked, [[0, 4, 1], [3, 2]]).tolist() == [[4, 0, -1], [2, 3, -1]]
    assert filter_ranking(ranked, [[], []]).shape == (2, 0)


def test_circo_by_hand() -> None:
    gallery = names(60)
    queries = QuerySet(
        "val",
        (Query("0", gallery[50], "x", (gallery[2], gallery[0], gallery[6])), Query("1", gallery[50], "x", (gallery[51],))),
        gallery,
    )
    ranked = np.tile(np.arange(50), (2, 1))
    result = values(circo_figures(queries, ranked))
    # Hits at ranks 1, 3 and 7 of 3 ground truths; the second query finds nothing.
    assert result["map_at_5"] == pytest.approx((1 + 2 / 3) / 3 / 2)
    assert result["map_at_10"] == result["map_at_50"] == pytest.approx((1 + 2 / 3 + 3 / 7) / 3 / 2)
    assert (result["recall_at_5"], result["recall_at_10"]) == (0.5, 0.5)  # the target is at rank 3: ground truths do not count
    assert summary("circo", [result]) == {}


@pytest.mark.parametrize("truths", range(1, 15))
@pytest.mark.parametrize("k", [5, 10, 25, 50])
def test_circos_average_precision(truths: int, k: int) -> None:
    """AP@K = sum over k <= K of P@k rel(k), over min(|GT|, K): against the formula written out."""
    ranking = np.random.default_rng([truths, k]).permutation(80).tolist()
    relevant = list(range(truths))
    expected = 0.0
    for cut in range(1, k + 1):
        if ranking[cut - 1] in relevant:
            expected += len(set(ranking[:cut]) & set(relevant)) / cut
    assert average_precision_at_k(ranking, relevant, k) == pytest.approx(expected / min(truths, k))
    assert average_precision_at_k([*relevant, *range(100, 200)], relevant, k) == pytest.approx(1)
    last_first = [*range(100, 100 + k - 1), 0]  # one hit, at rank k
    assert average_precision_at_k(last_first, relevant, k) == pytest.approx(1 / k / min(truths, k))


def test_preferences_by_hand() -> None:
    first, second = np.asarray([3.0, 1.0, 2.0, 2.0]), np.asarray([1.0, 3.0, 2.0, 5.0])
    assert preference_accuracy(first, second, np.asarray([1, 1, 2, 2])) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert preference_ratio(first, second, np.asarray([1, 1, 2, 2])) == 1  # the first alone scores its first side higher
    assert preference_ratio(first, second, np.asarray([2, 1, 2, 2])) == 0
    for measure in (preference_accuracy, preference_ratio):
        assert math.isnan(measure(first[:0], second[:0], np.asarray([], np.int64)))


def test_a_sets_preference_is_its_mean_maxsim() -> None:
    gallery = names(4)
    tokens = np.zeros((4, 2, 2), np.float32)
    tokens[:, 0, 0] = [0.9, 0.1, 0.6, 0.5]  # the better token of each image; the other one scores below it
    tokens[:, 1, 0] = -1
    query = np.asarray([[1.0, 0.0]] * 2, np.float32)
    pair = (gallery[0], gallery[1]), (gallery[2], gallery[3])  # means 0.5 and 0.55
    queries = QuerySet("all", tuple(Query(str(p), gallery[0], "x", preference=Preference(*pair, p)) for p in (1, 2)), gallery)
    embedded = Embeddings(query, tokens, query, np.zeros((2, 0), np.int64), query)
    assert preference_figures(queries, embedded)["preference_accuracy"] == 0.5
    only = QuerySet("all", queries.queries[1:], gallery)
    result = figures("hp-fashioniq", only, embedded)
    assert result["preference_accuracy"] == 1
    assert math.isnan(result["preference_ratio"])  # no first set scores higher


def test_secret_targets_give_no_figures() -> None:
    queries = QuerySet("test1", (Query("0", "a", "x"),), ("a", "b"))
    assert figures("cirr", queries, found(np.asarray([[1]]))) == {}
    assert summary("cirr", [{}]) == {}
    known = QuerySet("val", (Query("0", "a", "x", ("b",)),), ("a", "b"))
    with pytest.raises(InputError, match="'shoes': no protocol for rankings; expected fashioniq"):
        figures("shoes", known, found(np.asarray([[1]])))


# -- ties ------------------------------------------------------------------------------------------------------------------


def test_equal_scores_go_to_the_lower_id() -> None:
    """Duplicate images: the ranking, and with it every figure, depends on ids and not on chance."""
    gallery = names(6)
    items = np.tile(np.asarray([[[1.0, 0.0]]], np.float32), (6, 1, 1))
    query = np.asarray([[1.0, 0.0]], np.float32)
    for target, expected in ((0, 1.0), (1, 0.0)):
        queries = QuerySet("val", (Query("0", gallery[5], "x", (gallery[target],), subset=gallery[:5]),), gallery)
        ranked = select_zones(query, items, k=queries.depth, exclude=queries.excluded).ids
        assert ranked.tolist() == [[0, 1, 2, 3, 4, 5]]
        assert values(cirr_figures(queries, ranked))["recall_at_1"] == expected
        assert values(cirr_figures(queries, ranked))["subset_recall_at_1"] == expected


# -- chance ----------------------------------------------------------------------------------------------------------------

_QUERIES, _GALLERY, _TRUTHS = 4_000, 200, 4


def _tolerance(expected: float) -> float:
    """Four standard errors of a share over `_QUERIES` queries."""
    return 4 * math.sqrt(expected * (1 - expected) / _QUERIES)


def test_a_random_ranking_scores_what_theory_says() -> None:
    """Recall@K is K over the candidates, the subset's K / 5, and mAP the expectation of its formula."""
    rng = np.random.default_rng(0)
    gallery = names(_GALLERY)
    queries, rows = [], []
    for number in range(_QUERIES):
        drawn = rng.choice(_GALLERY, 6, replace=False).tolist()
        reference, *others = (gallery[at] for at in drawn)
        queries.append(Query(str(number), reference, "x", tuple(others[:_TRUTHS]), exclude=(reference,), subset=tuple(others)))
        rows.append([at for at in rng.permutation(_GALLERY) if at != drawn[0]])
    asked, ranked = QuerySet("val", tuple(queries), gallery), np.asarray(rows)
    candidates = _GALLERY - 1
    cirr, circo = values(cirr_figures(asked, ranked)), values(circo_figures(asked, ranked))
    for k in (1, 5, 10, 50):
        assert cirr[f"recall_at_{k}"] == pytest.approx(k / candidates, rel=0, abs=_tolerance(k / candidates))
    for k in (1, 2, 3):
        assert cirr[f"subset_recall_at_{k}"] == pytest.approx(k / 5, rel=0, abs=_tolerance(k / 5))
    for k in (5, 10, 25, 50):
        # P(rank j is valid) = R / N; given that, (R - 1) / (N - 1) of the j - 1 before it are valid on average.
        hit, others = _TRUTHS / candidates, (_TRUTHS - 1) / (candidates - 1)
        expected = sum(hit * (1 + (j - 1) * others) / j for j in range(1, k + 1)) / min(_TRUTHS, k)
        assert circo[f"map_at_{k}"] == pytest.approx(expected, rel=0, abs=_tolerance(expected))  # AP's spread is below a share's
        assert circo[f"recall_at_{k}"] == pytest.approx(k / candidates, rel=0, abs=_tolerance(k / candidates))


def test_random_preferences_agree_half_the_time() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, _QUERIES))
    agreed = preference_accuracy(first, second, rng.integers(1, 3, _QUERIES))
    assert agreed == pytest.approx(0.5, rel=0, abs=_tolerance(0.5))
