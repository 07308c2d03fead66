"""Searches that nobody waits for (`sync=False`), on streams that are emulated to run as late as they may.

What is put on a stream runs when the host next waits for anything, all streams in turns; what was freed is filled and watched. So a call
that reads too early, or lets go of what is still needed, gives a wrong answer here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.emulated_cuda import one_score_per_item
from support.emulated_module import OnDevice, revealed
from support.zone_cases import EVERYTHING, RANKS, Anchor, Case, assert_same

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import ZoneSelection, cuda, reference
from dqe_engine.zones.request import validated

pytestmark = pytest.mark.slow

FIELDS = ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores")
SIZE = 9000
SAMPLED = np.isin(np.arange(SIZE) // 128, range(0, 5 * 14, 14))
"""The items that the sample of a top-k list looks at, for this size and k = 10."""


@pytest.fixture
def device(built_module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulation's switches and counters."""
    monkeypatch.setattr(cuda, "kernels", lambda: built_module)
    library = ctypes.CDLL(built_module.__file__)
    for name in ("emulated_allocations", "emulated_waits", "emulated_written_after_free"):
        getattr(library, name).restype = ctypes.c_int64

    written = []

    def fill(stream: int, array: np.ndarray) -> None:
        written.append(array)
        library.emulate_fill(ctypes.c_uint64(stream), ctypes.c_void_p(array.ctypes.data), 77, ctypes.c_size_t(array.nbytes))

    library.emulate_streams(True, False)
    yield SimpleNamespace(
        fill=fill, waits=library.emulated_waits, allocations=library.emulated_allocations, streams=library.emulate_streams,
        capability=library.emulate_capability,
    )  # fmt: skip
    library.emulate_streams(False, False)
    library.emulate_capability(80)
    assert library.emulated_written_after_free() == 0


def on_host(found: ZoneSelection, stream: int = 1) -> ZoneSelection:
    return ZoneSelection(**{name: revealed(getattr(found, name), stream) for name in FIELDS}, backend="cuda")


@pytest.mark.parametrize(
    ("zones", "anchor", "screen"),
    [
        (None, "best", False),
        (None, "best", True),
        *((zones, anchor, False) for zones in (EVERYTHING, RANKS) for anchor in ("best", "id", "score")),
    ],
)
def test_what_is_taken_is_complete(device: Any, zones: ZoneSpec | None, anchor: Anchor, screen: bool) -> None:
    """Nothing is waited for before; the caller has written over all that it gave."""
    request = Case(seed=4, batch=7, size=111, tokens=2, width=8, k=5, picks=4, anchor=anchor, zones=zones, half=True, excluded=3).request()
    expected, given = reference.select(request), request.anchor_ids if request.anchor_ids is not None else request.anchor_scores
    index = cuda.Index(OnDevice(request.shards[0]), stream=55, screen=screen)
    for on_device in (False, True):
        queries, anchors = request.queries.copy(), None if given is None else given.copy()
        exclude = np.stack(np.split(request.excluded.copy(), request.offsets[1:-1])) if len(set(np.diff(request.offsets))) == 1 else None
        lists = exclude if exclude is not None else np.split(request.excluded.copy(), request.offsets[1:-1])
        options: dict[str, Any] = {"zones": zones, "picks": request.picks, "counts": request.counts, "first_query": request.first_query}
        before = device.waits()
        found = index.select(
            OnDevice(queries), k=5, anchor=OnDevice(anchors) if on_device and anchors is not None else anchors, exclude=lists,
            stream=55, sync=False, **options,
        )  # fmt: skip
        assert device.waits() == before
        device.fill(55, queries)
        if anchors is not None and on_device:
            device.fill(55, anchors)
        elif anchors is not None:
            anchors[:] = 0
        for part in lists:
            part[:] = 0
        assert found.scores.shape == (7, 5)
        assert_same(on_host(found), expected)
        assert device.waits() == before + 1
        assert found.rescored is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zones": EVERYTHING, "picks": 10, "counts": True},
        {"zones": RANKS, "picks": 10, "counts": True, "exclude": np.array([[SIZE - 1, 5]] * 2)},
    ],
)
def test_a_list_that_overflowed_is_found_and_the_search_repeated(device: Any, options: dict[str, Any]) -> None:
    """From copies of the queries, which are overwritten behind the search. The sample misses the best."""
    request = one_score_per_item(np.where(SAMPLED, 0, 1), **options)
    queries = request.queries.copy()
    found = cuda.Index(OnDevice(request.shards[0][:, 0])).select(OnDevice(queries), **{"k": 10, **options}, sync=False)
    device.fill(0, queries)
    assert_same(on_host(found), reference.select(request))
    assert found.scores._pending._search.repeated


def test_screened_searches_teach_once_they_have_ended(device: Any) -> None:
    request = one_score_per_item(np.random.default_rng(0).permutation(SIZE))
    index = cuda.Index(OnDevice(request.shards[0]), screen=True)
    found = index.select(OnDevice(request.queries), k=10, sync=False)
    assert index._screen is not None
    before = index._screen._survivors
    assert_same(on_host(found), reference.select(request))
    assert index._screen._survivors != before
    learned = index._screen._survivors
    index._screen._survivors = 0
    on_host(found)
    assert index._screen._survivors == 0  # once
    assert index.select(OnDevice(request.queries), k=10).rescored == learned * 20


@pytest.mark.parametrize("screen", [False, True])
def test_kernels_for_hopper_run_on_their_stream(device: Any, screen: bool) -> None:
    """Two searches share a workspace, which the second prepares anew. The queries of the first are overwritten meanwhile."""
    device.capability(90)
    request = one_score_per_item(np.random.default_rng(0).permutation(SIZE))
    items, queries = request.shards[0], request.queries.copy()
    opposite = validated(-queries, items, k=10, anchor=None, zones=None, picks=0, counts=False, exclude=None)
    index = cuda.Index(OnDevice(items), screen=screen)
    assert index.architecture(2) == ("sm_80" if screen else "sm_90a")
    before = device.waits()
    found = index.select(OnDevice(queries), k=10, sync=False)
    device.fill(0, queries)
    other = index.select(OnDevice(opposite.queries), k=10, sync=False)
    assert device.waits() == before
    assert_same(on_host(found), reference.select(request))
    assert_same(on_host(other), reference.select(opposite))


def test_searches_of_an_index_are_under_way_together(device: Any) -> None:
    """Of growing size, so that the workspace is replaced while it is used; on one stream and on two; taken in any order."""
    requests = [one_score_per_item(np.random.default_rng(n).permutation(SIZE), k=k) for n, k in enumerate((3, 10, 2000, 5))]
    items = OnDevice(requests[0].shards[0])
    expected = [reference.select(validated(r.queries, items.array, k=r.k, anchor=None, zones=None, picks=0, counts=False, exclude=None))
                for r in requests]  # fmt: skip
    for streams in ((7, 7, 7, 7), (7, 8, 7, 8)):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
            index = cuda.Index(items, stream=7)
            found = [index.select(OnDevice(r.queries), k=r.k, stream=s, sync=False) for r, s in zip(requests, streams, strict=True)]
            del index
            for n in order:
                assert_same(on_host(found[n]), expected[n])


def test_a_result_that_nobody_takes_is_waited_for(device: Any) -> None:
    request = one_score_per_item(np.random.default_rng(0).permutation(SIZE))
    before, held = device.waits(), device.allocations()
    found = cuda.Index(OnDevice(request.shards[0])).select(OnDevice(request.queries), k=10, sync=False)
    scores = found.scores
    del found
    assert device.waits() == before
    del scores
    assert device.waits() == before + 1
    device.streams(False, False)  # what was freed in the order of streams is freed by the next wait
    cuda.Index(OnDevice(request.shards[0])).select(OnDevice(request.queries), k=10)
    assert device.allocations() <= held + 3


def test_what_goes_wrong_is_raised_at_each_try(device: Any) -> None:
    queries, items = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    index = cuda.Index(items)
    found = index.select(queries, zones=EVERYTHING, anchor=np.array([0, 5]), counts=True, sync=False)
    for array in (found.counts, found.lo, found.counts):
        with pytest.raises(InputError, match="anchor"):
            revealed(array)
    np.testing.assert_array_equal(revealed(index.select(queries, k=2, sync=False).ids), [[0, 1]] * 2)


def test_a_stream_that_is_captured_is_refused(device: Any) -> None:
    queries, items = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))
    index = cuda.Index(items)
    device.streams(True, True)
    with pytest.raises(InputError, match="captured into a graph"):
        index.select(queries, k=2, sync=False)
    device.streams(True, False)
    assert revealed(index.select(queries, k=2, sync=False).ids) is not None
