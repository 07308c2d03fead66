"""Sweeps of the compiled kernel: samples, screens, threads, shards and bitmaps change nothing in what is selected."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.zone_cases import EVERYTHING, Allowed, Case, allowed_flags, assert_same, unit_vectors

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, cpu, reference, select_zones
from dqe_engine.zones.bitmaps import packed
from dqe_engine.zones.request import validated


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
def test_a_sample_that_misleads_costs_a_second_sweep_only(
    screened: bool, instruction_set: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """All good items sit where the sample is taken (of one thread's tiles), so that the guessed thresholds are far too high."""
    items = rng.integers(-3, 4, (6000, 4)).astype(np.float32)
    items[2600:3400] += 100
    case = Case(seed=3, batch=9, size=6000, tokens=1, k=1000, picks=5, anchor="best", zones=ZoneSpec(lo=0.1, hi=0.15, bounds="rank"))
    request = dataclasses.replace(
        case.request(), queries=np.abs(case.request().queries[:, :4]) + 1, shards=(items[:, None],), excluded=np.empty(0, np.int64)
    )
    request = dataclasses.replace(request, offsets=np.zeros(10, np.int64), screen=Screen.build(items) if screened else None)
    calls: list[int] = []
    sweep = _kernels.sweep
    monkeypatch.setattr(_kernels, "sweep", lambda *a, **options: calls.append(options["sample"]) or sweep(*a, **options))
    result = cpu.select(request, threads=1, sample=700, rescore_cost=0, instruction_set=instruction_set)
    assert calls == [700, 0]
    assert_same(result, reference.select(request))


@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
def test_estimates_above_every_score_cost_a_second_sweep_only(instruction_set: str, rng: np.random.Generator) -> None:
    """One large coordinate that no query looks at makes all codes zero: every score is estimated as 0, and is about -40."""
    items = rng.uniform(0.1, 1.1, (4096, 64)).astype(np.float32)
    items[:, 0] = 1000
    queries = np.full((8, 64), -1, np.float32)
    queries[:, 0] = 0
    zones = ZoneSpec(lo=0, hi=1)
    request = validated(
        queries, items, k=0, anchor=None, zones=zones, picks=3, counts=True, exclude=None, first_query=0, screen=Screen.build(items)
    )
    result = cpu.select(request, rescore_cost=0, least_field=50, instruction_set=instruction_set)
    expected = reference.select(request)
    np.testing.assert_allclose(result.anchor_scores, expected.anchor_scores, rtol=1e-5, atol=0)
    assert result.counts is not None
    np.testing.assert_array_equal(result.counts.sum(axis=1), 4096)


@pytest.mark.parametrize(("batch", "k"), [(5, 1200), (1, 3000), (9, 40)])
@pytest.mark.parametrize("threads", [1, 2])
def test_ties_that_were_dropped_while_sampling_are_found_again(batch: int, k: int, threads: int) -> None:
    """All scores are equal, so the guess is the score of everything: the k oldest items must win."""
    result = select_zones(np.zeros((batch, 3), np.float32), np.ones((40_000, 3), np.float32), k=k, threads=threads, backend="cpu")
    np.testing.assert_array_equal(result.ids, np.broadcast_to(np.arange(k), (batch, k)))


@pytest.mark.parametrize("screened", [False, True])
def test_copies_in_and_outside_of_the_sample_tie_by_id(screened: bool, rng: np.random.Generator) -> None:
    items = unit_vectors(rng, 60_000, 32)
    items[::300] = items[7]  # 200 copies of one image
    screen = Screen.build(items) if screened else None
    for batch in (1, 6):
        result = select_zones(np.repeat(items[7:8], batch, axis=0), items, k=50, screen=screen, backend="cpu")
        expected = np.sort(np.append(np.arange(0, 60_000, 300), 7))[:50]
        np.testing.assert_array_equal(result.ids, np.broadcast_to(expected, (batch, 50)))


def test_a_shortage_of_memory_is_a_memory_error() -> None:
    """Also where a thread meets it; in a process of its own, with a limit just above what it holds."""
    script = """
import resource, sys
import numpy as np
from dqe_engine.zones import select_zones
queries, items = np.ones((2, 1), np.float32), np.linspace(0, 1, 3_000_000, dtype=np.float32)[:, None].copy()
select_zones(queries[:, :1], items[:100_000], k=2, threads=2)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
outcomes = set()
for spare in range(60, 420, 15):
    limit = held + (spare << 20), resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, limit)
    if resource.getrlimit(resource.RLIMIT_AS) != limit:
        outcomes = {"unlimited"}
        break
    try:
        select_zones(queries, items, k=len(items), threads=2)
        outcomes.add("enough")
    except MemoryError:
        outcomes.add("short")
print(*sorted(outcomes))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if (result.returncode, result.stdout.strip()) == (0, "unlimited"):
        pytest.skip("this system ignores limits of address space, as QEMU's user mode does")
    assert (result.returncode, result.stdout.strip()) == (0, "enough short"), result.stderr


def test_a_zone_that_outgrows_its_field_is_swept_with_known_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed=0, batch=7, size=4097, tokens=1, k=3, picks=5, anchor="best", zones=ZoneSpec(lo=1, hi=8, policy="softmax"))
    calls: list[int] = []
    sweep = _kernels.sweep
    monkeypatch.setattr(_kernels, "sweep", lambda *a, **options: calls.append(options["zoning"]) or sweep(*a, **options))
    result = cpu.select(case.request(), least_field=1, sample=0)
    assert calls == [cpu.Zoning.FROM_BEST, cpu.Zoning.GIVEN]
    assert_same(result, reference.select(case.request()))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 33])
def test_screening_changes_nothing_and_reads_little(batch: int, half: bool, rng: np.random.Generator) -> None:
    items = unit_vectors(rng, 20000, 96).astype(np.float16 if half else np.float32)
    options: dict[str, Any] = {"k": 20, "picks": 4, "counts": True, "exclude": np.arange(batch)[:, None]}
    anchor = np.full(batch, 0.5, np.float32)
    request = validated(unit_vectors(rng, batch, 96), items, zones=ZoneSpec(lo=0.1, hi=0.2), anchor=anchor, **options)
    for instruction_set in _kernels.instruction_sets():
        plain = cpu.select(request, instruction_set=instruction_set)
        screened = cpu.select(dataclasses.replace(request, screen=Screen.build(items)), instruction_set=instruction_set)
        assert plain.rescored is None
        if batch <= _kernels.MAX_ROW_QUERIES:
            assert_same(screened, plain)  # to the bit: pairs are scored in the same order
        if screened.rescored is None:
            assert batch > _kernels.screened_queries(instruction_set)
            continue
        np.testing.assert_array_equal(screened.ids, plain.ids)
        np.testing.assert_array_equal(screened.picks, plain.picks)
        np.testing.assert_array_equal(screened.counts, plain.counts)
        np.testing.assert_allclose(screened.scores, plain.scores, rtol=0, atol=1e-6)
        assert 20 * batch <= screened.rescored < 0.2 * batch * len(items)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("query_scale", [1e-36, 1.0, 1e36])
def test_bounds_hold_at_any_scale(scale: float, query_scale: float, rng: np.random.Generator) -> None:
    """Denormal and overflowing products too: what the bound excludes must really be below the threshold."""
    with np.errstate(over="ignore"):
        items = unit_vectors(rng, 3000, 33) * np.float32(scale)
        items[::7] *= np.geomspace(1e-6, 1e6, len(items[::7]), dtype=np.float32)[:, None]
        queries = unit_vectors(rng, 2, 33) * np.float32(query_scale)
    request = validated(queries, items, k=40, anchor=None, zones=None, picks=0, counts=False, exclude=None)
    assert_same(cpu.select(dataclasses.replace(request, screen=Screen.build(items))), cpu.select(request))


def test_sums_that_overflow_are_never_screened_out() -> None:
    """Finite numbers whose score is NaN, because their partial sums are infinite; and large bounds times small scales."""
    items = np.ones((5000, 2), np.float32)
    items[4321] = 1e38, -1.65e38
    zones = ZoneSpec(lo=0.0, hi=1.0)
    request = validated(np.full((1, 2), 4.0, np.float32), items, k=1, anchor=None, zones=zones, picks=0, counts=True, exclude=None)
    assert_same(cpu.select(dataclasses.replace(request, screen=Screen.build(items))), cpu.select(request))
    items = -np.geomspace(1e-3, 2e-3, 5000 * 64, dtype=np.float32).reshape(5000, 64)
    request = validated(np.full((5, 64), 1e36, np.float32), items, k=5, anchor=None, zones=None, picks=0, counts=False, exclude=None)
    assert_same(cpu.select(dataclasses.replace(request, screen=Screen.build(items))), reference.select(request), scores=False)


@pytest.mark.parametrize("instruction_set", _kernels.instruction_sets())
@pytest.mark.parametrize("batch", [3, 37])
def test_threads_and_blocks_change_no_bit(instruction_set: str, batch: int, rng: np.random.Generator) -> None:
    spec = ZoneSpec(lo=0.01, hi=0.2, bounds="rank", policy="softmax")
    options: dict[str, Any] = {"k": 50, "anchor": np.arange(batch), "zones": spec, "picks": 8, "counts": True, "exclude": None}
    request = validated(unit_vectors(rng, batch, 64), unit_vectors(rng, 4097, 3, 64), **options)
    first = cpu.select(request, threads=1, instruction_set=instruction_set)
    for change in ({"threads": 2}, {"threads": 3, "sample": 0}, {"block_queries": 7}, {"kept_bytes": 0}):
        assert_same(cpu.select(request, instruction_set=instruction_set, **change), first)


def test_shards_are_one_gallery(rng: np.random.Generator) -> None:
    items = unit_vectors(rng, 4097, 8)
    options: dict[str, Any] = {
        "k": 9,
        "zones": EVERYTHING,
        "picks": 9,
        "counts": True,
        "anchor": np.array([4000, 3]),
        "exclude": [[4096], [0, 9]],
    }
    whole = select_zones(items[:2], items, **options)
    assert_same(select_zones(items[:2], [items[:1000], items[1000:1000], items[1000:]], **options), whole)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_softmax_picks_follow_their_distribution(backend: Any) -> None:
    """One pick of each of many identical queries: shares proportional to exp(score / temperature), by a chi-square test."""
    scores = np.array([0.0, 0.1, 0.2, 0.3, 0.05, 0.9], np.float32)
    spec = ZoneSpec(lo=0.5, hi=2.0, policy="softmax", temperature=0.1, seed=5)  # Δ to 0.9: all but the last are mid
    draws = 20_000
    picks = select_zones(np.ones((draws, 1), np.float32), scores[:, None].copy(), zones=spec, picks=2, backend=backend).picks
    assert picks is not None
    weights = np.exp(scores[:5] / 0.1)
    expected = weights / weights.sum()
    observed = np.bincount(picks[:, 0], minlength=5)
    statistic = ((observed - draws * expected) ** 2 / (draws * expected)).sum()
    assert statistic < 18.5  # the 0.999 quantile of chi-square with 4 degrees of freedom; the draw is fixed by the seed
    # The second is drawn from what the first left.
    second = np.bincount(picks[picks[:, 0] == 3, 1], minlength=5)
    rest = np.where(np.arange(5) == 3, 0, weights)
    expected = rest / rest.sum() * second.sum()
    assert ((second - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_of_a_batch_select_what_the_batch_does(backend: Any, rng: np.random.Generator) -> None:
    queries, items = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((7, 5), (111, 5)))
    spec = ZoneSpec(lo=0.1, hi=0.9, bounds="rank", policy="softmax")
    whole = select_zones(queries, items, zones=spec, picks=5, backend=backend)
    parts = [select_zones(queries[a : a + 3], items, zones=spec, picks=5, first_query=a, backend=backend) for a in (0, 3, 6)]
    np.testing.assert_array_equal(np.concatenate([part.picks for part in parts if part.picks is not None]), whole.picks)


@pytest.mark.parametrize("half", [False, True])
def test_real_vectors_agree_within_rounding(half: bool, rng: np.random.Generator) -> None:
    queries, items = rng.standard_normal((37, 64)), rng.standard_normal((4097, 8, 64))
    queries, items = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, items))
    request = validated(
        queries.astype(np.float32),
        items.astype(np.float16 if half else np.float32),
        k=50,
        anchor=None,
        zones=ZoneSpec(lo=0.01, hi=0.2, bounds="rank", policy="softmax"),
        picks=8,
        counts=True,
        exclude=None,
    )
    fast, slow = cpu.select(request), reference.select(request)
    for name in ("scores", "lo", "hi", "anchor_scores"):
        np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), rtol=0, atol=1e-6, err_msg=name)
    assert (fast.ids == slow.ids).mean() > 0.99  # near-ties may swap
    assert fast.counts is not None
    assert slow.counts is not None
    assert np.abs(fast.counts - slow.counts).max() <= 2
    assert fast.picks is not None
    assert slow.picks is not None
    assert (fast.picks == slow.picks).mean() > 0.99


def test_inputs_may_be_read_only_and_are_left_alone(rng: np.random.Generator) -> None:
    queries, items = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (111, 4, 8)))
    before = queries.copy(), items.copy()
    for array in (queries, items):
        array.flags.writeable = False
    select_zones(queries, items, k=5, zones=EVERYTHING, picks=2, exclude=[[1], [], [2, 2]], backend="cpu")
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(items, before[1])


BOUNDS = (
    None,
    ZoneSpec(lo=0.5, hi=30, policy="hardest"),
    ZoneSpec(lo=0.1, hi=0.4, bounds="rank", policy="hardest"),
    ZoneSpec(lo=0.1, hi=0.4, bounds="pooled", policy="hardest"),
)


@pytest.mark.parametrize("zones", BOUNDS)
@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 9, 70])
@pytest.mark.parametrize("kind", ["none", "one", "few", "half", "most", "blocks"])
def test_a_bitmap_selects_what_a_gallery_of_the_others_gone_does(
    kind: Allowed, batch: int, screened: bool, zones: ZoneSpec | None, rng: np.random.Generator
) -> None:
    """Scores, bounds and counts are the same to the bit; positions are those of the whole gallery. Real vectors."""
    items, queries = unit_vectors(rng, 3000, 4, 24), unit_vectors(rng, batch, 24)
    flags = allowed_flags(kind, rng, len(items))
    (places,) = np.nonzero(flags)
    left = items[places]
    options: dict[str, Any] = {"k": 7, "zones": zones, "picks": 5 if zones else 0, "counts": zones is not None, "backend": "cpu"}
    found = select_zones(queries, items, screen=Screen.build(items) if screened else None, allowed=packed(flags), **options)
    alone = select_zones(queries, left, **options)
    mapped = np.append(places, -1)  # padding stays what it is
    np.testing.assert_array_equal(found.ids, mapped[alone.ids])
    tolerance = {"rtol": 0, "atol": 1e-6}  # row by row or in panels, products are added in another order
    np.testing.assert_allclose(found.scores, alone.scores, **tolerance)
    if zones is not None:
        np.testing.assert_array_equal(found.picks, mapped[alone.picks])
        assert found.counts is not None
        assert alone.counts is not None
        assert found.counts.sum(axis=1).tolist() == [len(places)] * batch
        if kind != "none":
            np.testing.assert_allclose(found.hi, alone.hi, **tolerance)
            np.testing.assert_array_equal(found.counts, alone.counts)


def test_what_is_not_allowed_is_never_scored_in_full(rng: np.random.Generator) -> None:
    """All better items are not allowed; their rows are not read."""
    items = unit_vectors(rng, 4000, 64)
    queries = items[:1].copy()
    flags = np.zeros(4000, np.bool_)
    flags[np.argsort(items @ queries[0])[:100]] = True  # the worst
    found = select_zones(queries, items, k=5, screen=Screen.build(items), allowed=packed(flags), backend="cpu")
    assert found.rescored is not None
    assert found.rescored <= 100


@pytest.mark.parametrize("batch", [1, 9])
def test_an_anchor_need_not_be_allowed(batch: int, rng: np.random.Generator) -> None:
    items, queries = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((500, 16), (batch, 16)))
    options: dict[str, Any] = {"k": 3, "anchor": np.full(batch, 499), "zones": ZoneSpec(lo=0, hi=9), "counts": True}
    flags = np.arange(500) < 100
    found = select_zones(queries, items, allowed=packed(flags), backend="cpu", **options)
    assert_same(found, select_zones(queries, items, allowed=packed(flags), backend="reference", **options))
