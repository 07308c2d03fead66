"""The CUDA kernels' own sources, compiled as plain C++ and run on the CPU by an emulation of the execution model.

What this shows: layouts, indexing, barriers, selection logic and the arithmetic, equal to the reference to the bit where dot
products are exact, whatever the order of threads and blocks. What it cannot show: that a GPU runs them, and how fast.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.emulated_cuda import A100, H200, KEPT, SMALL, emulate
from support.thorough import THOROUGH
from support.thorough import cases as random_cases
from support.zone_cases import EVERYTHING, RANKS, Anchor, Case, assert_same, zone_specs

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import reference
from dqe_engine.zones.request import validated


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.sampled_from((1, 1, 8, 32, 33, 200)))
    size = draw(st.sampled_from((0, 1, 19, 111) if tokens > 8 else (0, 1, 19, 111, 900)))
    return Case(
        seed=draw(st.integers(0, 2**40)),
        batch=draw(st.sampled_from((0, 1, 3, 16, 17, 65))),
        size=size,
        tokens=tokens,
        width=draw(st.sampled_from((1, 3, 8, 64, 72))),
        k=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        picks=draw(st.sampled_from((0, 1, 10, size, size + 3))),
        anchor=draw(st.sampled_from(("best", "id", "score"))),
        zones=draw(st.none() | zone_specs()),
        special=draw(st.sampled_from(((), (math.nan,), (math.inf,), (-math.inf,), (math.nan, math.inf, -math.inf)))),
        half=draw(st.booleans()),
        excluded=draw(st.sampled_from((0, 2, 30))),
        duplicates=draw(st.booleans()),
    )


NOTHING = ZoneSpec(lo=1e9, hi=1e9)
EMPTIED = Case(
    seed=1, batch=3, size=1, tokens=8, width=5, k=1, picks=1, anchor="id", zones=EVERYTHING, half=True, excluded=30
)  # all excluded
LONG = Case(seed=3, batch=3, size=4097, tokens=1, width=8, k=10, picks=10, anchor="best", zones=EVERYTHING, half=True, excluded=30)


@pytest.mark.slow
@settings(max_examples=random_cases(100, 400), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    half_queries=st.booleans(),
    shared_limit=st.sampled_from((H200, A100, SMALL)),
    multiprocessors=st.sampled_from((1, 3, 7)),
    order=st.integers(0, 100),
    kept_limit=st.sampled_from((KEPT, 0)),
    screened=st.booleans(),
)
@example(EMPTIED, False, H200, 3, 0, 0, False)
@example(LONG, False, A100, 3, 1, 0, False)
@example(LONG, False, A100, 3, 1, KEPT, True)
@example(dataclasses.replace(LONG, anchor="id", zones=RANKS), False, H200, 7, 2, 0, False)
@example(dataclasses.replace(LONG, anchor="id", zones=RANKS), False, H200, 7, 2, KEPT, False)
@example(dataclasses.replace(LONG, duplicates=True, zones=NOTHING), True, H200, 7, 3, KEPT, False)
@example(dataclasses.replace(LONG, duplicates=True, k=4097, picks=5000), True, SMALL, 7, 3, KEPT, False)
@example(dataclasses.replace(LONG, zones=None), True, SMALL, 7, 3, KEPT, True)
def test_kernels_equal_reference(
    library: ctypes.CDLL,
    case: Case,
    half_queries: bool,
    shared_limit: int,
    multiprocessors: int,
    order: int,
    kept_limit: int,
    screened: bool,
) -> None:
    request = case.request()
    where: dict[str, Any] = {"shared_limit": shared_limit, "multiprocessors": multiprocessors, "order": order, "kept_limit": kept_limit}
    result, _ = emulate(library, request, half_queries=half_queries, screened=screened, **where)
    assert_same(result, reference.select(request))


WIDTHS, HALVES, LIMITS = (1, 3, 20, 64, 102, 256, 257, 768, 1024), ((True, False), (True, True), (False, False)), (H200, A100, SMALL)


@pytest.mark.parametrize(
    ("width", "half", "half_queries", "shared_limit"),
    [
        (width, *HALVES[j], LIMITS[k])
        for (i, width), j, k in itertools.product(enumerate(WIDTHS), range(3), range(3))
        if THOROUGH or k == (i + j) % 3  # every pair of values is there
    ],
)
def test_widths(library: ctypes.CDLL, width: int, half: bool, half_queries: bool, shared_limit: int) -> None:
    case = Case(seed=width, batch=20, size=150, tokens=2, width=width, k=7, picks=5, anchor="id", zones=RANKS, half=half)
    request = case.request()
    result, _ = emulate(library, request, half_queries=half_queries, shared_limit=shared_limit)
    assert_same(result, reference.select(request))


@pytest.mark.parametrize("half", [True, False])
def test_more_queries_than_a_block_takes(library: ctypes.CDLL, half: bool) -> None:
    case = Case(seed=5, batch=1100, size=19, tokens=3, width=8, k=4, picks=3, anchor="best", zones=RANKS, half=half, excluded=2)
    result, _ = emulate(library, case.request())
    assert_same(result, reference.select(case.request()))


BAND = ZoneSpec(lo=3.0, hi=9.0, policy="softmax", temperature=2.0)


ASKED: tuple[tuple[ZoneSpec | None, Anchor], ...] = ((None, "best"), (BAND, "best"), (BAND, "score"))
SPECIALS: tuple[tuple[float, ...], ...] = ((), (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(
    ("tokens", "batch", "special", "zones", "anchor"),
    [
        (tokens, (3, 20)[b], SPECIALS[s], *ASKED[j])
        for (i, tokens), b, s, j in itertools.product(enumerate((1, 2, 4, 8, 16, 32)), range(2), range(2), range(3))
        if THOROUGH or tokens == 2 or (b, s) == ((i + j) % 2, (i // 2 + j) % 2)  # all where a sample sets limits; else every pair of values
    ],
)
def test_what_is_sieved_from_registers(
    library: ctypes.CDLL, tokens: int, batch: int, special: tuple[float, ...], zones: ZoneSpec | None, anchor: Anchor
) -> None:
    """Both query tiles, every number of tokens that fits a warp's columns; more items than a list holds (a sample) and fewer."""
    for size, excluded in ((4500 if tokens == 2 else 300, 0), (300, 40)):
        case = Case(
            *(tokens, batch, size, tokens), width=8, k=9, picks=7, anchor=anchor, zones=zones, special=special, half=True, excluded=excluded
        )
        request = case.request()
        for half_queries in (False, True):
            result, _ = emulate(library, request, half_queries=half_queries, multiprocessors=2, order=tokens)
            assert_same(result, reference.select(request))


def test_real_vectors_agree_within_rounding(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    queries, items = rng.standard_normal((20, 72)), rng.standard_normal((600, 4, 72))
    queries, items = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, items))
    scales = np.logspace(-30, 30, 20)[:, None]  # far outside float16
    request = validated(
        (queries * scales).astype(np.float32),
        items.astype(np.float16),
        k=50,
        anchor=None,
        zones=ZoneSpec(lo=0.01, hi=0.2, bounds="rank", policy="hardest"),
        picks=8,
        counts=True,
        exclude=None,
    )
    (fast, _), slow = emulate(library, request), reference.select(request)
    for name in ("scores", "pick_scores"):
        np.testing.assert_allclose(getattr(fast, name) / scales, getattr(slow, name) / scales, rtol=0, atol=5e-7, err_msg=name)
    for name in ("lo", "hi", "anchor_scores"):
        np.testing.assert_allclose(getattr(fast, name) / scales[:, 0], getattr(slow, name) / scales[:, 0], rtol=0, atol=1e-6, err_msg=name)
    assert (fast.ids == slow.ids).mean() > 0.99  # near-ties may swap
    assert fast.picks is not None
    assert slow.picks is not None
    assert (fast.picks == slow.picks).mean() > 0.98


@pytest.mark.parametrize("half", [True, False])
def test_queries_that_are_not_finite(library: ctypes.CDLL, half: bool) -> None:
    request = Case(seed=2, batch=6, size=300, tokens=2, width=8, k=20, picks=0, anchor="best", zones=None, half=half).request()
    request.queries[1, 3], request.queries[2, 0], request.queries[3, 7] = math.nan, math.inf, -math.inf
    request.queries[4] = 0
    request.queries[4, 0] = 3e38  # alone: overflow then does not depend on the order of additions
    request.queries[5] = 1e-45
    result, _ = emulate(library, request)
    assert_same(result, reference.select(request))


def test_an_anchor_scores_what_its_item_scores(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Δ of the anchor's own item is exactly 0, also where dot products are rounded."""
    items = rng.standard_normal((500, 3, 100)).astype(np.float16)
    ids = rng.integers(0, 500, 70)
    request = validated(
        rng.standard_normal((70, 100)).astype(np.float32),
        items,
        k=0,
        anchor=ids,
        zones=ZoneSpec(lo=0, hi=0, policy="hardest"),
        picks=1,
        counts=True,
        exclude=None,
    )
    result, _ = emulate(library, request, multiprocessors=5)
    assert result.picks is not None
    np.testing.assert_array_equal(result.picks[:, 0], ids)


@pytest.mark.parametrize("bad", [-1, 19, 2**40])
def test_an_anchor_outside_the_items_is_refused(library: ctypes.CDLL, bad: int) -> None:
    request = Case(seed=2, batch=3, size=19, tokens=1, width=8, k=1, picks=1, anchor="id", zones=EVERYTHING, half=True).request()
    with pytest.raises(RuntimeError, match="fault 1"):
        emulate(library, dataclasses.replace(request, anchor_ids=np.array([0, bad, 3])))


def test_every_float16_converts_as_numpy_does(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[~np.isnan(halves)]
    values = np.concatenate(
        [halves, np.nextafter(halves, np.float32(np.inf)), [np.nan], rng.standard_normal(10_000).astype(np.float32) * 1e-5]
    )
    values = np.concatenate([values, [65519.996, 65520.0, 2.0**-25, 1.0000001 * 2.0**-25]]).astype(np.float32)
    bits, back = np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    library.emulated_halves(*(ctypes.c_void_p(a.ctypes.data) for a in (values, bits, back)), ctypes.c_int64(len(values)))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(back, expected.astype(np.float32))
    signed = ~np.isnan(values)
    np.testing.assert_array_equal(bits[signed], expected.view(np.uint16)[signed])


# The tests of the test: each fault must be seen.


FAULTS = (
    "",
    "before it is written",
    "others never come",
    "divergence",
    "before it is written",  # no barrier: the first thread meets an unwritten word
    "bad address",
    "race",
    "others never come",
    "copy to it is under way",
    "bad",
    "before it is written",
)


@pytest.mark.parametrize(("fault", "message"), list(enumerate(FAULTS)))
def test_the_emulation_catches_faults(library: ctypes.CDLL, fault: int, message: str) -> None:
    text = ctypes.create_string_buffer(200)
    error = library.emulated_fault(fault, text, len(text))
    assert (error != 0) == (fault != 0), text.value
    assert message in text.value.decode()


@pytest.mark.parametrize("half_queries", [False, True])
def test_a_wrong_lane_mapping_is_noticed(library: ctypes.CDLL, half_queries: bool) -> None:
    request = dataclasses.replace(LONG, size=300).request()
    result, _ = emulate(library, request, half_queries=half_queries, wrong_lanes=1)
    with pytest.raises(AssertionError):
        assert_same(result, reference.select(request))


def test_waiting_for_too_few_copies_is_noticed(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="under way"):
        emulate(library, dataclasses.replace(LONG, size=300).request(), stale_reads=1)
