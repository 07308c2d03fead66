"""The compiled kernel against the reference: equal to the bit where dot products are exact, whatever the tiles and threads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dqe_engine import _kernels
from dqe_engine.contracts.zones import Policy, ZoneSpec
from dqe_engine.zones import Screen, ZoneSelection, cpu, reference, select_zones
from dqe_engine.zones.request import ZoneRequest, validated

SIZES = (0, 1, 19, 111, 4097)
Anchor = Literal["best", "id", "score"]


def assert_same(a: ZoneSelection, b: ZoneSelection) -> None:
    for field in dataclasses.fields(ZoneSelection):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("backend", "rescored"):
            continue
        assert (x is None) == (y is None), field.name
        if x is not None:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request whose dot products are exact in float32: coordinates are small integers, so ties abound."""

    seed: int
    batch: int
    size: int
    tokens: int
    k: int
    picks: int
    anchor: Anchor
    zones: ZoneSpec | None
    special: tuple[float, ...] = ()
    half: bool = False
    excluded: int = 0
    duplicates: bool = False

    def request(self) -> ZoneRequest:
        rng = np.random.default_rng(self.seed)
        queries = rng.integers(-3, 4, (self.batch, 5)).astype(np.float32)
        items = rng.integers(-3, 4, (self.size, self.tokens, 5)).astype(np.float16 if self.half else np.float32)
        if self.duplicates:
            items[:] = items[:1]
        for value in self.special if self.size else ():  # one coordinate of one token of some items
            where = rng.integers(0, self.size, 1 + self.size // 10)
            items[where, rng.integers(0, self.tokens), rng.integers(0, 5)] = value
        queries[: self.batch // 3] = 0.0
        anchors: dict[Anchor, Any] = {
            "best": None,
            "id": rng.integers(0, max(self.size, 1), self.batch) if self.size else None,
            "score": rng.integers(-9, 30, self.batch).astype(np.float32),
        }
        return validated(
            queries,
            items,
            k=self.k,
            anchor=anchors[self.anchor] if self.zones else None,
            zones=self.zones,
            picks=self.picks if self.zones else 0,
            counts=self.zones is not None,
            exclude=rng.integers(0, self.size, (self.batch, self.excluded)) if self.size else None,
            first_query=self.seed,
        )


@st.composite
def zone_specs(draw: st.DrawFn) -> ZoneSpec:
    bounds: Literal["absolute", "quantile"] = draw(st.sampled_from(("absolute", "quantile")))
    choices = (0.0, 0.1, 0.5, 1.0) if bounds == "quantile" else (-math.inf, -50.0, -1.0, 0.0, 2.0, 7.0, 1e6, math.inf)
    lo, hi = sorted((draw(st.sampled_from(choices)), draw(st.sampled_from(choices))))
    policy: Policy = draw(st.sampled_from(("hardest", "uniform", "softmax")))
    return ZoneSpec(lo=lo, hi=hi, bounds=bounds, policy=policy, seed=draw(st.sampled_from((0, 2**63 + 5))), temperature=0.7)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.sampled_from(SIZES))
    return Case(
        seed=draw(st.integers(0, 2**40)),
        batch=draw(st.sampled_from((0, 1, 3, 7, 40))),
        size=size,
        tokens=draw(st.sampled_from((1, 8))),
        k=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        picks=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        anchor=draw(st.sampled_from(("best", "id", "score"))),
        zones=draw(st.none() | zone_specs()),
        special=draw(st.sampled_from(((), (math.nan,), (math.inf,), (-math.inf,), (math.nan, math.inf, -math.inf)))),
        half=draw(st.booleans()),
        excluded=draw(st.sampled_from((0, 2, 30))),
        duplicates=draw(st.booleans()),
    )


EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax")
NOTHING = ZoneSpec(lo=1e9, hi=1e9)
EMPTIED = Case(seed=1, batch=3, size=1, tokens=8, k=1, picks=1, anchor="id", zones=EVERYTHING, excluded=30)  # all excluded


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    case=cases(),
    threads=st.sampled_from((1, 2, 3)),
    block_queries=st.sampled_from((1, 2, 1024)),
    least_field=st.sampled_from((1, 50, 1024)),
    instruction_set=st.sampled_from(_kernels.instruction_sets()),
    screened=st.booleans(),
)
@example(EMPTIED, 1, 2, 1024, "", False)
@example(dataclasses.replace(EMPTIED, size=4097, zones=EVERYTHING, picks=5000), 2, 1024, 1, "", True)
@example(dataclasses.replace(EMPTIED, size=4097, zones=NOTHING), 2, 1024, 1024, "", False)
def test_kernel_equals_reference(
    case: Case, threads: int, block_queries: int, least_field: int, instruction_set: str, screened: bool
) -> None:
    request = case.request()
    if screened:
        request = dataclasses.replace(request, screen=Screen.build(request.shards))
    result = cpu.select(
        request, threads=threads, block_queries=block_queries, least_field=least_field, instruction_set=instruction_set
    )
    assert_same(result, reference.select(request))


@pytest.mark.parametrize("field", ["scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores"])
def test_the_comparison_notices_every_field(field: str) -> None:
    case = Case(seed=1, batch=2, size=19, tokens=1, k=3, picks=3, anchor="best", zones=EVERYTHING)
    result = reference.select(case.request())
    damaged = getattr(result, field).copy()
    damaged.flat[-1] = 77
    with pytest.raises(AssertionError, match=field):
        assert_same(result, dataclasses.replace(result, **{field: damaged}))


def test_the_seed_and_the_row_decide_the_picks() -> None:
    case = Case(seed=0, batch=1, size=4097, tokens=1, k=0, picks=10, anchor="best", zones=EVERYTHING)
    picks = {
        tuple(cpu.select(dataclasses.replace(request, zones=dataclass_seed)).picks.ravel().tolist())  # type: ignore[union-attr]
        for request in (case.request(), dataclasses.replace(case.request(), first_query=1))
        for dataclass_seed in (EVERYTHING, ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", seed=1))
    }
    assert len(picks) == 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_of_a_batch_select_what_the_batch_does(backend: Any, rng: np.random.Generator) -> None:
    queries, items = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((7, 5), (111, 5)))
    spec = ZoneSpec(lo=0.1, hi=0.9, bounds="quantile", policy="softmax")
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
        zones=ZoneSpec(lo=0.01, hi=0.2, bounds="quantile", policy="softmax"),
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
