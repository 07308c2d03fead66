"""What makes codes, samples and directions, against NumPy in float64."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from support.zone_cases import assert_same

from dqe_engine import _kernels
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.lists import TokenLists
from dqe_engine.zones.memory import empty_codes
from dqe_engine.zones.prefix import Prefix
from dqe_engine.zones.sampling import sampled_directions, units


@pytest.mark.parametrize(("count", "width"), [(1, 1), (3, 19), (700, 64), (5, 9000)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_codes_leave_no_more_than_is_said_and_hardly_less(count: int, width: int, scale: float, rng: np.random.Generator) -> None:
    items = (scale * rng.standard_normal((count, 3, width))).astype(np.float32)
    codes = empty_codes((count, 3, -(-width // 64) * 64))
    scales, errors, norms = (np.empty((count, 3), np.float32) for _ in range(3))
    _kernels.encode(items, codes, scales, errors, norms, 2)
    stored = (codes[..., :width].astype(np.float64) - 128) * scales[..., None].astype(np.float64)
    left, lengths = (np.linalg.norm(rows, axis=-1) for rows in (items - stored, stored))
    rounding = (width + 32) * 2.0**-24 * (np.linalg.norm(items.astype(np.float64), axis=-1) + lengths)
    assert (errors >= left + rounding).all()
    assert (errors <= 1.001 * left + 1.1 * rounding + 1e-17).all()
    assert (norms >= lengths).all()
    assert (norms <= 1.001 * lengths + 1e-30).all()
    assert (codes[..., width:] == 128).all()
    assert (np.abs(stored - items) <= 0.51 * scales[..., None]).all()


@pytest.mark.parametrize("half", [False, True])
def test_a_sample_holds_the_directions_of_tokens_that_have_one(half: bool, rng: np.random.Generator) -> None:
    items = rng.standard_normal((50, 3, 19)).astype(np.float16 if half else np.float32)
    items[3, 1], items[4, 0], items[5, 2, 7] = 0, np.nan, np.inf
    shards = [items[:20], items[20:]]
    found = sampled_directions(shards, items.size, rng, threads=2)
    expected = units(items.reshape(-1, 19).astype(np.float32))
    assert found.shape == (147, 19)
    order, other = (np.lexsort(rows.round(4).T) for rows in (found, expected))  # a sample comes in any order
    np.testing.assert_allclose(found[order], expected[other], atol=2e-6)


@pytest.mark.parametrize(("count", "width", "axes"), [(0, 5, 1), (1, 19, 3), (1500, 64, 16), (7, 100, 33)])
def test_components_along_axes(count: int, width: int, axes: int, rng: np.random.Generator) -> None:
    points, onto = (rng.standard_normal((rows, width)).astype(np.float32) for rows in (count, axes))
    along = np.full((count, axes), np.nan, np.float32)
    _kernels.project(points, onto, along, 2)
    np.testing.assert_allclose(along, points.astype(np.float64) @ onto.astype(np.float64).T, atol=1e-4)


def test_directions_of_groups(rng: np.random.Generator) -> None:
    points = rng.standard_normal((200, 70)).astype(np.float32)
    points[101] = -points[100]
    groups = rng.integers(0, 5, 200).astype(np.uint32)
    groups[100:102] = 6  # they cancel; nothing is in 5
    directions = np.full((7, 70), np.nan, np.float32)
    _kernels.mean_directions(points, groups, directions, 2)
    for group in range(5):
        total = points[groups == group].astype(np.float64).sum(0)
        np.testing.assert_allclose(directions[group], total / np.linalg.norm(total), atol=1e-6)
    assert (directions[5:] == np.eye(70)[0]).all()
    with pytest.raises(ValueError, match="group_of"):
        _kernels.mean_directions(points, groups, directions[:6].copy(), 1)


def test_lists_that_would_reach_beyond_their_memory_are_refused(rng: np.random.Generator) -> None:
    items = rng.standard_normal((4096, 8, 16)).astype(np.float32)
    lists = TokenLists.build([items], threads=1)
    assert lists is not None
    for wrong in (lists.starts[::-1].copy(), lists.starts + 1):
        with pytest.raises(ValueError, match="lists: "):
            dataclasses.replace(lists, starts=wrong).for_kernels()
    screen = Screen(Screen.build(items, lists=False, prefix=False).shards, lists)
    assert screen.for_kernels() is screen.for_kernels()
    assert lists.for_kernels() is lists.for_kernels()
    assert dataclasses.replace(lists).for_kernels() is not lists.for_kernels()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda screen: pickle.loads(pickle.dumps(screen))], ids=["copy", "pickle"])
def test_a_screen_that_has_searched_can_be_copied(copied: Callable[[Screen], Screen], rng: np.random.Generator) -> None:
    """Processes get screens by pickle; what the kernels made of one's arrays stays behind."""
    centres = rng.standard_normal((50, 1, 64))
    items = (centres[rng.integers(0, 50, 34_000)] + 0.05 * rng.standard_normal((34_000, 1, 64))).astype(np.float32)
    screen = Screen.build(items)
    assert screen.lists is not None
    assert isinstance(screen.lists.level, Prefix)
    found = select_zones(items[:1, 0].copy(), items, k=5, screen=screen)
    again = select_zones(items[:1, 0].copy(), items, k=5, screen=copied(screen))
    assert_same(again, found)
