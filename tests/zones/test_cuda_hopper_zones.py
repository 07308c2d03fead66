"""Zones by the kernels for sm_90a, as test_cuda_hopper.py runs them: sieved from registers, and from kept scores.

What this shows: that zones, counts and picks equal the reference's in any order of warps and copies, that anchors are scored by the
instruction that scores candidates, and that planted faults are seen in these passes too. No device has run them yet.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.emulated_cuda import FAULTS, KEPT, emulate, hopper_cases, takes_hopper
from support.thorough import cases as random_cases
from support.zone_cases import Case, assert_same, zone_specs

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import reference
from dqe_engine.zones.request import ZoneRequest, validated

BAND = ZoneSpec(lo=3.0, hi=9.0, policy="softmax", temperature=2.0)
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")
SIEVED = Case(seed=3, batch=3, size=1000, tokens=1, width=136, k=9, picks=7, anchor="id", zones=BAND, half=True)
OWN_BEST = dataclasses.replace(SIEVED, anchor="best")
LONG = dataclasses.replace(SIEVED, size=4500, width=8)  # more than a list holds: limits come from rungs
SHORT_OF_ROOM = 64 * 640 * 4
"""Bytes of kept scores that hold 64 queries of 600 items."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = draw(hopper_cases())
    return dataclasses.replace(
        case,
        k=draw(st.sampled_from((0, 1, 10, case.size + 3))),
        picks=draw(st.sampled_from((0, 1, 10, case.size + 3))),
        anchor=draw(st.sampled_from(("best", "id", "score"))),
        zones=draw(zone_specs()),
    )


def served(library: ctypes.CDLL, request: ZoneRequest, **options: Any) -> bool:
    _, tokens, width = request.shards[0].shape
    zones = request.zones
    anchor = 1 if request.anchor_ids is not None else 2 if request.anchor_scores is not None else 0
    asked = {"anchor": anchor, "ranks": zones is not None and zones.bounds == "rank", "excludes": len(request.excluded) > 0}
    sizes = {"batch": request.batch, "size": sum(len(shard) for shard in request.shards), "tokens": tokens, "width": width}
    return takes_hopper(library, zones=zones is not None, **asked, **sizes, **options)


@settings(max_examples=random_cases(8, 200), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    half_queries=st.booleans(),
    multiprocessors=st.sampled_from((1, 3, 7)),
    order=st.integers(0, 100),
    kept_limit=st.sampled_from((KEPT, KEPT, SHORT_OF_ROOM, 0)),
)
@example(SIEVED, True, 1, 0, KEPT)
@example(dataclasses.replace(SIEVED, batch=300, width=8), True, 3, 1, KEPT)  # tiles of 256 queries, more than one
@example(dataclasses.replace(SIEVED, tokens=4, size=300, width=72, special=(math.nan, math.inf)), False, 3, 2, KEPT)
@example(LONG, True, 7, 3, KEPT)
@example(dataclasses.replace(LONG, anchor="score", duplicates=True), False, 3, 4, KEPT)
@example(dataclasses.replace(LONG, anchor="best"), True, 3, 5, 0)  # a pass for the best, then one for zones
@example(OWN_BEST, True, 3, 2, KEPT)
@example(dataclasses.replace(LONG, anchor="best", tokens=2, special=(math.nan, math.inf)), False, 3, 3, KEPT)
@example(dataclasses.replace(LONG, zones=RANKS, excluded=30), True, 3, 4, KEPT)
@example(dataclasses.replace(OWN_BEST, batch=200, size=600, width=8, zones=RANKS), True, 3, 5, SHORT_OF_ROOM)  # blocks below a tile
def test_zones_equal_the_reference(
    library: ctypes.CDLL, case: Case, half_queries: bool, multiprocessors: int, order: int, kept_limit: int
) -> None:
    request = case.request()
    options: dict[str, Any] = {"half_queries": half_queries, "kept_limit": kept_limit, "capability": 90}
    again = case.zones is not None and (case.zones.bounds == "rank" or case.excluded > 0)
    assert served(library, request, half_queries=half_queries, kept_limit=kept_limit) or (again and kept_limit < KEPT)
    result, _ = emulate(library, request, multiprocessors=multiprocessors, order=order, **options)
    assert_same(result, reference.select(request))


def test_what_zones_are_not_served(library: ctypes.CDLL) -> None:
    for yes in ({}, {"anchor": 1}, {"anchor": 2}, {"ranks": True}, {"excludes": True}, {"anchor": 1, "width": 640}, {"kept_limit": 0}):
        assert takes_hopper(library, zones=True, **yes), yes
    for no in (
        {"ranks": True, "kept_limit": 0}, {"excludes": True, "anchor": 1, "kept_limit": 0}, {"portable": True}, {"capability": 80},
        {"half_items": False}, {"tokens": 3}, {"anchor": 1, "half_queries": False, "width": 328},
    ):  # fmt: skip
        assert not takes_hopper(library, zones=True, **no), no


@pytest.mark.parametrize("case", [SIEVED, OWN_BEST], ids=["sieved", "kept"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: FAULTS[fault][0])
def test_faults_are_seen_in_any_order(library: ctypes.CDLL, fault: int, case: Case) -> None:
    request = dataclasses.replace(case, k=0, anchor="score" if case is SIEVED else "best").request()  # one pass alone
    expected = reference.select(request)
    for order in (0, 1, 2 + fault):
        with pytest.raises((RuntimeError, AssertionError), match=FAULTS[fault][1]):
            assert_same(emulate(library, request, half_queries=True, capability=90, order=order, hopper_fault=fault)[0], expected)


TOWARDS_ZERO = 13
"""As a fault: sums of `wgmma` are rounded towards zero, those of `mma` to the nearest."""


@pytest.mark.parametrize("half_queries", [False, True])
@pytest.mark.parametrize(("tokens", "kept"), [(1, False), (4, False), (1, True)])
def test_anchors_are_scored_by_the_instruction_that_scores_candidates(
    library: ctypes.CDLL, rng: np.random.Generator, tokens: int, kept: bool, half_queries: bool
) -> None:
    """Δ of an anchor's own item is exactly 0, whatever the instruction rounds to: neither excluded items nor other queries change it."""
    items = rng.standard_normal((500, tokens, 104)).astype(np.float16)
    queries = rng.standard_normal((140, 104)).astype(np.float32)
    ids = rng.integers(0, 500, 140)
    exclude = (ids[:, None] + 1) % 500 if kept else None
    zones = ZoneSpec(lo=0, hi=0, policy="hardest")
    request = validated(queries, items, k=0, anchor=ids, zones=zones, picks=1, counts=True, exclude=exclude)
    ours, others = (
        emulate(library, request, half_queries=half_queries, capability=capability, multiprocessors=3, hopper_fault=TOWARDS_ZERO)[0]
        for capability in (90, 80)
    )
    assert (ours.anchor_scores != others.anchor_scores).mean() > 0.2, "another rounding was meant"
    assert ours.picks is not None
    assert ours.counts is not None
    np.testing.assert_array_equal(ours.picks[:, 0], ids)
    np.testing.assert_array_equal(ours.counts[:, 1], 1)


def test_zones_of_real_vectors_are_those_of_other_devices(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    """To the bit in the emulation, where both instructions round the sum of 16 products once."""
    items = rng.standard_normal((200, 4, 72)).astype(np.float16)
    queries = rng.standard_normal((5, 72)).astype(np.float32)
    for anchor, zones in ((None, BAND), (None, RANKS), (rng.integers(0, 200, 5), BAND)):
        request = validated(queries, items, k=5, anchor=anchor, zones=zones, picks=9, counts=True, exclude=None)
        ours, others = (emulate(library, request, capability=capability)[0] for capability in (90, 80))
        assert_same(ours, others)


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_an_anchor_outside_the_items_is_refused(library: ctypes.CDLL, bad: int) -> None:
    request = dataclasses.replace(SIEVED, size=300, width=8).request()
    with pytest.raises(RuntimeError, match="fault 1"):
        emulate(library, dataclasses.replace(request, anchor_ids=np.array([0, bad, 3])), capability=90)
