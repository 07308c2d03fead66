"""Lists that stop early: the promised recall holds on other queries of the kind, scores stay exact, and exact search stays what it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from dqe_engine import _kernels
from dqe_engine.errors import InputError
from dqe_engine.zones import Screen, cpu, select_zones
from dqe_engine.zones import early as early_search
from dqe_engine.zones.early import _recall, shown, stopping_early
from dqe_engine.zones.lists import TokenLists

SIZE, TOKENS, WIDTH, K = 4000, 4, 16, 10


@pytest.fixture(scope="module")
def gallery() -> tuple[NDArray[np.float32], Screen, NDArray[np.float32]]:
    """Tokens around some directions, with lists, and queries between two of them."""
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((200, WIDTH)).astype(np.float32)
    items = centres[rng.integers(200, size=(SIZE, TOKENS))] + 0.5 * rng.standard_normal((SIZE, TOKENS, WIDTH)).astype(np.float32)
    items /= np.linalg.norm(items, axis=2, keepdims=True)
    swept = Screen.build(items, lists=False)
    screen = Screen(swept.shards, TokenLists.build((items,), threads=1, least=1))
    queries = items[rng.integers(SIZE, size=1000), 0] + items[rng.integers(SIZE, size=1000), 0]
    return items, screen, np.ascontiguousarray(queries, np.float32)


def shares(items: NDArray[np.float32], screen: Screen, early: Screen, queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the exact k best that each query finds, asked alone: a batch adds in another order. All by lists, as far as they go."""
    assert early.lists is not None
    forced = dataclasses.replace(early, lists=dataclasses.replace(early.lists, always=True))
    truth, found = ([select_zones(query[None], items, k=K, screen=by) for query in queries] for by in (screen, forced))
    for one, query in zip(found, queries, strict=True):
        np.testing.assert_allclose(one.scores[0], (items[one.ids[0]] @ query).max(axis=1), rtol=1e-6, atol=1e-6)
    mean: NDArray[np.float64] = np.mean([np.isin(one.ids[0], best.ids[0]) for one, best in zip(found, truth, strict=True)], axis=1)
    return mean


def test_what_is_promised_is_found_by_queries_that_it_was_not_measured_on(
    gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]],
) -> None:
    items, screen, queries = gallery
    early, measured = stopping_early(screen, items, queries[:400], recall=0.95, k=K)
    assert early.lists is not None
    assert screen.lists is not None
    assert (early.lists.widest > screen.lists.widest).any(), "the whole cap was kept: nothing stops early"
    assert not early.lists.always
    assert 0.95 <= measured < 1.0
    assert measured == pytest.approx(shares(items, screen, early, queries[:400]).mean())
    assert shares(items, screen, early, queries[400:]).mean() >= 0.95


def test_queries_that_lists_do_not_help_do_not_flatter_those_that_follow(
    gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After many that leave too many tokens, a gallery's queries are swept in full: those of a measurement are not."""
    items, screen, queries = gallery
    monkeypatch.setattr(early_search, "SHARES", (0.4,))
    scattered = rng.standard_normal((200, WIDTH)).astype(np.float32)
    monkeypatch.setattr(cpu, "most_listed", lambda request, by_rows: 1 if (request.queries[0] == scattered).all(axis=1).any() else 10**6)
    asked = np.concatenate([scattered, queries[:200]])
    early, measured = stopping_early(screen, items, asked, recall=0.9, k=K)
    assert early.lists is not None
    assert early.lists.tally_of(1).tried == 0
    assert measured == pytest.approx(shares(items, screen, early, asked).mean())
    assert measured < 1.0


@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
def test_what_is_found_by_whole_caps_is_counted_as_found(
    instruction_set: str, gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By instruction sets, some of which add in another order where queries are many."""
    items, screen, queries = gallery
    monkeypatch.setattr(cpu, "_best_instruction_set", lambda: instruction_set)
    monkeypatch.setattr(early_search, "SHARES", (1.0,))
    early, measured = stopping_early(screen, items, queries[:100], recall=0.95, k=K)
    assert early is not screen
    assert measured == 1.0


def test_an_item_as_good_as_the_last_does_not_stand_for_a_better_one() -> None:
    exact = np.asarray([[4, 3, 2], [4, 2, 2]], np.float32)
    assert _recall(np.asarray([[4, 2, 2], [4, 2, 2]], np.float32), exact) == pytest.approx(5 / 6)
    assert _recall(np.asarray([[4, 3, 2], [2, 2, 2]], np.float32), exact) == pytest.approx(5 / 6)


def test_what_is_shown_is_less_than_what_was_measured(rng: np.random.Generator) -> None:
    assert shown(1.0, 100) == pytest.approx(100 / 104)
    assert shown(0.0, 100) == pytest.approx(0, abs=1e-12)
    for queries, true in ((100, 0.97), (400, 0.99), (400, 0.5)):  # all of a query's answers are lost together
        found = rng.binomial(queries, true, 4000) / queries
        assert np.mean([shown(float(one), queries) > true for one in found]) < 0.04


def test_a_cap_of_no_angle_loses_answers_and_a_whole_one_none(gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]]) -> None:
    items, screen, queries = gallery
    assert screen.lists is not None
    none, whole = (Screen(screen.shards, screen.lists.shrunk(share)) for share in (0.0, 1.0))
    assert shares(items, screen, none, queries[:100]).mean() < 1.0
    assert shares(items, screen, whole, queries[:100]).mean() == 1.0


def test_exact_search_comes_back_where_nothing_less_is_enough(
    gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    items, screen, queries = gallery
    monkeypatch.setattr(early_search, "SHARES", (0.0, 0.1))
    early, measured = stopping_early(screen, items, queries[:100], recall=0.96, k=K)
    assert measured == 1.0
    assert early is screen
    assert shares(items, screen, early, queries[100:200]).mean() == 1.0


@pytest.mark.parametrize(
    ("recall", "count", "lists", "said"),
    [
        (1.0, 100, True, "expected a number between 0 and 1"),
        (float("nan"), 100, True, "expected a number between 0 and 1"),
        (0.9, 99, True, "at least 100"),
        (0.99, 200, True, r"200 queries can prove a recall of 0.9804 at most; pass at least 396 queries"),
        (0.9, 100, False, "no lists"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    recall: float, count: int, lists: bool, said: str, gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]]
) -> None:
    items, screen, queries = gallery
    with pytest.raises(InputError, match=said):
        stopping_early(screen if lists else dataclasses.replace(screen, lists=None), items, queries[:count], recall=recall, k=K)
