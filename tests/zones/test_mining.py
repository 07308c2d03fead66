"""Mining: the picks against brute force and the reference, whatever the blocks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from support.mining_workers import GALLERY, PICKS, QUERIES, assert_same, mine, problem

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import Screen, cpu, mining
from dqe_engine.zones.mining import ARRAYS, MiningJob, summarise

# -- what is picked ----------------------------------------------------------------------------------------------------


def brute_force(row: int, zones: ZoneSpec) -> tuple[dict[int, float], float, float, float]:
    """Δ of every candidate (target and reference left out), lo, hi and the target's score."""
    inputs = problem()
    target, reference = inputs["targets"][row], inputs["exclude"][row, 0]
    score = [
        max(sum(float(a) * float(b) for a, b in zip(inputs["queries"][row], token, strict=True)) for token in item)
        for item in inputs["items"]
    ]
    delta = {i: score[target] - score[i] for i in range(GALLERY) if i not in (target, reference)}
    lo, hi = zones.lo, zones.hi
    if zones.bounds == "rank":
        ordered = sorted(delta.values())
        lo, hi = (ordered[math.floor(p * (len(ordered) - 1))] for p in (lo, hi))
    return delta, lo, hi, score[target]


SPECS = [
    ZoneSpec(lo=0.25, hi=1.5),
    ZoneSpec(lo=-1.0, hi=0.5, policy="hardest"),
    ZoneSpec(lo=0.1, hi=0.4, bounds="rank", policy="uniform", seed=5),
    ZoneSpec(lo=0.0, hi=0.9, bounds="rank", policy="softmax", temperature=0.5, seed=7),
    ZoneSpec(lo=1000, hi=2000),  # nothing is that far
]


@pytest.mark.parametrize("zones", SPECS, ids=lambda z: f"{z.bounds}-{z.policy}-{z.lo}")
@pytest.mark.parametrize("picks", [1, 4, GALLERY])
def test_mined_equals_brute_force(zones: ZoneSpec, picks: int) -> None:
    mined = mine(zones=zones, picks=picks)
    assert mined.picks.shape == (QUERIES, picks)
    for row, found in enumerate(mined.picks.tolist()):
        delta, lo, hi, anchor = brute_force(row, zones)
        mid = {i for i, d in delta.items() if lo <= d <= hi}
        chosen = [i for i in found if i >= 0]
        assert len(chosen) == len(set(chosen)) == min(picks, len(mid))
        assert found == chosen + [-1] * (picks - len(chosen))
        assert set(chosen) <= mid
        assert (mined.lo[row], mined.hi[row], mined.anchor_scores[row]) == (lo, hi, anchor)
        assert mined.counts[row].tolist() == [sum(d < lo for d in delta.values()), len(mid), sum(d > hi for d in delta.values())]
        assert [anchor - s for s in mined.pick_scores[row, : len(chosen)]] == [delta[i] for i in chosen]
        assert (mined.pick_scores[row, len(chosen) :] == -math.inf).all()
        if zones.policy == "hardest":
            assert chosen == sorted(mid, key=lambda i: (delta[i], i))[:picks]


@pytest.mark.parametrize("zones", SPECS, ids=lambda z: f"{z.bounds}-{z.policy}-{z.lo}")
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_neither_blocks_nor_shards_nor_threads_change_anything(zones: ZoneSpec, shards: int) -> None:
    expected = mine(zones=zones, backend="reference")
    assert expected.backend == "reference"
    items = problem()["items"]
    cuts = np.array_split(items, shards) if shards < 5 else [items[:0], items[:1], items[1:1], items[1:30], items[30:]]
    for block in (1, 7, 1000):
        for threads in (0, 1, 2):
            assert_same(mine(zones=zones, items=cuts, block=block, threads=threads), expected)


@pytest.mark.parametrize("zones", SPECS, ids=lambda z: f"{z.bounds}-{z.policy}-{z.lo}")
def test_rows_are_mined_as_among_all(zones: ZoneSpec) -> None:
    """What ranks of a training share out: each its own rows, with the draws of the whole."""
    expected = mine(zones=zones)
    for cuts in ([0, QUERIES], [0, 1, 8, 8, QUERIES]):
        parts = [mine(zones=zones, rows=range(start, stop), block=5) for start, stop in itertools.pairwise(cuts)]
        assert [len(part.picks) for part in parts] == [stop - start for start, stop in itertools.pairwise(cuts)]
        for name in ARRAYS:
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("rows", [range(-1, 2), range(QUERIES + 1), range(5, 3), range(0, 6, 2)])
def test_rows_that_are_not_there(rows: range) -> None:
    with pytest.raises(InputError, match=r"rows=range.*: expected consecutive rows of the \d+ queries"):
        mine(rows=rows)


def test_half_precision_items() -> None:
    assert_same(mine(items=problem()["items"].astype(np.float16)), mine())  # eighths are exact there


def test_the_gallery_may_be_plain_vectors() -> None:
    items = problem()["items"][:, :1]
    assert_same(mine(items=np.ascontiguousarray(items[:, 0])), mine(items=np.ascontiguousarray(items)))


def test_scores_as_targets() -> None:
    """The same Δ from scores; but then the target is a candidate like any other."""
    by_id = mine(zones=ZoneSpec(lo=0.125, hi=1.0), picks=GALLERY)
    by_score = mine(zones=ZoneSpec(lo=0.125, hi=1.0), picks=GALLERY, targets=by_id.anchor_scores)
    np.testing.assert_array_equal(np.sort(by_score.picks), np.sort(by_id.picks))  # the target, at Δ = 0, is near
    excluded_anyway = problem()["targets"] == problem()["exclude"][:, 0]
    np.testing.assert_array_equal(by_score.counts - by_id.counts, np.outer(~excluded_anyway, [1, 0, 0]))


def test_exclusions_are_padded() -> None:
    everything = ZoneSpec(lo=-1000, hi=1000)
    exclude = np.full((QUERIES, 4), -1)
    exclude[2] = [5, 5, -1, 6]
    exclude[5] = [0, 1, 2, 3]
    mined = mine(zones=everything, picks=GALLERY, exclude=exclude)
    targets = problem()["targets"]
    for row, found in enumerate(mined.picks.tolist()):
        assert set(found) - {-1} == set(range(GALLERY)) - {targets[row], *exclude[row].tolist()}
    alone = mine(zones=everything, picks=GALLERY, exclude=None)
    assert ((alone.picks >= 0).sum(axis=1) == GALLERY - 1).all()
    by_score = mine(zones=everything, picks=GALLERY, exclude=None, targets=alone.anchor_scores)
    assert (by_score.picks >= 0).all()


def test_without_queries_or_items() -> None:
    nobody = {"queries": np.zeros((0, 8), np.float32), "targets": np.zeros(0, np.int64), "exclude": np.zeros((0, 1), np.int64)}
    mined = mine(**nobody)
    assert mined.picks.shape == (0, PICKS)
    assert summarise(mined).quantiles == {}
    nothing = mine(items=np.zeros((0, 2, 8), np.float32), targets=np.zeros(QUERIES, np.float32), exclude=None)
    assert (nothing.picks == -1).all()
    assert not nothing.counts.any()
    assert summarise(nothing).empty == QUERIES


def test_a_query_without_scores_gets_no_picks() -> None:
    queries = problem()["queries"]
    queries[4, 0] = np.nan
    mined = mine(queries=queries)
    assert (mined.picks[4] == -1).all()
    assert not mined.counts[4].any()
    assert (mined.picks[5] >= 0).all()


def test_the_seed_changes_uniform_picks() -> None:
    draws = [mine(zones=ZoneSpec(lo=-1000, hi=1000, seed=seed)).picks for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).mean() > 0.5


def test_progress_is_told_after_every_block() -> None:
    told: list[tuple[int, int]] = []
    mine(block=7, progress=lambda *event: told.append(event))
    assert told == [(7, 23), (14, 23), (21, 23), (23, 23)]


def test_the_zones_reach_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    select = mining.select_zones
    monkeypatch.setattr(mining, "select_zones", lambda *args, **options: seen.append(options) or select(*args, **options))
    zones = ZoneSpec(lo=0.1, hi=0.2, bounds="rank", policy="softmax", temperature=0.3, seed=11)
    mine(zones=zones, block=10, threads=2)
    blocks = [options for options in seen if "first_query" in options]
    assert [options["first_query"] for options in blocks] == [0, 10, 20]
    for options in blocks:
        assert options["zones"] == zones
        assert options["threads"] == 2


def test_a_screen_is_built_once_and_changes_no_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mine(block=10)
    built: list[Screen] = []
    pays = cpu.screening_pays
    monkeypatch.setattr(cpu, "screening_pays", lambda field, shards, **options: pays(field, shards, rescore_cost=1))
    build = Screen.build
    monkeypatch.setattr(mining, "LEAST_SCREENED_QUERIES", 1)
    monkeypatch.setattr(mining, "screens_panels", lambda: True)
    monkeypatch.setattr(mining.Screen, "build", lambda *args, **options: built.append(build(*args, **options)) or built[-1])
    screened = mine(block=10)
    assert len(built) == 1
    assert built[0].nbytes > 0
    for name in mining.ARRAYS:
        np.testing.assert_array_equal(getattr(screened, name), getattr(plain, name), err_msg=name)
    monkeypatch.setattr(mining, "SCREEN_BYTES", 10)
    mine(block=10)
    assert len(built) == 1


def test_no_screen_is_built_that_selection_would_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[None] = []
    monkeypatch.setattr(mining, "LEAST_SCREENED_QUERIES", 1)
    monkeypatch.setattr(mining, "screens_panels", lambda: True)
    monkeypatch.setattr(mining.Screen, "build", lambda *args, **options: built.append(None))
    wide, margins = ZoneSpec(lo=0.1, hi=0.9, bounds="rank"), ZoneSpec(lo=0.0, hi=0.2)
    assert MiningJob(**problem(), zones=wide, picks=PICKS).screen is None
    assert not built
    assert MiningJob(**problem(), zones=margins, picks=PICKS).screen is None  # what the patched `build` returns
    assert built


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"picks": 0}, "picks=0: expected 1 or more"),
        ({"block": 0}, "block=0: expected 1 or more"),
        ({"items": []}, "no shards"),
        ({"items": np.zeros((5, 2, 9), np.float32)}, "D=8 .* D=9"),
        ({"queries": problem()["queries"].astype(float)}, "queries: dtype float64, expected float32"),
        ({"targets": np.zeros(22, np.int64)}, "targets: 22 entries, expected 23, one for each query"),
        ({"targets": np.zeros(23, np.int32)}, "targets: int32 of shape"),
        (
            {"targets": np.full(23, GALLERY)},
            r"targets: 23 of 23 ids are not positions in the gallery \(0 to 39\); the first is 40, in row 0",
        ),
        ({"targets": np.full(23, -1)}, "the first is -1"),
        ({"exclude": np.zeros((22, 1), np.int64)}, "exclude: 22 entries, expected 23, one for each query"),
        ({"exclude": np.zeros(23, np.int64)}, r"expected int64 \(T, E\)"),
        ({"exclude": np.full((23, 2), -2)}, "0 to 39, or -1 for none"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mine(**changed)


def test_the_summary() -> None:
    mined = mine(zones=ZoneSpec(lo=0.25, hi=1.5), picks=GALLERY)
    summary = summarise(mined)
    sizes = mined.counts[:, 1]
    assert (summary.queries, summary.full, summary.empty) == (QUERIES, 0, int((sizes == 0).sum()))
    assert summary.quantiles["mid"][0] == sizes.min()
    assert summary.quantiles["mid"][3] == np.sort(sizes)[QUERIES // 2]
    assert summary.quantiles["mid"][-1] == summary.quantiles["picks"][-1] == sizes.max()
    assert 0.25 <= summary.quantiles["Δ of picks"][0] <= summary.quantiles["Δ of picks"][-1] <= 1.5
    nothing = summarise(mine(zones=ZoneSpec(lo=1000, hi=2000)))
    assert (nothing.full, nothing.empty) == (0, QUERIES)
    assert "Δ of picks" not in nothing.quantiles
