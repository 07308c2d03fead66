"""Lists that stop early: the promised recall holds on other queries of the kind, scores stay exact, and exact search stays what it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from dqe_engine.errors import InputError
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.early import stopping_early
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
    queries = items[rng.integers(SIZE, size=400), 0] + items[rng.integers(SIZE, size=400), 0]
    return items, screen, np.ascontiguousarray(queries, np.float32)


def shares(items: NDArray[np.float32], screen: Screen, early: Screen, queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the exact k best that each query finds, asked alone."""
    truth = select_zones(queries, items, k=K, screen=screen)
    found = [select_zones(query[None], items, k=K, screen=early) for query in queries]
    for one, query in zip(found, queries, strict=True):
        np.testing.assert_allclose(one.scores[0], (items[one.ids[0]] @ query).max(axis=1), rtol=1e-6, atol=1e-6)
    mean: NDArray[np.float64] = np.mean([np.isin(one.ids[0], ids) for one, ids in zip(found, truth.ids, strict=True)], axis=1)
    return mean


def test_what_is_promised_is_found_by_queries_that_it_was_not_measured_on(
    gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]],
) -> None:
    items, screen, queries = gallery
    early, measured = stopping_early(screen, items, queries[:200], recall=0.95, k=K)
    assert early.lists is not None
    assert screen.lists is not None
    assert (early.lists.widest > screen.lists.widest).any(), "the whole cap was kept: nothing stops early"
    assert 0.95 <= measured <= 1.0
    other = shares(items, screen, early, queries[200:])
    assert other.mean() + 3 * other.std() / len(other) ** 0.5 >= 0.95


def test_a_cap_of_no_angle_loses_answers_and_a_whole_one_none(gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]]) -> None:
    items, screen, queries = gallery
    assert screen.lists is not None
    none, whole = (Screen(screen.shards, screen.lists.shrunk(share)) for share in (0.0, 1.0))
    assert shares(items, screen, none, queries[:100]).mean() < 1.0
    assert shares(items, screen, whole, queries[:100]).mean() == 1.0


def test_exact_search_comes_back_where_nothing_less_is_enough(gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]]) -> None:
    items, screen, queries = gallery
    early, measured = stopping_early(screen, items, queries[:100], recall=1 - 1e-12, k=K)
    assert measured == 1.0
    assert shares(items, screen, early, queries[:100]).mean() == 1.0


@pytest.mark.parametrize(
    ("recall", "count", "lists", "said"),
    [
        (1.0, 100, True, "expected a number between 0 and 1"),
        (float("nan"), 100, True, "expected a number between 0 and 1"),
        (0.9, 99, True, "at least 100"),
        (0.9, 100, False, "no lists"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    recall: float, count: int, lists: bool, said: str, gallery: tuple[NDArray[np.float32], Screen, NDArray[np.float32]]
) -> None:
    items, screen, queries = gallery
    with pytest.raises(InputError, match=said):
        stopping_early(screen if lists else dataclasses.replace(screen, lists=None), items, queries[:count], recall=recall, k=K)
