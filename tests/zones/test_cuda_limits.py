"""Candidate lists of the CUDA kernels on the emulation: limits, samples and sorting, whatever the order of the items."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from support.emulated_cuda import KEPT, Request, emulate, one_score_per_item
from support.zone_cases import RANKS, Case, assert_same

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import reference

SIZE = 50_000
TILE = np.arange(SIZE) // 128
SAMPLED = (TILE % 16 == 0) & (TILE < 24 * 16)
"""The items that the sample of a top-k list looks at, for this size and k = 10: a sixteenth of the tiles."""
ON_RUNG = TILE % 130 == 0
"""The items that the one rung of a ladder without a sample looks at: three tiles, 130 apart (the fourth is beyond)."""
PICKED = {"zones": ZoneSpec(lo=-math.inf, hi=math.inf, policy="hardest"), "picks": 10, "k": 0, "anchor": np.zeros(2, np.float32)}


@pytest.mark.parametrize(("options", "seen"), [({}, SAMPLED), (PICKED, ON_RUNG)])
@pytest.mark.parametrize(
    ("name", "most_passes"),
    [
        ("shuffled", 4),
        ("ascending", 4),
        ("descending", 4),
        ("equal", 4),
        ("few values", 4),
        ("first rung misses the best", 6),
        ("worst order for the limits", 40),
    ],
)
def test_limits_hold_whatever_the_order_of_the_items(
    library: ctypes.CDLL, name: str, most_passes: int, options: dict[str, Any], seen: np.ndarray
) -> None:
    ascending, rng = np.arange(SIZE), np.random.default_rng(0)
    scores = {
        "shuffled": rng.permutation(SIZE),
        "ascending": ascending,
        "descending": ascending[::-1].copy(),
        "equal": np.zeros(SIZE, np.int64),
        "few values": rng.integers(0, 3, SIZE),
        "first rung misses the best": np.where(seen, 0, 1),
        "worst order for the limits": np.where(seen, 0, ascending),
    }[name]
    request = one_score_per_item(scores, **options)
    result, passes = emulate(library, request, multiprocessors=2)
    assert_same(result, reference.select(request))
    assert passes <= most_passes
    if name == "worst order for the limits":
        assert passes > 4  # so the host's loop was needed, and ended


OWN_BEST = ZoneSpec(lo=-math.inf, hi=math.inf, policy="hardest")
"""Everything, so that the list of picks sees every item."""


@pytest.mark.parametrize(
    "options",
    [
        {"zones": OWN_BEST},
        {"zones": RANKS},
        {"zones": OWN_BEST, "anchor": np.zeros(2, np.float32), "exclude": np.array([[9, 7], [SIZE - 1, SIZE]]) - 1},
    ],
)
@pytest.mark.parametrize(("kept_limit", "most_passes"), [(KEPT, 2), (0, 9)])
def test_zones_that_need_another_look_take_one_pass_over_the_items(
    library: ctypes.CDLL, options: dict[str, Any], kept_limit: int, most_passes: int
) -> None:
    """A sample and one pass; without room for the scores more, with the same result."""
    request = one_score_per_item(np.random.default_rng(0).permutation(SIZE), **options, picks=10, counts=True)
    result, passes = emulate(library, request, multiprocessors=2, kept_limit=kept_limit)
    assert_same(result, reference.select(request))
    assert passes <= most_passes
    assert kept_limit or passes > 2


@pytest.mark.parametrize("zones", [OWN_BEST, RANKS])
def test_zones_are_made_again_when_the_best_was_not_known(library: ctypes.CDLL, zones: ZoneSpec) -> None:
    """The sample misses the best, and so many items pass its limit that the list overflows."""
    scores = np.where(SAMPLED, 0, np.arange(SIZE))
    request = one_score_per_item(scores, zones=zones, picks=10, counts=True, exclude=np.array([[SIZE - 1, 5]] * 2))
    result, passes = emulate(library, request, multiprocessors=2)
    assert_same(result, reference.select(request))
    assert passes > 2


def test_a_batch_is_cut_where_its_scores_do_not_fit(library: ctypes.CDLL) -> None:
    case = Case(seed=6, batch=150, size=300, tokens=1, width=8, k=4, picks=3, anchor="best", zones=RANKS, half=True, excluded=2)
    request = case.request()
    for rows, passes in ((150, 1), (149, 2), (64, 3), (63, 5)):
        result, taken = emulate(library, request, kept_limit=rows * 384 * 4)
        assert_same(result, reference.select(request))
        assert taken == passes, rows


def test_a_sample_names_the_items_that_it_found(library: ctypes.CDLL) -> None:
    """The limit is the sample's last best item, so a lower id than that item's would lose it."""
    scores = np.zeros(SIZE, np.int64)
    scores[15:128:16] = 1  # the last of each warp's 16 columns in the first tile
    request = one_score_per_item(scores, k=8)
    assert_same(emulate(library, request, multiprocessors=2)[0], reference.select(request))


def test_a_key_at_the_limit_is_drawn(library: ctypes.CDLL) -> None:
    """The limit that the rung leaves is the last pick's own key: what settles most keys without a logarithm must let it through."""
    zones = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", temperature=1.0)
    request = one_score_per_item(np.where(ON_RUNG, 40, 0), **{**PICKED, "zones": zones})
    assert_same(emulate(library, request, multiprocessors=2)[0], reference.select(request))


def test_one_query_asks_for_one_list(library: ctypes.CDLL) -> None:
    request = Request(half_items=True, batch=1, size=10**6, tokens=1, width=256, k=10**6)
    entry_bytes = 8 + 8 + 4
    assert library.emulated_workspace_bytes(ctypes.byref(request)) < 2**20 * entry_bytes + (1 << 20)


@pytest.mark.parametrize("k", [600, 4096, 4097, 9000])
@pytest.mark.parametrize("values", [2, 900, 100_000])
def test_long_lists_are_sorted(library: ctypes.CDLL, k: int, values: int) -> None:
    """Of those the best that fit shared memory, unless they are too many or too many are equal."""
    request = one_score_per_item(np.random.default_rng(1).integers(0, values, 9000), k=k)
    assert_same(emulate(library, request)[0], reference.select(request))
