"""The compiled kernel against the reference: equal to the bit where dot products are exact, whatever the tiles and threads."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.thorough import cases as random_cases
from support.zone_cases import EVERYTHING, Allowed, Case, Vectors, Way, assert_equals_reference, assert_same, zone_specs

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import cpu, reference

SIZES = (0, 1, 19, 111, 4097)
WIDTHS = (1, 3, 64, 256, 257, 768)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.sampled_from(SIZES))
    tokens = draw(st.sampled_from((1, 8, 32)))
    width = draw(st.sampled_from(WIDTHS))
    if size * tokens * width > 3_000_000:
        width = 3  # the reference would take seconds
    return Case(
        seed=draw(st.integers(0, 2**40)),
        batch=draw(st.sampled_from((0, 1, 3, 7, 40))),
        size=size,
        tokens=tokens,
        k=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        picks=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        anchor=draw(st.sampled_from(("best", "id", "score"))),
        zones=draw(st.none() | zone_specs()),
        special=draw(st.sampled_from(((), (math.nan,), (math.inf,), (-math.inf,), (math.nan, math.inf, -math.inf)))),
        half=draw(st.booleans()),
        excluded=draw(st.sampled_from((0, 2, 30))),
        duplicates=draw(st.booleans()),
        width=width,
        shards=draw(st.sampled_from((1, 3))),
        allowed=draw(
            st.sampled_from((*(((kind,) for kind in get_args(Allowed))), (), ("few", "half"), ("none", "most", "one"), ("all", "blocks")))
        ),
        vectors=draw(st.sampled_from(("integers", *get_args(Vectors)))),
    )


NOTHING = ZoneSpec(lo=1e9, hi=1e9)
EMPTIED = Case(seed=1, batch=3, size=1, tokens=8, k=1, picks=1, anchor="id", zones=EVERYTHING, excluded=30)  # all excluded
ALL = Way(sample=500, screened=True, listed=1.0, list_limit=10**9, prefixed=1.0)


@settings(max_examples=random_cases(600, 10_000), deadline=None, derandomize=True)
@given(
    case=cases(),
    way=st.builds(
        Way,
        threads=st.sampled_from((1, 2, 3)),
        block_queries=st.sampled_from((1, 2, 1024)),
        least_field=st.sampled_from((1, 50, 1024)),
        sample=st.sampled_from((0, 60, 500)),
        rescore_cost=st.sampled_from((0, None)),
        instruction_set=st.sampled_from(_kernels.instruction_sets()),
        screened=st.booleans(),
        listed=st.sampled_from((0.0, 0.5, 1.0)),
        list_limit=st.sampled_from((0, 1, 50, 10**9)),
        prefixed=st.sampled_from((0.0, 0.5, 1.0)),
    ),
)
@example(EMPTIED, Way(block_queries=2))
@example(dataclasses.replace(EMPTIED, size=4097, zones=EVERYTHING, picks=5000), dataclasses.replace(ALL, threads=2, least_field=1))
@example(dataclasses.replace(EMPTIED, size=4097, zones=NOTHING), Way(threads=2, sample=500))
@example(dataclasses.replace(EMPTIED, size=4097, batch=40, k=9, zones=None, allowed=("half",)), ALL)
@example(dataclasses.replace(EMPTIED, size=4097, batch=70, k=9, zones=None, allowed=("most",)), ALL)
@example(dataclasses.replace(EMPTIED, size=4097, half=True, batch=2, k=9, zones=None, allowed=("half",)), Way(sample=500))
def test_kernel_equals_reference(case: Case, way: Way) -> None:
    assert_equals_reference(case.request(), way)


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
