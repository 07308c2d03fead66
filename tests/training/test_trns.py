"""Target relative negative sampling: zones against brute force, and draws that depend on epoch and row alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dqe_engine.contracts.zones import ZoneSpec
from dqe_training import trns
from dqe_training.trns import draw_negative, mine_negatives

GALLERY, QUERIES, TOKENS, WIDTH = 40, 23, 2, 8


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries, target tokens, targets and references. Values are multiples of 1/8: every inner product is exact."""
    rng = np.random.default_rng(seed)
    queries = (rng.integers(-8, 9, (QUERIES, WIDTH)) / 8).astype(np.float32)
    tokens = (rng.integers(-8, 9, (GALLERY, TOKENS, WIDTH)) / 8).astype(np.float32)
    targets, references = rng.integers(0, GALLERY, (2, QUERIES))
    references[:3] = targets[:3]
    return queries, tokens, targets, references


def brute_force_mid(row: int, zones: ZoneSpec, seed: int = 0) -> set[int]:
    """Items of the mid-zone: lo <= s(q, t) - s(q, i) <= hi, target and reference left out."""
    queries, tokens, targets, references = problem(seed)
    score = [max(sum(float(a) * float(b) for a, b in zip(queries[row], token, strict=True)) for token in item) for item in tokens]
    delta = {i: score[targets[row]] - score[i] for i in range(GALLERY) if i not in (targets[row], references[row])}
    lo, hi = zones.lo, zones.hi
    if zones.bounds == "quantile":
        ordered = sorted(delta.values())
        lo, hi = (ordered[math.floor(p * (len(ordered) - 1))] for p in (lo, hi))
    return {i for i, d in delta.items() if lo <= d <= hi}


SPECS = [
    ZoneSpec(lo=0.25, hi=1.5),
    ZoneSpec(lo=-1.0, hi=0.5, policy="hardest"),
    ZoneSpec(lo=0.1, hi=0.4, bounds="quantile", policy="uniform", seed=5),
    ZoneSpec(lo=0.0, hi=0.9, bounds="quantile", policy="softmax", temperature=0.5, seed=7),
    ZoneSpec(lo=1000, hi=2000),  # nothing is that far
]


@pytest.mark.parametrize("zones", SPECS, ids=lambda z: f"{z.bounds}-{z.policy}-{z.lo}")
@pytest.mark.parametrize("picks", [1, 4, GALLERY])
def test_picks_are_of_the_brute_force_zone(zones: ZoneSpec, picks: int) -> None:
    mined = mine_negatives(*problem(), zones, picks=picks)
    assert mined.shape == (QUERIES, picks)
    for row, found in enumerate(mined.tolist()):
        mid = brute_force_mid(row, zones)
        chosen = [i for i in found if i >= 0]
        assert len(chosen) == len(set(chosen)) == min(picks, len(mid))
        assert found == chosen + [-1] * (picks - len(chosen))
        assert set(chosen) <= mid
        if picks == GALLERY:
            assert set(chosen) == mid


def test_target_and_reference_are_never_picked() -> None:
    _, _, targets, references = problem()
    mined = mine_negatives(*problem(), ZoneSpec(lo=-1000, hi=1000), picks=GALLERY)
    assert ((mined >= 0).sum(axis=1) == GALLERY - 1 - (targets != references)).all()
    assert not (mined == targets[:, None]).any()
    assert not (mined == references[:, None]).any()


def test_blocks_do_not_change_the_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    zones = ZoneSpec(lo=0.0, hi=0.9, bounds="quantile", policy="uniform", seed=3)
    whole = mine_negatives(*problem(), zones, picks=5)
    advanced: list[int] = []
    monkeypatch.setattr(trns, "QUERY_BLOCK", 7)
    np.testing.assert_array_equal(mine_negatives(*problem(), zones, picks=5, advance=advanced.append), whole)
    assert advanced == [7, 7, 7, 2]


def test_the_seed_changes_uniform_picks() -> None:
    draws = [mine_negatives(*problem(), ZoneSpec(lo=-1000, hi=1000, seed=seed), picks=4) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).mean() > 0.5


# -- one negative a step -----------------------------------------------------------------------------------------------


def mined_sets(rows: int = 4000, picks: int = 8) -> np.ndarray:
    return np.arange(rows * picks).reshape(rows, picks)


def test_a_draw_depends_on_epoch_and_row_alone() -> None:
    mined, rows = mined_sets(), np.random.default_rng(0).permutation(4000)
    whole = draw_negative(mined, np.arange(4000), 3)
    np.testing.assert_array_equal(draw_negative(mined, rows, 3), whole[rows])
    np.testing.assert_array_equal(draw_negative(mined, rows[:17], 3), whole[rows[:17]])
    assert draw_negative(mined, np.array([42]), 3) == whole[42]
    assert (draw_negative(mined, np.arange(4000), 4) != whole).mean() > 0.8


def test_draws_are_spread_over_the_picks() -> None:
    mined = mined_sets()
    for epoch in (0, 1, 50):
        columns = draw_negative(mined, np.arange(4000), epoch) % 8
        counts = np.bincount(columns, minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees of freedom: 1 in 10,000
    over_epochs = np.stack([draw_negative(mined, np.arange(50), epoch) % 8 for epoch in range(64)])
    assert min(len(set(column)) for column in over_epochs.T.tolist()) >= 6


def test_draws_come_from_what_was_found() -> None:
    rng = np.random.default_rng(0)
    mined = mined_sets(200)
    sizes = rng.integers(0, 9, 200)
    mined[np.arange(8)[None, :] >= sizes[:, None]] = -1
    for epoch in range(5):
        drawn = draw_negative(mined, np.arange(200), epoch)
        assert (drawn[sizes == 0] == -1).all()
        for row in np.nonzero(sizes)[0]:
            assert drawn[row] in mined[row, : sizes[row]]


def test_mining_passes_the_zones_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the zones say reaches the selection, the seed included."""
    seen: list[dict[str, Any]] = []
    select = trns.select_zones
    monkeypatch.setattr(trns, "select_zones", lambda *args, **options: seen.append(options) or select(*args, **options))
    zones = ZoneSpec(lo=0.1, hi=0.2, bounds="quantile", policy="softmax", temperature=0.3, seed=11)
    mine_negatives(*problem(), zones, picks=2)
    assert [options["zones"] for options in seen] == [zones]
