"""Screening on an emulated CUDA device: equal to what a pass over the items finds, whatever the vectors."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from support.emulated_cuda import H200, SMALL, emulate
from support.emulated_module import OnDevice, revealed
from support.zone_cases import assert_same

from benchmarks import gpu_zones
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import Screen, cuda, reference
from dqe_engine.zones.device_screen import OVERHEAD_BYTES, PAIR_BYTES, SM_80_BYTES, DeviceScreen
from dqe_engine.zones.request import ZoneRequest, validated

SIZE = 4200
"""More items than a candidate list holds, so that a sample sets limits."""


def top(queries: np.ndarray, items: np.ndarray, k: int = 10, exclude: Any = None) -> ZoneRequest:
    options: dict[str, Any] = {"anchor": None, "zones": None, "picks": 0, "counts": False}
    return validated(queries.astype(np.float32), items, k=k, exclude=exclude, **options)


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    made = rng.standard_normal(shape)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def whole(rng: np.random.Generator, most: int, *shape: int) -> np.ndarray:
    """Whole numbers, so that dot products are exact and the reference has the very scores."""
    return rng.integers(-most, most + 1, shape)


def strange(rng: np.random.Generator, items: np.ndarray) -> np.ndarray:
    """Some items of every kind that bounds are hard to find for."""
    items = items.copy()
    kinds: list[Any] = [0, math.nan, math.inf, -math.inf, 6e-8]
    kinds += [60000] if items.dtype == np.float16 else [1e17, 1e25, 3e38, 1e-30, 1e-42]
    for value in kinds:
        where = rng.integers(0, len(items), 5)
        items[where, rng.integers(0, items.shape[1])] = value if value == 0 else items[where, 0]
        if value:
            items[where, rng.integers(0, items.shape[1]), rng.integers(0, items.shape[2])] = value
    items[rng.integers(0, len(items), 40)] = items[7]  # ties
    return items


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "half_queries", "half", "odd", "shared_limit", "excluded"),
    [
        (3, 1, 40, False, True, True, H200, 0),
        (17, 1, 136, True, True, False, SMALL, 9),
        (2, 2, 16, False, False, True, H200, 0),
        (18, 4, 8, False, True, True, H200, 3),
        pytest.param(1, 16, 8, True, True, False, H200, 0, marks=pytest.mark.slow),
        # With the large query tile, as a warp of the small one has 16 columns.
        pytest.param(1, 32, 8, False, False, False, H200, 0, marks=pytest.mark.slow),
    ],
)
def test_screened_results_are_those_of_a_pass_over_the_items(
    library: ctypes.CDLL,
    batch: int,
    tokens: int,
    width: int,
    half_queries: bool,
    half: bool,
    odd: bool,
    shared_limit: int,
    excluded: int,
    capability: int,
) -> None:
    rng = np.random.default_rng(width)
    items = (units(rng, SIZE, tokens, width) if odd else whole(rng, 1000, SIZE, tokens, width)).astype(np.float16 if half else np.float32)
    items = strange(rng, items) if odd else items
    queries = units(rng, batch, width) if odd else whole(rng, 50, batch, width)
    request = top(queries, items, exclude=rng.integers(0, SIZE, (batch, excluded)) if excluded else None)
    where: dict[str, Any] = {"half_queries": half_queries, "shared_limit": shared_limit, "multiprocessors": 2}
    screened, _ = emulate(library, request, screened=True, order=width, capability=capability, **where)
    assert_same(screened, emulate(library, request, **where)[0] if odd else reference.select(request))
    assert screened.rescored is not None
    assert 0 < screened.rescored < batch * SIZE * tokens / 8


@pytest.mark.parametrize("half_queries", [True, False])
def test_on_a_hopper_only_codes_take_its_kernels(library: ctypes.CDLL, rng: np.random.Generator, half_queries: bool) -> None:
    """Scores, and with them results, are those of other devices. Its own kernels fail where barriers wait for the other phase."""
    request = top(units(rng, 3, 40), units(rng, SIZE, 1, 40).astype(np.float16))
    ours, others = (
        emulate(library, request, half_queries=half_queries, screened=True, capability=capability)[0] for capability in (90, 80)
    )
    assert_same(ours, others)
    assert ours.rescored == others.rescored > 0
    for screened in (True, False):
        with pytest.raises((RuntimeError, AssertionError), match=r"have not arrived|others never come"):
            emulate(library, request, half_queries=half_queries, screened=screened, capability=90, hopper_fault=1)
        emulate(library, request, half_queries=half_queries, screened=screened, portable=True, capability=90, hopper_fault=1)


RESIDUE, LIMIT = 0.49, 0.4375
"""First coordinates beside a 127, whose codes are 0: what they add to a score is all in the error norm, which points along the query."""


def on_the_bound(value: float) -> ZoneRequest:
    """Items 0 to 9 score 127 * value, and their bounds are that and a rounding. Of the others, whose codes are exact, every 16th scores
    127 * LIMIT, which makes that the limit."""
    items = np.zeros((SIZE, 8), np.float16)
    items[:, 0] = LIMIT / 2
    items[::16, 0] = LIMIT
    items[:10, 0], items[:10, 1] = value, 127
    return top(np.eye(8)[:1] * 127, items)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("value", [RESIDUE, LIMIT])
def test_items_on_their_bounds_are_found(library: ctypes.CDLL, value: float, capability: int) -> None:
    """LIMIT: a tie with the limit, which lower ids win."""
    request = on_the_bound(value)
    found, _ = emulate(library, request, screened=True, capability=capability)
    assert_same(found, reference.select(request))
    assert found.ids[0].tolist() == list(range(10))
    assert found.rescored > 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("value", "scale"), [(RESIDUE, 0.8), (LIMIT, 0.95)])
def test_a_bound_that_is_too_low_is_noticed(library: ctypes.CDLL, value: float, scale: float, capability: int) -> None:
    found, _ = emulate(library, on_the_bound(value), screened=True, error_scale=scale, capability=capability)
    assert found.rescored > 0
    assert not set(range(10)) & set(found.ids[0].tolist())


def test_a_wrong_lane_mapping_of_codes_is_noticed(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    request = top(units(rng, 3, 40), units(rng, SIZE, 40).astype(np.float16))
    with pytest.raises(AssertionError):
        assert_same(emulate(library, request, screened=True, wrong_lanes=1)[0], reference.select(request))


@pytest.mark.parametrize(
    ("name", "capability"),
    [("equal", 80), ("no query has a bound", 80), ("one has none", 80), ("one has none", 90), ("every item is strange", 80)],
)
def test_where_bounds_decide_nothing_the_items_are_passed_over(
    library: ctypes.CDLL, name: str, capability: int, rng: np.random.Generator
) -> None:
    queries, items = rng.integers(-3, 4, (2, 8)).astype(np.float32), rng.integers(-3, 4, (2 * SIZE, 8)).astype(np.float32)
    if name == "equal":
        items[:] = items[0]
    elif name == "every item is strange":
        items[:, 3] = np.where(items[:, 3] > 0, math.inf, -math.inf)
        queries[:, 3] = 1
    else:
        queries[: 1 if name == "one has none" else 2, 2] = 1e30
        queries[:, [0, 1, 3]] = 0
    request = top(queries, items)
    found, _ = emulate(library, request, screened=True, capability=capability)
    assert found.rescored == -1
    assert_same(found, reference.select(request))


@pytest.mark.parametrize("capability", [80, 90])
def test_a_nan_token_keeps_its_item_out(library: ctypes.CDLL, capability: int, rng: np.random.Generator) -> None:
    """It is the best by its other tokens, and no bound of it may raise a limit."""
    items, queries = whole(rng, 1000, SIZE, 4, 16).astype(np.float16), whole(rng, 50, 1, 16)
    items[100:130, 1] = queries[0] * 30
    items[100:130, 3, 5] = math.nan
    request = top(queries, items)
    found, _ = emulate(library, request, screened=True, capability=capability)
    assert_same(found, reference.select(request))
    assert found.rescored > 0
    assert not set(range(100, 130)) & set(found.ids[0].tolist())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("width", [1, 8, 40, 257])
def test_codes_are_those_of_the_cpu(library: ctypes.CDLL, rng: np.random.Generator, width: int, half: bool) -> None:
    """Errors have more room for rounding, since tensor cores round worse."""
    items = strange(rng, units(rng, 300, 1, width).astype(np.float16 if half else np.float32))
    (cpu,) = Screen.build(items, lists=False, prefix=False).shards
    pitch = -(-width // 16) * 16
    codes, numbers = np.full((300, pitch), 99, np.int8), np.zeros((3, 300), np.float32)
    address = [ctypes.c_void_p(a.ctypes.data) for a in (codes, *numbers)]
    library.emulated_encode(ctypes.c_void_p(items.ctypes.data), half, ctypes.c_int64(300), ctypes.c_int64(width), *address)
    scales, errors, norms = numbers
    np.testing.assert_array_equal(codes, cpu.codes[:, 0, :pitch].astype(np.int16) - 128)
    np.testing.assert_array_equal(scales, cpu.scales[:, 0])
    np.testing.assert_allclose(norms, cpu.norms[:, 0], rtol=2e-7, atol=1e-30)
    bounded = ~np.isnan(cpu.errors[:, 0])
    np.testing.assert_array_equal(np.isnan(errors), ~bounded)
    more = (7 * width + 480) * 2.0**-24 * (np.linalg.norm(items[bounded, 0].astype(np.float64), axis=-1) + norms[bounded])
    np.testing.assert_allclose(errors[bounded], np.maximum(cpu.errors[bounded, 0] + more, 1e-18), rtol=3e-7)


@pytest.mark.slow
def test_an_index_keeps_codes(built_module: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    allocations = ctypes.CDLL(built_module.__file__).emulated_allocations
    allocations.restype = ctypes.c_int64
    request = top(rng.integers(-3, 4, (3, 40)), rng.integers(-3, 4, (SIZE, 1, 40)).astype(np.float16))
    queries, items = OnDevice(request.queries), OnDevice(request.shards[0])
    expected = reference.select(request)
    for screen in (True, "auto", False):
        index = cuda.Index(items, screen=screen)
        found = index.select(queries, k=10)
        np.testing.assert_array_equal(revealed(found.ids), expected.ids)
        np.testing.assert_array_equal(revealed(found.scores), expected.scores)
        assert (found.rescored is not None) == (screen is True)  # so few items do not pay
        assert allocations() == (3 if screen else 2)  # results, workspace, codes
        assert index.select(queries, k=10, zones=ZoneSpec(lo=0, hi=1)).rescored is None
    space = np.zeros(cuda.workspace_bytes(3, (SIZE, 40), k=10) + 256, np.uint8)
    with pytest.raises(InputError, match="workspace"):
        cuda.Index(items, screen=True).select(queries, k=10, workspace=OnDevice(space[-space.ctypes.data % 256 :]))
    del index, found
    assert allocations() == 0
    assert "no screen: 15 tokens" in cuda.Index(OnDevice(np.zeros((5, 3, 8), np.float16)), screen=True).describe()


def test_the_screen_is_used_where_it_costs_less() -> None:
    rule = DeviceScreen(1_000_000, 1, 256, 2, always=False)
    cost = 1e6 * 268 + 64 * 100 * 16 * 512 + OVERHEAD_BYTES
    assert rule.costs(64, 100) == (cost + 1e6 * PAIR_BYTES, 1e6 * 512)
    assert rule.costs(64, 100, ("sm_90a", 128)) == (cost + SM_80_BYTES, 1e6 * 512)
    assert rule.pays(64, 100)
    assert not rule.pays(64, 1000)
    assert not DeviceScreen(100_000, 1, 256, 2, always=False).pays(64, 10)  # the small kernels take longer than what is saved
    assert rule.learn(64, 1000, 64 * 1000) == 64_000
    assert rule.pays(64, 1000)
    assert rule.would_pay(256, 100)
    assert not rule.would_pay(256, 100, ("sm_80", 256))  # four passes over the codes for one over the items
    assert rule.would_pay(64, 100, ("sm_80", 256))
    assert "(1.0 tokens in full for each wanted), 488 without: the screen" in rule.describe(64, 1000)


@pytest.mark.parametrize(("mode", "architecture"), [("ours, f16 queries", "sm_90a"), ("ours, f16 queries, sm_80", "sm_80")])
def test_the_screen_is_chosen_where_it_was_predicted_to_be_faster(mode: str, architecture: str) -> None:
    cases = gpu_zones.predictions()
    assert len(cases) == 6
    for name, predicted in cases.items():
        size, tokens = gpu_zones.PREDICTED_FOR[name.startswith("MaxSim")]
        batch = int(name.split(", ")[1])
        a_pass = 64 if architecture == "sm_80" else 256 if batch > 128 else 128
        rule = DeviceScreen(size, tokens, gpu_zones.WIDTH, 2, always=False)
        faster = predicted[gpu_zones.SCREENED]["ms"] < predicted[mode]["ms"]
        assert rule.would_pay(batch, gpu_zones.K, (architecture, a_pass)) == faster, name


def test_searches_that_overflow_make_the_screen_pause() -> None:
    rule = DeviceScreen(1_000_000, 1, 256, 2, always=False)
    tried = []
    for _ in range(13):
        assert rule.would_pay(1, 10) == rule.would_pay(1, 10)
        tried.append(rule.pays(1, 10))
        if tried[-1]:
            assert rule.learn(1, 10, -1) is None
    assert [i for i, used in enumerate(tried) if used] == [0, 2, 6]
    assert "more searches read the items, since the candidates of one overflowed" in rule.describe(1, 10)
    assert not DeviceScreen(1_000_000, 3, 256, 2, always=True).pays(1, 10)
