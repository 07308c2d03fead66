"""The CUDA kernels' own sources, compiled as plain C++ and run on the CPU by an emulation of the execution model.

What this shows: layouts, indexing, barriers, selection logic and the arithmetic, equal to the reference to the bit where dot
products are exact, whatever the order of threads and blocks. What it cannot show: that a GPU runs them, and how fast.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.compiling import compiled
from support.emulated_cuda import A100, CUDA, H200, KEPT, SMALL, Anchor, Case, Request, assert_same, emulate, emulation, loaded
from support.thorough import THOROUGH
from support.thorough import cases as random_cases

from dqe_engine.contracts.zones import Bounds, Policy, ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import ZoneSelection, cuda, reference
from dqe_engine.zones.request import ZoneRequest, validated


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation(tmp_path_factory)


@st.composite
def zone_specs(draw: st.DrawFn) -> ZoneSpec:
    bounds: Bounds = draw(st.sampled_from(("absolute", "pooled", "rank")))
    choices = (0.0, 0.1, 0.5, 1.0) if bounds != "absolute" else (-math.inf, -50.0, -1.0, 0.0, 2.0, 7.0, 1e6, math.inf)
    lo, hi = sorted((draw(st.sampled_from(choices)), draw(st.sampled_from(choices))))
    policy: Policy = draw(st.sampled_from(("hardest", "uniform", "softmax")))
    return ZoneSpec(lo=lo, hi=hi, bounds=bounds, policy=policy, seed=draw(st.sampled_from((0, 2**63 + 5))), temperature=0.7)


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


EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax")
NOTHING = ZoneSpec(lo=1e9, hi=1e9)
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")
EMPTIED = Case(seed=1, batch=3, size=1, tokens=8, width=5, k=1, picks=1, anchor="id", zones=EVERYTHING, excluded=30)  # all excluded
LONG = Case(seed=3, batch=3, size=4097, tokens=1, width=8, k=10, picks=10, anchor="best", zones=EVERYTHING, excluded=30)


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


def one_score_per_item(scores: np.ndarray, **options: Any) -> ZoneRequest:
    """Two queries for which item i scores `scores[i]`, an integer below 2^19 in absolute value, to the bit."""
    items = np.zeros((len(scores), 8), np.float16)  # 16 bytes: rows that the register kernels take
    items[:, 0], items[:, 1] = scores // 256, scores % 256
    defaults: dict[str, Any] = {"k": 10, "anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    return validated(np.array([[256, 1, 0, 0, 0, 0, 0, 0]] * 2, np.float32), items, **{**defaults, **options})


SIZE = 50_000
TILE = np.arange(SIZE) // 128
SAMPLED = (TILE % 16 == 0) & (TILE < 24 * 16)
"""The items that the sample of a top-k list looks at, for this size and k = 10: a sixteenth of the tiles."""
ON_RUNG = TILE % 130 == 0
"""The items that the one rung of a ladder without a sample looks at: three tiles, 130 apart (the fourth is beyond)."""
PICKED = {"zones": ZoneSpec(lo=-math.inf, hi=math.inf, policy="hardest"), "picks": 10, "k": 0, "anchor": np.zeros(2, np.float32)}


@pytest.mark.parametrize(("options", "seen"), [({}, SAMPLED), (PICKED, ON_RUNG)])
@pytest.mark.parametrize(
    ("name", "most_passes"),
    [
        ("shuffled", 4),
        ("ascending", 4),
        ("descending", 4),
        ("equal", 4),
        ("few values", 4),
        ("first rung misses the best", 6),
        ("worst order for the limits", 40),
    ],
)
def test_limits_hold_whatever_the_order_of_the_items(
    library: ctypes.CDLL, name: str, most_passes: int, options: dict[str, Any], seen: np.ndarray
) -> None:
    ascending, rng = np.arange(SIZE), np.random.default_rng(0)
    scores = {
        "shuffled": rng.permutation(SIZE),
        "ascending": ascending,
        "descending": ascending[::-1].copy(),
        "equal": np.zeros(SIZE, np.int64),
        "few values": rng.integers(0, 3, SIZE),
        "first rung misses the best": np.where(seen, 0, 1),
        "worst order for the limits": np.where(seen, 0, ascending),
    }[name]
    request = one_score_per_item(scores, **options)
    result, passes = emulate(library, request, multiprocessors=2)
    assert_same(result, reference.select(request))
    assert passes <= most_passes
    if name == "worst order for the limits":
        assert passes > 4  # so the host's loop was needed, and ended


OWN_BEST = ZoneSpec(lo=-math.inf, hi=math.inf, policy="hardest")
"""Everything, so that the list of picks sees every item."""


@pytest.mark.parametrize(
    "options",
    [
        {"zones": OWN_BEST},
        {"zones": RANKS},
        {"zones": OWN_BEST, "anchor": np.zeros(2, np.float32), "exclude": np.array([[9, 7], [SIZE - 1, SIZE]]) - 1},
    ],
)
@pytest.mark.parametrize(("kept_limit", "most_passes"), [(KEPT, 2), (0, 9)])
def test_zones_that_need_another_look_take_one_pass_over_the_items(
    library: ctypes.CDLL, options: dict[str, Any], kept_limit: int, most_passes: int
) -> None:
    """A sample and one pass; without room for the scores more, with the same result."""
    request = one_score_per_item(np.random.default_rng(0).permutation(SIZE), **options, picks=10, counts=True)
    result, passes = emulate(library, request, multiprocessors=2, kept_limit=kept_limit)
    assert_same(result, reference.select(request))
    assert passes <= most_passes
    assert kept_limit or passes > 2


@pytest.mark.parametrize("zones", [OWN_BEST, RANKS])
def test_zones_are_made_again_when_the_best_was_not_known(library: ctypes.CDLL, zones: ZoneSpec) -> None:
    """The sample misses the best, and so many items pass its limit that the list overflows."""
    scores = np.where(SAMPLED, 0, np.arange(SIZE))
    request = one_score_per_item(scores, zones=zones, picks=10, counts=True, exclude=np.array([[SIZE - 1, 5]] * 2))
    result, passes = emulate(library, request, multiprocessors=2)
    assert_same(result, reference.select(request))
    assert passes > 2


def test_a_batch_is_cut_where_its_scores_do_not_fit(library: ctypes.CDLL) -> None:
    case = Case(seed=6, batch=150, size=300, tokens=1, width=8, k=4, picks=3, anchor="best", zones=RANKS, excluded=2)
    request = case.request()
    for rows, passes in ((150, 1), (149, 2), (64, 3), (63, 5)):
        result, taken = emulate(library, request, kept_limit=rows * 384 * 4)
        assert_same(result, reference.select(request))
        assert taken == passes, rows


def test_a_sample_names_the_items_that_it_found(library: ctypes.CDLL) -> None:
    """The limit is the sample's last best item, so a lower id than that item's would lose it."""
    scores = np.zeros(SIZE, np.int64)
    scores[15:128:16] = 1  # the last of each warp's 16 columns in the first tile
    request = one_score_per_item(scores, k=8)
    assert_same(emulate(library, request, multiprocessors=2)[0], reference.select(request))


def test_a_key_at_the_limit_is_drawn(library: ctypes.CDLL) -> None:
    """The limit that the rung leaves is the last pick's own key: what settles most keys without a logarithm must let it through."""
    zones = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", temperature=1.0)
    request = one_score_per_item(np.where(ON_RUNG, 40, 0), **{**PICKED, "zones": zones})
    assert_same(emulate(library, request, multiprocessors=2)[0], reference.select(request))


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
        case = Case(tokens, batch, size, tokens, 8, k=9, picks=7, anchor=anchor, zones=zones, special=special, excluded=excluded)
        request = case.request()
        for half_queries in (False, True):
            result, _ = emulate(library, request, half_queries=half_queries, multiprocessors=2, order=tokens)
            assert_same(result, reference.select(request))


def test_one_query_asks_for_one_list(library: ctypes.CDLL) -> None:
    request = Request(half_items=True, batch=1, size=10**6, tokens=1, width=256, k=10**6)
    entry_bytes = 8 + 8 + 4
    assert library.emulated_workspace_bytes(ctypes.byref(request)) < 2**20 * entry_bytes + (1 << 20)


@pytest.mark.parametrize("k", [600, 4096, 4097, 9000])
@pytest.mark.parametrize("values", [2, 900, 100_000])
def test_long_lists_are_sorted(library: ctypes.CDLL, k: int, values: int) -> None:
    """Of those the best that fit shared memory, unless they are too many or too many are equal."""
    request = one_score_per_item(np.random.default_rng(1).integers(0, values, 9000), k=k)
    assert_same(emulate(library, request)[0], reference.select(request))


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
    request = Case(seed=2, batch=3, size=19, tokens=1, width=8, k=1, picks=1, anchor="id", zones=EVERYTHING).request()
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


# The module that Python imports, built on the emulation. The arrays it takes for a device's lie in host memory.


class Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack 0.x."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
open_capsule = ctypes.pythonapi.PyCapsule_GetPointer
open_capsule.restype, open_capsule.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class OnDevice:
    """A NumPy array that DLPack says lies on CUDA device 0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.steps = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        self.tensor = Tensor(
            *(array.ctypes.data, 2, 0, array.ndim, code, array.itemsize * 8, 1, self.sizes, self.steps, 0, None, None),
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


def revealed(array: Any, stream: int | None = 1) -> np.ndarray | None:
    if array is None:
        return None
    assert array.__dlpack_device__() == (2, 0)
    capsule = array.__dlpack__(stream=stream, max_version=(1, 0))
    tensor = Tensor.from_address(open_capsule(capsule, b"dltensor"))
    assert (tensor.device_type, tensor.device_id, tensor.lanes) == (2, 0, 1)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    dtype = np.dtype({0: "i", 2: "f"}[tensor.code] + str(tensor.bits // 8))
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(tensor.data)
    assert array.shape == shape
    return np.frombuffer(raw, dtype).reshape(shape).copy()


@pytest.fixture(scope="module")
def built_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    nanobind = pytest.importorskip("nanobind", reason="the adapter needs nanobind's headers")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(nanobind.__file__).parent
    includes = [sysconfig.get_path("include"), root / "include", root / "ext" / "robin_map" / "include", CUDA]
    command = [
        compiler, "-std=c++20", "-O0", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC", "-fno-strict-aliasing",
        *(f"-I{include}" for include in includes), str(CUDA / "tests" / "host_module.cpp"), str(root / "src" / "nb_combined.cpp"),
    ]  # fmt: skip
    name = f"_kernels_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return loaded(compiled(tmp_path_factory, command, name))


@pytest.mark.slow
@pytest.mark.parametrize("own_workspace", [False, True])
@pytest.mark.parametrize("anchor", ["best", "id", "score"])
@pytest.mark.parametrize("zones", [None, EVERYTHING, RANKS])
def test_the_adapter(
    built_module: Any, monkeypatch: pytest.MonkeyPatch, own_workspace: bool, anchor: Anchor, zones: ZoneSpec | None
) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    allocations = ctypes.CDLL(built_module.__file__).emulated_allocations
    allocations.restype = ctypes.c_int64
    case = Case(seed=4, batch=7, size=111, tokens=3, width=8, k=5, picks=4, anchor=anchor, zones=zones, excluded=3)
    for half_queries, on_host, excluded in ((False, False, 3), (True, True, 0)):
        request = dataclasses.replace(case, excluded=excluded).request()
        given: Any = request.anchor_ids if request.anchor_ids is not None else request.anchor_scores
        options = {"k": 5, "zones": zones, "picks": request.picks}
        sizes = {**options, "half_queries": half_queries, "own_best": given is None, "excluded": len(request.excluded)}
        needed = cuda.workspace_bytes(7, (111, 3, 8), **sizes) if own_workspace else 0
        space = np.full(needed + 256, 255, np.uint8)
        space = space[-space.ctypes.data % 256 :][:needed]
        result = cuda.select(
            OnDevice(request.queries.astype(np.float16) if half_queries else request.queries),
            OnDevice(request.shards[0]),
            **options,
            anchor=given if given is None or on_host else OnDevice(given),
            counts=request.counts,
            exclude=np.split(request.excluded, request.offsets[1:-1]),
            first_query=request.first_query,
            workspace=OnDevice(space) if own_workspace else None,
        )
        names = [field.name for field in dataclasses.fields(ZoneSelection) if field.name not in ("backend", "rescored")]
        assert allocations() == 1  # the results'; the index and its workspace are gone
        assert_same(ZoneSelection(**{name: revealed(getattr(result, name)) for name in names}, backend="cuda"), reference.select(request))
        del result
        assert allocations() == 0
        if own_workspace:
            with pytest.raises(InputError, match="workspace"):
                cuda.select(OnDevice(request.queries), OnDevice(request.shards[0]), k=5, workspace=OnDevice(space[:1024]))


@pytest.mark.slow
def test_an_index_keeps_its_workspace(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    allocations = ctypes.CDLL(built_module.__file__).emulated_allocations
    allocations.restype = ctypes.c_int64
    queries, items = OnDevice(np.zeros((20, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    index, sizes = cuda.Index(items), []
    for k, zones in ((3, None), (3, RANKS), (2, None)):
        ids = index.select(queries, k=k, zones=zones).ids
        np.testing.assert_array_equal(revealed(ids), [range(k)] * 20)
        del ids
        sizes.append(index._room.bytes)
        assert allocations() == 1  # the workspace
    assert sizes[0] < sizes[1] == sizes[2] == cuda.workspace_bytes(20, (5, 8), k=3, zones=RANKS)
    del index
    assert allocations() == 0


@pytest.mark.slow
def test_an_index_says_which_kernels_it_takes(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    emulate_capability = ctypes.CDLL(built_module.__file__).emulate_capability
    request = Case(seed=4, batch=3, size=130, tokens=1, width=8, k=5, picks=0, anchor="best", zones=None).request()
    items = OnDevice(request.shards[0])
    expected, index = reference.select(request), cuda.Index(items)
    screened, auto = cuda.Index(items, screen=True), cuda.Index(items, screen="auto")
    try:
        for capability, taken in ((80, "sm_80"), (90, "sm_90a"), (100, "sm_80")):
            emulate_capability(capability)
            assert index.architecture(3) == index.architecture(300, half_queries=True) == taken
            assert index.architecture(3, zones=True) == screened.architecture(3) == "sm_80"
            assert auto.architecture(3) == taken  # so few items do not pay
            assert screened.describe(3).endswith("always the screen; sm_80 kernels")
            assert index.describe(3).endswith(f"; {taken} kernels")
            found = screened.select(OnDevice(request.queries), k=5)
            np.testing.assert_array_equal(revealed(found.ids), expected.ids)
            assert found.rescored is not None
            for portable in (False, True):
                found = index.select(OnDevice(request.queries), k=5, portable=portable)
                np.testing.assert_array_equal(revealed(found.ids), expected.ids)
    finally:
        emulate_capability(80)


@pytest.mark.slow
def test_results_are_freed_behind_the_streams_that_took_them(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    log = ctypes.CDLL(built_module.__file__).emulated_log
    log.restype = ctypes.c_char_p
    queries, items = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    index, freeing = cuda.Index(items, stream=55), 1000  # a stream of the module's own
    for taken, expected in (
        ((), ""),
        ((77, 77), f"record 77;wait {freeing};"),
        ((None, 77), f"record 1;wait {freeing};record 77;wait {freeing};"),
        ((-1,), "synchronize 0;"),  # a consumer that does not say
    ):
        result = index.select(queries, k=3, stream=55)
        for stream in taken:
            revealed(result.ids, stream)
        before = log().decode()
        del result
        assert log().decode() == f"{before}{expected}free {freeing};"


@pytest.mark.slow
def test_the_adapter_refuses_anchors_outside_the_items(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    queries, items = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    with pytest.raises(InputError, match="anchor"):
        cuda.select(queries, items, zones=EVERYTHING, anchor=np.array([0, 5]), counts=True)


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
