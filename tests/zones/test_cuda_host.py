"""The CUDA kernels' own sources, compiled as plain C++ and run on the CPU by an emulation of the execution model.

What this shows: layouts, indexing, barriers, selection logic and the arithmetic, equal to the reference to the bit where dot
products are exact, whatever the order of threads and blocks. What it cannot show: that a GPU runs them, and how fast.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dqe_engine.contracts.zones import Policy, ZoneSpec
from dqe_engine.zones import ZoneSelection, reference
from dqe_engine.zones.request import ZoneRequest, validated

CUDA = Path(__file__).resolve().parents[2] / "cpp_ext" / "cuda"
POLICIES = {"hardest": 0, "uniform": 1, "softmax": 2}
H200, A100, SMALL = 227 * 1024, 163 * 1024, 99 * 1024
"""Shared memory per block: how many stages there are, and whether the queries stay, depends on it."""


class PickRule(ctypes.Structure):
    _fields_ = (("policy", ctypes.c_int), ("temperature", ctypes.c_double), ("seed", ctypes.c_uint64))


class Request(ctypes.Structure):
    """dqe::cuda::Request of cpp_ext/cuda/zones.hpp."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
        ("half_queries", ctypes.c_bool),
        ("half_items", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("batch", "size", "tokens", "width", "k", "picks")),
        ("zones", ctypes.c_bool),
        ("counts", ctypes.c_bool),
        ("anchor", ctypes.c_int),
        ("anchor_ids", ctypes.c_void_p),
        ("anchor_scores", ctypes.c_void_p),
        ("quantiles", ctypes.c_bool),
        ("lo", ctypes.c_double),
        ("hi", ctypes.c_double),
        ("rule", PickRule),
        ("first_query", ctypes.c_int64),
        ("excluded_start", ctypes.c_void_p),
        ("excluded_ids", ctypes.c_void_p),
    )


class Result(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores"))


class Settings(ctypes.Structure):
    _fields_ = (
        ("shared_limit", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("order", ctypes.c_uint64),
        ("stale_reads", ctypes.c_int),
        ("wrong_lanes", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("host") / "host_zones.so"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(CUDA / "tests" / "host_zones.cpp"), "-I", str(CUDA), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.emulated_select.restype = ctypes.c_int64
    loaded.emulated_workspace_bytes.restype = ctypes.c_uint64
    loaded.emulated_half_round_trip.restype = ctypes.c_float
    loaded.emulated_half_round_trip.argtypes = (ctypes.c_float,)
    return loaded


def address(array: Any) -> int | None:
    return None if array is None else array.ctypes.data


def emulate(
    library: ctypes.CDLL,
    request: ZoneRequest,
    *,
    half_queries: bool = False,
    shared_limit: int = H200,
    multiprocessors: int = 3,
    order: int = 0,
    stale_reads: int = 0,
    wrong_lanes: int = 0,
) -> tuple[ZoneSelection, int]:
    """What the kernels select, and how many passes over the items it took."""
    zones, batch = request.zones, request.batch
    queries = request.queries.astype(np.float16) if half_queries else request.queries
    items = np.concatenate(request.shards)
    size, tokens, width = items.shape
    out: dict[str, Any] = {
        "scores": np.zeros((batch, request.k), np.float32),
        "ids": np.zeros((batch, request.k), np.int64),
        "counts": np.zeros((batch, 3), np.int64) if request.counts else None,
        "picks": np.zeros((batch, request.picks), np.int64) if request.picks else None,
        "pick_scores": np.zeros((batch, request.picks), np.float32) if request.picks else None,
        **{name: np.zeros(batch, np.float32) if zones else None for name in ("lo", "hi", "anchor_scores")},
    }
    anchor = 1 if request.anchor_ids is not None else 2 if request.anchor_scores is not None else 0
    spec = zones or ZoneSpec(lo=0, hi=0)
    given = Request(
        *(address(queries), address(items), half_queries, items.dtype == np.float16),
        *(batch, size, tokens, width, request.k, request.picks, zones is not None, request.counts),
        *(anchor, address(request.anchor_ids), address(request.anchor_scores)),
        *(spec.bounds == "quantile", spec.lo, spec.hi, PickRule(POLICIES[spec.policy], spec.temperature, spec.seed)),
        *(request.first_query, address(request.offsets) if len(request.excluded) else None, address(request.excluded)),
    )
    message = ctypes.create_string_buffer(500)
    passes = library.emulated_select(
        ctypes.byref(Settings(shared_limit, multiprocessors, order, stale_reads, wrong_lanes)),
        ctypes.byref(given),
        ctypes.byref(Result(*(address(out[name]) for name, _ in Result._fields_))),
        ctypes.c_int64(len(request.excluded)),
        message,
        len(message),
    )
    if passes < 0:
        raise RuntimeError(message.value.decode())
    return ZoneSelection(**out, backend="cuda"), passes


def assert_same(a: ZoneSelection, b: ZoneSelection) -> None:
    for field in dataclasses.fields(ZoneSelection):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "backend":
            continue
        assert (x is None) == (y is None), field.name
        if x is not None:
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)


Anchor = Literal["best", "id", "score"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A request whose dot products are exact in float32: coordinates are small integers, so ties abound."""

    seed: int
    batch: int
    size: int
    tokens: int
    width: int
    k: int
    picks: int
    anchor: Anchor
    zones: ZoneSpec | None
    special: tuple[float, ...] = ()
    half: bool = True
    excluded: int = 0
    duplicates: bool = False

    def request(self) -> ZoneRequest:
        rng = np.random.default_rng(self.seed)
        queries = rng.integers(-3, 4, (self.batch, self.width)).astype(np.float32)
        items = rng.integers(-3, 4, (self.size, self.tokens, self.width)).astype(np.float16 if self.half else np.float32)
        if self.duplicates:
            items[:] = items[:1]
        for value in self.special if self.size else ():  # one coordinate of one token of some items
            where = rng.integers(0, self.size, 1 + self.size // 10)
            items[where, rng.integers(0, self.tokens), rng.integers(0, self.width)] = value
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
QUANTILES = ZoneSpec(lo=0.01, hi=0.3, bounds="quantile", policy="uniform")
EMPTIED = Case(seed=1, batch=3, size=1, tokens=8, width=5, k=1, picks=1, anchor="id", zones=EVERYTHING, excluded=30)  # all excluded
LONG = Case(seed=3, batch=3, size=4097, tokens=1, width=8, k=10, picks=10, anchor="best", zones=EVERYTHING, excluded=30)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    half_queries=st.booleans(),
    shared_limit=st.sampled_from((H200, A100, SMALL)),
    multiprocessors=st.sampled_from((1, 3, 7)),
    order=st.integers(0, 100),
)
@example(EMPTIED, False, H200, 3, 0)
@example(LONG, False, A100, 3, 1)
@example(dataclasses.replace(LONG, anchor="id", zones=QUANTILES), False, H200, 7, 2)
@example(dataclasses.replace(LONG, duplicates=True, zones=NOTHING), True, H200, 7, 3)
@example(dataclasses.replace(LONG, duplicates=True, k=4097, picks=5000), True, SMALL, 7, 3)
def test_kernels_equal_reference(
    library: ctypes.CDLL, case: Case, half_queries: bool, shared_limit: int, multiprocessors: int, order: int
) -> None:
    request = case.request()
    result, _ = emulate(
        library, request, half_queries=half_queries, shared_limit=shared_limit, multiprocessors=multiprocessors, order=order
    )
    assert_same(result, reference.select(request))
