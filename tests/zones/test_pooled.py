"""Pooled zones: the definition by plain loops, what depends on the target and what does not, and the sample of large problems."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.zones import Bounds, ZoneSpec
from dqe_engine.zones import mine_negatives, pooled, resolve_pooled, select_zones
from dqe_engine.zones.bitmaps import packed, unpacked
from dqe_engine.zones.mining import MiningJob
from dqe_engine.zones.pooled import NO_DELTA

Anchor = Literal["best", "id", "score"]
FRACTIONS = (0.0, 0.002, 0.1, 0.5, 1.0)


def unit_vectors(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal(shape, np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Coordinates are small integers: scores are exact, and ties abound."""

    seed: int
    batch: int
    size: int
    tokens: int
    anchor: Anchor
    special: tuple[float, ...] = ()
    excluded: int = 2
    half: bool = False
    bitmaps: int = 0  # none, one for all queries, one for each

    def arrays(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        items = rng.integers(-3, 4, (self.size, self.tokens, 5)).astype(np.float16 if self.half else np.float32)
        for value in self.special if self.size else ():
            items[rng.integers(0, self.size, 1 + self.size // 10), rng.integers(0, self.tokens), rng.integers(0, 5)] = value
        anchors: dict[Anchor, Any] = {
            "best": None,
            "id": rng.integers(0, self.size, self.batch) if self.size else np.zeros(self.batch, np.float32),
            "score": rng.integers(-9, 30, self.batch).astype(np.float32),
        }
        flags = rng.random((self.batch, self.size) if self.bitmaps == 2 else self.size) < rng.choice((0.1, 0.8))
        return {
            "queries": rng.integers(-3, 4, (self.batch, 5)).astype(np.float32),
            "items": items,
            "anchor": anchors[self.anchor],
            "exclude": rng.integers(0, self.size, (self.batch, self.excluded)) if self.size else None,
            "allowed": packed(flags) if self.bitmaps else None,
        }


problems = st.builds(
    Problem,
    seed=st.integers(0, 2**40),
    batch=st.sampled_from((0, 1, 3, 19)),
    size=st.sampled_from((0, 1, 19, 111)),
    tokens=st.sampled_from((1, 3)),
    anchor=st.sampled_from(("best", "id", "score")),
    special=st.sampled_from(((), (math.nan,), (math.inf, -math.inf), (math.nan, math.inf))),
    excluded=st.sampled_from((0, 2, 30)),
    half=st.booleans(),
    bitmaps=st.sampled_from((0, 1, 2)),
)
fractions = st.tuples(st.sampled_from(FRACTIONS), st.sampled_from(FRACTIONS)).map(sorted)


def pool_of(queries: Any, items: Any, anchor: Any, exclude: Any, allowed: Any) -> list[float]:
    """Every Δ >= 0 that counts, ascending, by loops."""
    found = []
    for b, query in enumerate(queries.astype(np.float64)):
        with np.errstate(invalid="ignore"):
            scores = [float(np.max(item.astype(np.float64) @ query)) for item in items]  # np.max: a NaN in any token is NaN
        hidden = set() if exclude is None else set(exclude[b].tolist())
        if allowed is not None:
            hidden |= set(np.flatnonzero(~unpacked(allowed if allowed.ndim == 1 else allowed[b], len(items))).tolist())
        candidates = [i for i in range(len(items)) if i not in hidden and not math.isnan(scores[i])]
        if anchor is None:
            best = min(candidates, key=lambda i: (-scores[i], i), default=None)
            own, start = best, math.nan if best is None else scores[best]
        elif anchor.dtype == np.float32:
            own, start = None, float(anchor[b])
        else:
            own, start = int(anchor[b]), scores[anchor[b]]
        deltas = [start - scores[i] for i in candidates if i != own]
        found += [delta for delta in deltas if 0 <= delta < math.inf]
    return sorted(found)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems, fractions)
def test_bounds_are_values_of_the_pool(problem: Problem, bounds: list[float]) -> None:
    spec = ZoneSpec(lo=bounds[0], hi=bounds[1], bounds="pooled", policy="softmax", temperature=0.3, seed=9)
    arrays = problem.arrays()
    resolved = resolve_pooled(spec, **arrays)
    pool = pool_of(**arrays)
    lo, hi = (pool[math.floor(p * (len(pool) - 1))] for p in bounds) if pool else (NO_DELTA, NO_DELTA)
    expected = ZoneSpec(lo=lo if bounds[0] or not pool else 0.0, hi=hi, policy="softmax", temperature=0.3, seed=9)
    assert resolved == expected
    assert 0 <= resolved.lo <= resolved.hi
    assert parse_json(ZoneSpec, to_json(resolved), where="here") == resolved
    assert resolve_pooled(resolved, arrays["queries"], arrays["items"]) is resolved


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems, fractions)
def test_backends_select_the_same(problem: Problem, bounds: list[float]) -> None:
    spec = ZoneSpec(lo=bounds[0], hi=bounds[1], bounds="pooled")
    arrays = problem.arrays()
    operands, options = (arrays.pop("queries"), arrays.pop("items")), {"zones": spec, "picks": 4, "counts": True, "k": 3}
    fast, slow = (select_zones(*operands, **arrays, **options, backend=backend) for backend in ("cpu", "reference"))
    for field in ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores"):
        np.testing.assert_array_equal(getattr(fast, field), getattr(slow, field), err_msg=field)
    resolved = resolve_pooled(spec, *operands, **arrays)
    for found, bound in ((fast.lo, resolved.lo), (fast.hi, resolved.hi)):
        assert found is not None
        np.testing.assert_array_equal(found, np.full(len(found), bound, np.float32))


# -- the target --------------------------------------------------------------------------------------------------------

LO_HI: dict[Bounds, tuple[float, float]] = {"absolute": (0.02, 0.1), "pooled": (0.002, 0.02), "rank": (0.002, 0.02)}


def shared_picks(bounds: Bounds, seed: int) -> float:
    """Of the picks under one random target, the share that another one, which has nothing to do with it, picks too."""
    rng = np.random.default_rng(seed)
    items, queries = unit_vectors(rng, 1500, 32), unit_vectors(rng, 200, 32)
    zones = ZoneSpec(lo=LO_HI[bounds][0], hi=LO_HI[bounds][1], bounds=bounds)
    mined = (mine_negatives(queries, items, rng.integers(0, 1500, 200), zones=zones, picks=8).picks.tolist() for _ in range(2))
    pairs = [(set(one) - {-1}, set(other) - {-1}) for one, other in zip(*mined, strict=True)]
    assert sum(len(one) for one, _ in pairs) > 200 * 6  # zones that hold something
    return sum(len(one & other) for one, other in pairs) / sum(len(one) for one, _ in pairs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bounds", ["absolute", "pooled"])
def test_picks_follow_the_target(bounds: Bounds, seed: int) -> None:
    assert shared_picks(bounds, seed) <= 0.4


@pytest.mark.parametrize("seed", range(3))
def test_ranks_do_not_and_say_so(seed: int) -> None:
    """Their anchor cancels. The test above would notice a zone that does what this one does."""
    assert shared_picks("rank", seed) > 0.95
    assert "not target relative" in (ZoneSpec.__doc__ or "")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**40), fractions, st.sampled_from(("uniform", "hardest", "softmax")), st.booleans())
def test_no_pick_scores_above_its_target(seed: int, bounds: list[float], policy: Any, real: bool) -> None:
    rng = np.random.default_rng(seed)
    if real:
        queries, items = unit_vectors(rng, 23, 16), unit_vectors(rng, 111, 3, 16)
    else:
        queries, items = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((23, 5), (111, 3, 5)))
    zones = ZoneSpec(lo=bounds[0], hi=bounds[1], bounds="pooled", policy=policy)
    targets, references = rng.integers(0, 111, (2, 23))
    mined = mine_negatives(queries, items, targets, zones=zones, picks=111, exclude=references[:, None])
    picked = mined.picks >= 0
    delta = (mined.anchor_scores[:, None] - mined.pick_scores)[picked]
    assert (delta >= 0).all()
    assert (delta >= np.broadcast_to(mined.lo[:, None], picked.shape)[picked]).all()
    assert (delta <= np.broadcast_to(mined.hi[:, None], picked.shape)[picked]).all()
    assert not (mined.picks == targets[:, None]).any()
    if bounds == [0.0, 1.0]:  # everything that is not above the target
        np.testing.assert_array_equal(picked.sum(axis=1), mined.counts[:, 1])
        assert mined.counts[:, 2].sum() <= (0 if not real else 1)  # the last bit of a score is the kernel's own


# -- one pair of bounds for all ----------------------------------------------------------------------------------------


def mining_problem(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    targets, references = rng.integers(0, 300, (2, 70))
    return {
        "queries": unit_vectors(rng, 70, 24),
        "items": unit_vectors(rng, 300, 2, 24),
        "targets": targets,
        "exclude": np.stack([references, np.full(70, -1)], axis=1),
        "zones": ZoneSpec(lo=0.01, hi=0.2, bounds="pooled"),
        "picks": 5,
    }


def test_neither_blocks_nor_threads_nor_ranks_change_them() -> None:
    options = mining_problem()
    arrays = options.pop("queries"), options.pop("items"), options.pop("targets")
    whole = mine_negatives(*arrays, **options)
    assert len({(lo, hi) for lo, hi in zip(whole.lo.tolist(), whole.hi.tolist(), strict=True)}) == 1
    for change in ({"block": 1}, {"block": 7}, {"threads": 2}, {"block": 30, "threads": 3}):
        other = mine_negatives(*arrays, **options, **change)
        for name in ("lo", "hi", "picks", "counts"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name), err_msg=name)
    parts = [mine_negatives(*arrays, **options, rows=rows) for rows in (range(9), range(9, 10), range(10, 70))]
    for name in ("lo", "hi", "picks", "counts"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name), err_msg=name)
    shards = np.split(arrays[1], (10, 10, 250))
    for name in ("lo", "hi", "picks"):
        np.testing.assert_array_equal(getattr(mine_negatives(arrays[0], shards, arrays[2], **options), name), getattr(whole, name))


@pytest.mark.parametrize("size", [300, 3000])
def test_they_follow_the_scale_of_the_scores(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "PAIRS", 100_000)  # exact for the one, a sample for the other
    rng = np.random.default_rng(size)
    queries, items, targets = unit_vectors(rng, 70, 24), unit_vectors(rng, size, 2, 24), rng.integers(0, size, 70)
    spec = ZoneSpec(lo=0.01, hi=0.2, bounds="pooled")
    once, twice = (resolve_pooled(spec, queries * np.float32(scale), items, anchor=targets) for scale in (1, 2))
    assert (twice.lo, twice.hi) == (2 * once.lo, 2 * once.hi)
    assert once.hi > once.lo > 0


def test_nothing_at_or_below_the_target() -> None:
    queries, items = np.ones((3, 1), np.float32), np.arange(5, dtype=np.float32)[:, None].copy()
    zones = ZoneSpec(lo=0.0, hi=1.0, bounds="pooled")
    found = select_zones(queries, items, anchor=np.full(3, -1.0, np.float32), zones=zones, picks=2, counts=True)
    assert found.picks is not None
    assert found.counts is not None
    assert (found.picks == -1).all()
    assert found.counts.tolist() == [[5, 0, 0]] * 3
    mined = mine_negatives(queries, items, np.full(3, 4), zones=zones, picks=2)
    np.testing.assert_array_equal(mined.hi, np.full(3, 4.0))  # the target itself, at Δ = 0, does not count


def test_what_a_job_applies() -> None:
    options = mining_problem()
    job = MiningJob(**options)
    applied = job.applied_zones
    assert applied.bounds == "absolute"
    exclude = [[a] for a in options["exclude"][:, 0].tolist()]
    assert applied == resolve_pooled(options["zones"], options["queries"], options["items"], anchor=options["targets"], exclude=exclude)
    plain = ZoneSpec(lo=0.1, hi=0.2)
    assert MiningJob(**options | {"zones": plain}).applied_zones == plain


# -- the sample --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [(0, 0), (0, 9), (9, 0), (1, 1), (2000, 2000), (4_000_000, 1)])
def test_small_problems_are_taken_whole(batch: int, size: int) -> None:
    rows, positions = pooled.sample(batch, size)
    np.testing.assert_array_equal(rows, np.arange(batch))
    np.testing.assert_array_equal(positions, np.arange(size))


LARGE = [(18_000, 18_000), (1025, 4097), (3, 2_000_000), (5_000_000, 2), (1, 2**32 - 2), (10**6, 10**6)]


@pytest.mark.parametrize(("batch", "size"), LARGE)
def test_of_large_ones_a_part_all_over(batch: int, size: int) -> None:
    for chosen, total in zip(pooled.sample(batch, size), (batch, size), strict=True):
        assert chosen[0] >= 0
        assert chosen[-1] < total
        assert (np.diff(chosen) > 0).all()
        assert np.diff(chosen).max(initial=1) < 2 * (total / len(chosen)) + 1
    rows, positions = pooled.sample(batch, size)
    assert min(batch, 1024) <= len(rows)
    assert pooled.PAIRS // 2 < len(rows) * len(positions) <= pooled.PAIRS


@pytest.mark.parametrize("period", [2, 3, 4, 8, 64])
def test_the_sample_is_blind_to_a_period_of_the_order(period: int) -> None:
    """A catalogue often comes in the order of its variants: even steps would meet one of them alone."""
    _, positions = pooled.sample(1024, 4096 * period)
    assert len(positions) == 4096
    counts = np.bincount(positions % period, minlength=period)
    expected = 4096 / period
    assert ((counts - expected) ** 2 / expected).sum() < period + 6 * math.sqrt(2 * period)


def test_the_sample_says_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "PAIRS", 200_000)
    monkeypatch.setattr(pooled, "LEAST_QUERIES", 200)
    rng = np.random.default_rng(1)
    items, targets = unit_vectors(rng, 3000, 24), rng.integers(0, 3000, 1500)
    queries = items[targets] + unit_vectors(rng, 1500, 24)  # targets rank well, as after training
    spec = ZoneSpec(lo=0.01, hi=0.1, bounds="pooled")
    found = resolve_pooled(spec, queries, items, anchor=targets)
    scores = queries @ items.T
    delta = scores[np.arange(1500), targets][:, None] - scores
    delta[np.arange(1500), targets] = np.nan
    pool = delta[delta >= 0]
    for fraction, bound in ((0.01, found.lo), (0.1, found.hi)):
        assert (pool < bound).mean() == pytest.approx(fraction, rel=0.25)
    monkeypatch.setattr(pooled, "PAIRS", 1500 * 3000)
    exact = resolve_pooled(spec, queries, items, anchor=targets)
    assert exact != found  # or the comparison above would hold the whole against the whole
    assert (pool < exact.lo).mean() == pytest.approx(0.01, abs=1e-5)
