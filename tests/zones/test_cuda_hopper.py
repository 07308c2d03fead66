"""The kernels for sm_90a on the CPU: TMA boxes, swizzle, mbarriers, wgmma's descriptors and fragments, as host_hopper.hpp emulates them.

Codes are multiplied there too; what bounds promise is tested in test_cuda_screen.py, for both architectures.

What this shows: that any order of warps and copies ends, with the reference's answer to the bit where dot products are exact, and that
each planted fault is seen. No device has run these kernels yet.
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
from support.emulated_cuda import A100, FAULTS, SMALL, emulate, hopper_cases, takes_hopper
from support.thorough import cases as random_cases
from support.zone_cases import Case, assert_same

from dqe_engine.zones import ZoneSelection, reference
from dqe_engine.zones.request import ZoneRequest, validated

TOP = Case(seed=3, batch=3, size=1000, tokens=1, width=136, k=9, picks=0, anchor="best", zones=None, half=True)
SAMPLED = dataclasses.replace(TOP, size=4500, width=8, excluded=30)  # more than a list holds: limits come from a sample
STEPS = dataclasses.replace(TOP, size=4500, width=8, k=200)  # no sample is large enough: limits come from rungs


@settings(max_examples=random_cases(15, 200), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=hopper_cases(), half_queries=st.booleans(), multiprocessors=st.sampled_from((1, 3, 7)), order=st.integers(0, 100))
@example(TOP, True, 1, 0)
@example(dataclasses.replace(TOP, batch=300), True, 3, 1)  # tiles of 256 queries
@example(SAMPLED, False, 3, 2)
@example(dataclasses.replace(SAMPLED, tokens=2, size=4200, special=(math.nan, math.inf)), True, 7, 3)
@example(dataclasses.replace(SAMPLED, duplicates=True), True, 3, 4)
@example(STEPS, False, 3, 5)
def test_kernels_equal_reference(library: ctypes.CDLL, case: Case, half_queries: bool, multiprocessors: int, order: int) -> None:
    request = case.request()
    assert takes_hopper(library, batch=case.batch, size=case.size, tokens=case.tokens, width=case.width, half_queries=half_queries)
    result, _ = emulate(library, request, half_queries=half_queries, multiprocessors=multiprocessors, order=order, capability=90)
    assert_same(result, reference.select(request))


@pytest.mark.parametrize("half_queries", [False, True])
def test_queries_that_are_not_finite(library: ctypes.CDLL, half_queries: bool) -> None:
    request = dataclasses.replace(TOP, batch=5, size=300, tokens=2, width=8).request()
    request.queries[1, 3], request.queries[2, 0], request.queries[3, 7] = math.nan, math.inf, -math.inf
    request.queries[4] = 0
    assert_same(emulate(library, request, half_queries=half_queries, capability=90)[0], reference.select(request))


def test_real_vectors_score_as_on_other_devices(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    """To the bit in the emulation, where both instructions round the sum of 16 products once."""
    request = validated(
        rng.standard_normal((20, 72)).astype(np.float32),
        rng.standard_normal((600, 4, 72)).astype(np.float16),
        k=50,
        anchor=None,
        zones=None,
        picks=0,
        counts=False,
        exclude=None,
    )
    ours, others = (emulate(library, request, capability=capability)[0] for capability in (90, 80))
    assert_same(ours, others)
    np.testing.assert_allclose(ours.scores, reference.select(request).scores, rtol=0, atol=1e-4)


def test_what_is_not_served_takes_the_other_kernels(library: ctypes.CDLL) -> None:
    for served in (
        {}, {"batch": 1}, {"batch": 1024}, {"tokens": 32}, {"tokens": 128}, {"width": 8}, {"width": 640}, {"size": (1 << 31) - 128},
        {"half_queries": False}, {"half_queries": False, "width": 320}, {"screened": True, "tokens": 64},
    ):  # fmt: skip
        assert takes_hopper(library, **served), served
    for refused in (
        {"capability": 80}, {"capability": 89}, {"capability": 100}, {"capability": 120}, {"shared_limit": A100, "width": 640},
        {"shared_limit": SMALL}, {"half_items": False}, {"portable": True}, {"screened": True},
        {"width": 100}, {"width": 648},
        {"items": (1 << 20) + 8}, {"tokens": 3}, {"tokens": 256}, {"size": 1 << 31}, {"half_queries": False, "width": 328},
    ):  # fmt: skip
        assert not takes_hopper(library, **refused), refused


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: FAULTS[fault][0])
def test_faults_are_seen_in_any_order(library: ctypes.CDLL, fault: int) -> None:
    request = TOP.request()
    expected = reference.select(request)
    for order in (0, 1, 2, 3):
        with pytest.raises((RuntimeError, AssertionError), match=FAULTS[fault][1]):
            assert_same(emulate(library, request, half_queries=True, capability=90, order=order, hopper_fault=fault)[0], expected)


CODED_FAULTS = FAULTS | {
    6: ("rows of a descriptor at another stride", "(?i)mismatch|rescored|have not arrived"),
    3: ("no swizzle", "(?i)mismatch|rescored"),
    7: ("another fragment", "(?i)mismatch|rescored"),
    11: ("numbers of other columns", "(?i)mismatch|rescored"),
    12: ("numbers given back before they are read", "(?i)under way|mismatch|rescored"),
}


def coded_request(batch: int, tokens: int) -> ZoneRequest:
    """Vectors whose lengths differ from tile to tile, so that another tile's numbers give other bounds."""
    rng = np.random.default_rng(batch)
    items = rng.standard_normal((4200, tokens, 136 // tokens)) * (1 + np.arange(4200) // 128 % 5)[:, None, None]
    queries = rng.standard_normal((batch, items.shape[2])).astype(np.float32)
    options: dict[str, Any] = {"anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    return validated(queries, items.astype(np.float16), k=10, **options)


def same_screening(ours: ZoneSelection, others: ZoneSelection) -> None:
    """Not only the results, which a pass over the items would have too: the same bounds left the same tokens."""
    assert_same(ours, others)
    assert ours.rescored == others.rescored, f"rescored {ours.rescored}, elsewhere {others.rescored}"


@pytest.mark.parametrize(("batch", "tokens", "orders"), [(3, 1, (0, 1, 2, 3)), (66, 1, (4,)), (2, 2, (5,))])
def test_codes_are_screened_as_elsewhere_in_any_order(library: ctypes.CDLL, batch: int, tokens: int, orders: tuple[int, ...]) -> None:
    request = coded_request(batch, tokens)
    others = emulate(library, request, screened=True)[0]
    assert others.rescored > 0
    for order in orders:
        same_screening(emulate(library, request, screened=True, capability=90, order=order, multiprocessors=1 + order % 3)[0], others)


@pytest.mark.parametrize("fault", CODED_FAULTS, ids=lambda fault: CODED_FAULTS[fault][0])
def test_faults_in_the_pass_over_codes_are_seen_in_any_order(library: ctypes.CDLL, fault: int) -> None:
    request = coded_request(3, 1)
    others = emulate(library, request, screened=True)[0]
    for order in (0, 1, 2):
        with pytest.raises((RuntimeError, AssertionError), match=CODED_FAULTS[fault][1]):
            same_screening(
                emulate(library, request, screened=True, capability=90, multiprocessors=1, order=order, hopper_fault=fault)[0], others
            )
