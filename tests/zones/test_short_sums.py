"""Bounds by sums of 16 bits, which processors without an 8-bit dot product use for many queries: no query makes them overflow."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from support.thorough import cases

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import Screen, cpu
from dqe_engine.zones.request import ZoneRequest, validated

Shape = Literal["ones", "alternating pairs", "one sum", "one number", "one large", "whole numbers", "ascending"]
SETS = [name for name in _kernels.instruction_sets() if _kernels.screened_queries(name) > _kernels.MAX_ROW_QUERIES]

pytestmark = pytest.mark.skipif(not SETS, reason="this processor bounds panels of queries by no instruction set")


def query_of(shape: Shape, rng: np.random.Generator, width: int) -> NDArray[np.float32]:
    """Small whole numbers, so that products are exact; their sum over some 16 is as large as possible, or unlike that of others."""
    at = np.arange(width)
    query: NDArray[Any]
    match shape:
        case "ones":
            query = np.ones(width)
        case "alternating pairs":  # one of the two sums is all positive, the other all negative
            query = np.where(at // 2 % 2, -1, 1)
        case "one sum":
            query = np.where((at < 16) & (at // 2 % 2 == 0), 3, 0)
        case "one number":
            query = np.where(at == width // 2, 3, 0)
        case "one large":
            query = np.where(at == width - 1, 127, 1)
        case "whole numbers":
            query = rng.integers(-3, 4, width)
        case "ascending":
            query = at % 23 - 11
    signed: NDArray[np.float32] = (rng.choice((-1, 1)) * query).astype(np.float32)
    return signed


def request_of(rng: np.random.Generator, width: int, tokens: int, scale: float = 1.0) -> ZoneRequest:
    """Queries of all shapes, and items of which the largest products are with their own signs, or with the opposite ones."""
    shapes = (*get_args(Shape), *rng.choice(get_args(Shape), 10).tolist())
    queries = np.stack([query_of(shape, rng, width) for shape in shapes])
    items = rng.integers(-3, 4, (257, tokens, width)).astype(np.float32)
    extreme = np.sign(queries) * rng.choice((-3, 3), (len(queries), 1))  # codes of 127 throughout
    items[rng.choice(257, len(queries), replace=False), 0] = extreme
    none: dict[str, Any] = {"anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    return validated(queries * np.float32(scale), items, k=9, **none)


def assert_screened_alike(request: ZoneRequest, instruction_set: str) -> None:
    with_screen = dataclasses.replace(request, screen=Screen.build(request.shards))
    plain = cpu.select(request, instruction_set=instruction_set)
    screened = cpu.select(with_screen, instruction_set=instruction_set, rescore_cost=0)
    assert screened.rescored is not None
    np.testing.assert_array_equal(screened.ids, plain.ids)
    np.testing.assert_array_equal(screened.scores, plain.scores)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 200])
def test_no_query_makes_a_sum_overflow(instruction_set: str, width: int) -> None:
    for seed in range(cases(6, 300)):
        rng = np.random.default_rng((seed, width))
        request = request_of(rng, width, int(rng.choice((1, 3))))
        assert_screened_alike(request, instruction_set)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("exponent", [-140, -127, -100, 57])
def test_queries_of_any_length_are_bounded(instruction_set: str, exponent: int) -> None:
    """Also where the codes' scale is so small that its inverse is infinite: codes would all be 127."""
    request = request_of(np.random.default_rng(5), 64, 2, 2.0**exponent)
    plain = cpu.select(request, instruction_set=instruction_set)
    screened = cpu.select(
        dataclasses.replace(request, screen=Screen.build(request.shards)), instruction_set=instruction_set, rescore_cost=0
    )
    assert screened.rescored is not None
    np.testing.assert_array_equal(screened.ids, plain.ids)
    np.testing.assert_array_equal(screened.scores, plain.scores)


@pytest.mark.parametrize("instruction_set", SETS)
def test_short_sums_still_rule_out_most(instruction_set: str) -> None:
    """A bound that is true but says nothing would pass the tests above."""
    rng = np.random.default_rng(2)
    items, queries = (rng.standard_normal((n, 256)).astype(np.float32) for n in (20_000, 33))
    none: dict[str, Any] = {"anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    request = validated(queries, items, k=10, screen=Screen.build(items), **none)
    found = cpu.select(request, instruction_set=instruction_set, rescore_cost=0)
    assert found.rescored is not None
    assert found.rescored < 0.02 * len(items) * len(queries)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(("k", "coarse", "fine"), [(20, True, True), (60, False, True), (110, False, False)])
def test_coarse_bounds_pay_for_fewer_candidates(instruction_set: str, k: int, coarse: bool, fine: bool) -> None:
    rng = np.random.default_rng(3)
    items, queries = (rng.standard_normal((n, 256)).astype(np.float32) for n in (4000, 5))
    none: dict[str, Any] = {"anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    found = cpu.select(validated(queries, items, k=k, screen=Screen.build(items), **none), instruction_set=instruction_set)
    assert (found.rescored is not None) == (coarse if instruction_set == "avx2" else fine)


@pytest.mark.parametrize("instruction_set", SETS)
def test_half_of_the_room_for_a_zone_counts(instruction_set: str) -> None:
    """By its own best score, a query keeps fewer candidates than there is room for: 100 of 3,000 items here."""
    rng = np.random.default_rng(3)
    items, queries = rng.standard_normal((3000, 4, 64)).astype(np.float32), rng.standard_normal((5, 64)).astype(np.float32)
    zoned: dict[str, Any] = {"k": 0, "anchor": None, "zones": ZoneSpec(lo=0.1, hi=1), "picks": 3, "counts": True, "exclude": None}
    request = validated(queries, items, screen=Screen.build(items), **zoned)
    assert cpu.select(request, least_field=100, instruction_set=instruction_set).rescored is not None
    assert cpu.select(request, least_field=200, instruction_set=instruction_set).rescored is None
