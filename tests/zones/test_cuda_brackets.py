"""Zones whose bounds are ranks, on the emulation: brackets from a sample of the scores, and histograms where a bracket misses."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from support.emulated_cuda import Counts, Request, emulate, one_score_per_item
from support.zone_cases import assert_same

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import reference
from dqe_engine.zones.request import ZoneRequest

SIZE, SAMPLE = 12_000, 4096


def ranked(scores: np.ndarray, lo: float, hi: float, **options: Any) -> ZoneRequest:
    """No lists of candidates, unless they are asked for: so what is launched depends on brackets alone."""
    zones = ZoneSpec(lo=lo, hi=hi, bounds="rank", policy="hardest")
    return one_score_per_item(scores, zones=zones, **{"k": 0, "anchor": np.zeros(2, np.float32), "counts": True, **options})


def launched(library: ctypes.CDLL, request: ZoneRequest, **options: Any) -> int:
    """Kernels, of a selection that equals the reference."""
    before = Counts.of(library).launches
    assert_same(emulate(library, request, **options)[0], reference.select(request))
    return Counts.of(library).launches - before


def sampled(size: int) -> np.ndarray:
    """Positions that `sampled_place` of brackets.hpp names."""
    slots = np.arange(min(size, SAMPLE), dtype=np.uint64)
    scrambled = (slots * np.uint64(2654435761)) % np.uint64(2**32)
    return ((slots * np.uint64(size) + scrambled % np.uint64(size)) // np.uint64(len(slots))).astype(np.int64)


def orders(size: int) -> dict[str, np.ndarray]:
    ascending, rng = np.arange(size), np.random.default_rng(0)
    return {
        "shuffled": rng.permutation(size),
        "ascending": ascending,
        "descending": ascending[::-1].copy(),
        "equal": np.zeros(size, np.int64),
        "few values": rng.integers(0, 3, size),
        "a long tie": np.where(rng.permutation(size) < 0.6 * size, size // 2, ascending),
        "one in a period": np.where(ascending % 7 == 0, ascending, 0),
        "negative": -rng.permutation(size),
    }


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.0), (0.5, 0.5), (0.01, 0.3), (0.999, 1.0)])
def test_no_order_of_the_scores_makes_a_bracket_miss(library: ctypes.CDLL, lo: float, hi: float) -> None:
    counts = {name: launched(library, ranked(scores, lo, hi)) for name, scores in orders(SIZE).items()}
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("size", [1, 2, 3, 19, 4096, 4097])
def test_sizes_about_the_samples(library: ctypes.CDLL, size: int) -> None:
    for lo, hi in ((0.0, 0.0), (0.2, 0.7), (1.0, 1.0)):
        launched(library, ranked(np.random.default_rng(size).permutation(size), lo, hi, picks=3, k=2, anchor=None))


@pytest.mark.parametrize(
    "name", ["what is not sampled is better", "what is not sampled is worse", "what is not sampled is close", "one score is sampled"]
)
def test_where_a_bracket_misses_histograms_decide(library: ctypes.CDLL, name: str) -> None:
    seen = np.isin(np.arange(SIZE), sampled(SIZE))
    assert seen.sum() > 0.9 * SAMPLE
    scores = {
        "what is not sampled is better": np.where(seen, np.arange(SIZE), np.arange(SIZE) + SIZE),
        "what is not sampled is worse": np.where(seen, np.arange(SIZE) + SIZE, np.arange(SIZE)),
        "one score is sampled": np.where(seen, SIZE, np.arange(SIZE)),
        "what is not sampled is close": np.where(seen, np.arange(SIZE), int(0.7 * SIZE) + np.arange(SIZE) % 2),  # so too much is inside
    }[name]
    plain = launched(library, ranked(np.arange(SIZE), 0.3, 0.6))
    assert launched(library, ranked(scores, 0.3, 0.6)) > plain
    for exclude in (None, np.array([[5, 7], [SIZE - 1, 0]])):  # anchors are scored before what is excluded is hidden, once
        launched(library, ranked(scores, 0.3, 0.6, anchor=np.array([5, 0]), picks=9, k=3, exclude=exclude))


@pytest.mark.parametrize("strange", [(math.nan,), (math.nan, math.inf, -math.inf)])
@pytest.mark.parametrize("share", [0.01, 0.9, 1.0])
def test_scores_that_are_no_numbers(library: ctypes.CDLL, strange: tuple[float, ...], share: float) -> None:
    request, rng = ranked(np.random.default_rng(0).permutation(SIZE), 0.1, 0.6), np.random.default_rng(1)
    items = np.concatenate(request.shards)
    where = rng.permutation(SIZE)[: int(share * SIZE)]
    items[where, 0, 0] = rng.choice(strange, len(where))
    launched(library, dataclasses.replace(request, shards=(items,)))


def test_brackets_are_small_beside_the_scores(library: ctypes.CDLL) -> None:
    sizes: dict[str, Any] = {
        "half_items": True,
        "batch": 64,
        "size": 10**6,
        "tokens": 1,
        "width": 8,
        "k": 10,
        "zones": True,
        "excludes": True,
    }
    plain, ranks = (library.emulated_workspace_bytes(ctypes.byref(Request(**sizes, ranks=ranks))) for ranks in (False, True))
    assert ranks - plain < 64 * (10**6 + 2 * 2048 * 8) + 100_000
