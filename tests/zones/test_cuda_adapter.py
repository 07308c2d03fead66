"""The CUDA adapter, bindings.cpp and cuda.py, on an emulation of the device."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
import pytest
from support.emulated_module import OnDevice, revealed
from support.zone_cases import EVERYTHING, RANKS, Anchor, Case, assert_same

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import ZoneSelection, cuda, reference


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
    case = Case(seed=4, batch=7, size=111, tokens=3, width=8, k=5, picks=4, anchor=anchor, zones=zones, half=True, excluded=3)
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
    request = Case(seed=4, batch=3, size=130, tokens=1, width=8, k=5, picks=0, anchor="best", zones=None, half=True).request()
    items = OnDevice(request.shards[0])
    expected, index = reference.select(request), cuda.Index(items)
    screened, auto = cuda.Index(items, screen=True), cuda.Index(items, screen="auto")
    try:
        for capability, taken in ((80, "sm_80"), (90, "sm_90a"), (100, "sm_80")):
            emulate_capability(capability)
            assert index.architecture(3) == index.architecture(300, half_queries=True) == taken
            for asked in ({"zones": RANKS}, {"zones": EVERYTHING, "own_best": False}, {"zones": EVERYTHING, "excluded": 3}):
                assert screened.architecture(3, **asked) == index.architecture(300, **asked) == taken
            assert screened.architecture(3) == "sm_80"
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
        ((), f"free {freeing};"),
        ((77, 77), "free 77;"),
        ((None, 77), f"record 1;wait {freeing};record 77;wait {freeing};free {freeing};"),
        ((-1,), f"synchronize 0;free {freeing};"),  # a consumer that does not say
    ):
        result = index.select(queries, k=3, stream=55)
        for stream in taken:
            revealed(result.ids, stream)
        before = log().decode()
        del result
        assert log().decode() == f"{before}{expected}"


@pytest.mark.slow
def test_the_adapter_refuses_anchors_outside_the_items(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    queries, items = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    with pytest.raises(InputError, match="anchor"):
        cuda.select(queries, items, zones=EVERYTHING, anchor=np.array([0, 5]), counts=True)
