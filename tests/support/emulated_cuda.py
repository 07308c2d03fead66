"""The CUDA kernels' sources on an emulation of the device: built as plain C++, called through ctypes, held against the reference."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from support.compiling import compiled
from support.zone_cases import Case

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import ZoneSelection
from dqe_engine.zones.request import ZoneRequest, validated

CUDA = Path(__file__).resolve().parents[2] / "cpp_ext" / "cuda"
POLICIES = {"hardest": 0, "uniform": 1, "softmax": 2}
H200, A100, SMALL = 227 * 1024, 163 * 1024, 99 * 1024
"""Shared memory per block: how many stages there are, and whether the queries stay, depends on it."""
KEPT = 1 << 30
"""Bytes of scores that may be kept; with 0, zones that need another look pass over the items again."""
FAULTS = {
    1: ("wait for the other phase", "have not arrived|others never come"),
    2: ("a warp that does not arrive", "others never come"),
    3: ("no swizzle", "Mismatch"),
    4: ("16 bytes less expected", "others never come"),
    5: ("a stage released too early", "still reads there|have not arrived|while products are under way"),
    6: ("rows of a descriptor at another stride", "Mismatch|never written|have not arrived"),
    7: ("another fragment", "Mismatch"),
    8: ("no fence", "no fence"),
    9: ("barriers not published", "before it is published"),
    10: ("a producer that runs ahead", "still reads there|another copy is under way|more arrivals|others never come"),
}
"""What `hopper_fault` plants in the emulation of sm_90a, and how that is seen."""


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
        ("ranks", ctypes.c_bool),
        ("lo", ctypes.c_double),
        ("hi", ctypes.c_double),
        ("rule", PickRule),
        ("first_query", ctypes.c_int64),
        ("excludes", ctypes.c_bool),
        ("excluded_start", ctypes.c_void_p),
        ("excluded_ids", ctypes.c_void_p),
        ("portable", ctypes.c_bool),
        ("screened", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "errors", "norms")),  # filled in by the library
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
        ("kept_limit", ctypes.c_int64),
        ("capability", ctypes.c_int),
        ("hopper_fault", ctypes.c_int),
        ("error_scale", ctypes.c_float),
        ("unawaited", ctypes.c_int64),
    )


class Counts(ctypes.Structure):
    """What all calls have put on streams so far, and waited for; and how many launches of the last one were early."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("launches", "fills", "waits", "early"))

    @classmethod
    def of(cls, library: ctypes.CDLL) -> Counts:
        counts = cls()
        library.emulated_counts(ctypes.byref(counts))
        return counts


def emulation(factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    command = [compiler, *flags, str(CUDA / "tests" / "host_zones.cpp"), "-I", str(CUDA)]
    loaded = ctypes.CDLL(str(compiled(factory, command, "host_zones.so")))
    loaded.emulated_select.restype = ctypes.c_int64
    loaded.emulated_workspace_bytes.restype = ctypes.c_uint64
    loaded.emulated_takes_hopper.restype = ctypes.c_bool
    return loaded


@cache
def loaded(path: Path) -> ModuleType:
    """Once in a process, for all files that use it: nanobind registers types by their names."""
    spec = importlib.util.spec_from_file_location("_kernels_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    kept_limit: int = KEPT,
    capability: int = 80,
    hopper_fault: int = 0,
    portable: bool = False,
    screened: bool = False,
    error_scale: float = 1.0,
    unawaited: int = 0,
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
        *(spec.bounds == "rank", spec.lo, spec.hi, PickRule(POLICIES[spec.policy], spec.temperature, spec.seed)),
        *(request.first_query, len(request.excluded) > 0, address(request.offsets), address(request.excluded)),
        *(portable, screened),
    )
    machine = shared_limit, multiprocessors, order, stale_reads, wrong_lanes, kept_limit, capability, hopper_fault
    rescored = ctypes.c_int64()
    message = ctypes.create_string_buffer(500)
    passes = library.emulated_select(
        ctypes.byref(Settings(*machine, error_scale, unawaited)),
        ctypes.byref(given),
        ctypes.byref(Result(*(address(out[name]) for name, _ in Result._fields_))),
        ctypes.c_int64(len(request.excluded)),
        ctypes.byref(rescored),
        message,
        len(message),
    )
    if passes < 0:
        raise RuntimeError(message.value.decode())
    return ZoneSelection(**out, backend="cuda", rescored=rescored.value if screened else None), passes


def takes_hopper(
    library: ctypes.CDLL,
    *,
    capability: int = 90,
    shared_limit: int = H200,
    kept_limit: int = KEPT,
    half_items: bool = True,
    half_queries: bool = True,
    batch: int = 20,
    size: int = 1000,
    tokens: int = 1,
    width: int = 256,
    items: int = 1 << 20,
    **asked: Any,
) -> bool:
    """Whether the kernels for sm_90a would take a request. `asked`: other fields of it."""
    sizes = {"batch": batch, "size": size, "tokens": tokens, "width": width, "k": 10}
    request = Request(items=items, half_items=half_items, half_queries=half_queries, **sizes, **asked)
    taken: bool = library.emulated_takes_hopper(ctypes.byref(request), capability, shared_limit, ctypes.c_int64(kept_limit))
    return taken


@st.composite
def hopper_cases(draw: st.DrawFn) -> Case:
    """Top-k searches of shapes that the kernels for sm_90a serve."""
    tokens = draw(st.sampled_from((1, 1, 2, 8, 32, 128)))
    size = draw(st.sampled_from((1, 19, 111) if tokens > 2 else (1, 111, 128, 600)))
    return Case(
        seed=draw(st.integers(0, 2**40)),
        batch=draw(st.sampled_from((1, 3, 20, 128, 130))),
        size=size if tokens < 32 else min(size, 19),
        tokens=tokens,
        width=draw(st.sampled_from((8, 64, 72, 136))),
        k=draw(st.sampled_from((1, 10, size, size + 3))),
        picks=0,
        anchor="best",
        zones=None,
        special=draw(st.sampled_from(((), (math.nan,), (math.nan, math.inf, -math.inf)))),
        half=True,
        excluded=draw(st.sampled_from((0, 2, 30))),
        duplicates=draw(st.booleans()),
    )


def one_score_per_item(scores: np.ndarray, **options: Any) -> ZoneRequest:
    """Two queries for which item i scores `scores[i]`, an integer below 2^19 in absolute value, to the bit."""
    items = np.zeros((len(scores), 8), np.float16)  # 16 bytes: rows that the register kernels take
    items[:, 0], items[:, 1] = scores // 256, scores % 256
    defaults: dict[str, Any] = {"k": 10, "anchor": None, "zones": None, "picks": 0, "counts": False, "exclude": None}
    return validated(np.array([[256, 1, 0, 0, 0, 0, 0, 0]] * 2, np.float32), items, **{**defaults, **options})
