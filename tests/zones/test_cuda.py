"""The CUDA backend on a device, against the reference."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import ZoneSelection, cuda, pooled, reference, select_zones
from dqe_engine.zones.request import ZoneRequest, validated

EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", seed=2**63 + 5, temperature=0.7)
ABSOLUTE = ZoneSpec(lo=0, hi=7, policy="hardest")
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")
FIELDS = ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores")


def request_of(
    seed: int,
    batch: int,
    size: int,
    tokens: int,
    width: int,
    *,
    half: bool = True,
    k: int = 10,
    picks: int = 5,
    anchor: str = "best",
    zones: ZoneSpec | None = RANKS,
    special: bool = True,
    excluded: int = 3,
) -> ZoneRequest:
    """Integer coordinates: dot products are exact, so results must be equal to the bit, ties included."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-3, 4, (batch, width)).astype(np.float32)
    items = rng.integers(-3, 4, (size, tokens, width)).astype(np.float16 if half else np.float32)
    if size and special:
        for value in (math.nan, math.inf, -math.inf):
            items[rng.integers(0, size, 1 + size // 50), rng.integers(0, tokens), rng.integers(0, width)] = value
        items[size // 2 :: 7] = items[size // 2]
    queries[: batch // 4] = 0
    anchors: dict[str, Any] = {
        "best": None,
        "id": rng.integers(0, max(size, 1), batch) if size else None,
        "score": rng.integers(-9, 30, batch).astype(np.float32),
    }
    return validated(
        queries,
        items,
        k=k,
        anchor=anchors[anchor] if zones else None,
        zones=zones,
        picks=picks if zones else 0,
        counts=zones is not None,
        exclude=rng.integers(0, size, (batch, excluded)) if size else None,
        first_query=seed,
    )


def run(request: ZoneRequest, *, half_queries: bool = False, device: str = "cuda:0", **options: Any) -> dict[str, np.ndarray | None]:
    """Select on the device and bring the fields back."""
    import torch

    queries = torch.from_numpy(request.queries).to(device)
    anchor = request.anchor_ids if request.anchor_ids is not None else request.anchor_scores
    lists = np.split(request.excluded, request.offsets[1:-1]) if request.batch else []
    result = cuda.select(
        queries.half() if half_queries else queries,
        torch.from_numpy(np.concatenate(request.shards)).to(device),
        k=request.k,
        anchor=None if anchor is None else torch.from_numpy(anchor).to(device),
        zones=request.zones,
        picks=request.picks,
        counts=request.counts,
        exclude=lists,
        first_query=request.first_query,
        **options,
    )
    return on_host(result)


def on_host(result: ZoneSelection) -> dict[str, np.ndarray | None]:
    import torch

    fields = {name: getattr(result, name) for name in FIELDS}
    return {name: None if value is None else torch.from_dlpack(value).cpu().numpy() for name, value in fields.items()}


def assert_same(result: dict[str, np.ndarray | None], expected: ZoneSelection) -> None:
    for name in FIELDS:
        wanted, got = getattr(expected, name), result[name]
        assert (wanted is None) == (got is None), name
        if got is not None:
            assert got.dtype == wanted.dtype, name
            np.testing.assert_array_equal(got, wanted, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 19, 111, 4097, 50_000])
@pytest.mark.parametrize("batch", [0, 1, 16, 17, 64, 300])
@pytest.mark.parametrize(("half", "half_queries"), [(True, False), (True, True), (False, False), (False, True)])
def test_device_equals_reference(size: int, batch: int, half: bool, half_queries: bool) -> None:
    for anchor, zones in (("best", EVERYTHING), ("id", RANKS), ("score", ABSOLUTE), ("best", None)):
        if size * batch > 2_000_000 and zones is not RANKS:
            continue  # the reference takes seconds
        request = request_of(batch, batch, size, 1, 8, half=half, anchor=anchor, zones=zones)
        assert_same(run(request, half_queries=half_queries), reference.select(request))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 33, 128, 129, 300])
@pytest.mark.parametrize("width", [1, 3, 64, 256, 257, 768, 1024])
@pytest.mark.parametrize("half", [True, False])
def test_tokens_and_widths(tokens: int, width: int, half: bool) -> None:
    request = request_of(tokens, 70, 150, tokens, width, half=half, anchor="id")
    assert_same(run(request), reference.select(request))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 111, 5000, 5003])
@pytest.mark.parametrize("zones", [EVERYTHING, ABSOLUTE, RANKS])
def test_counts_of_results(count: int, zones: ZoneSpec) -> None:
    request = request_of(count, 5, 5000, 1, 8, k=count, picks=count, zones=zones)
    assert_same(run(request), reference.select(request))


@pytest.mark.gpu
def test_real_vectors_agree_within_rounding(rng: np.random.Generator) -> None:
    queries, items = rng.standard_normal((64, 256)), rng.standard_normal((20_000, 256))
    queries, items = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, items))
    for half in (True, False):
        request = validated(
            queries.astype(np.float32),
            items.astype(np.float16 if half else np.float32),
            k=100,
            anchor=rng.integers(0, 20_000, 64),
            zones=ZoneSpec(lo=0.01, hi=0.2, bounds="rank", policy="softmax"),
            picks=8,
            counts=True,
            exclude=None,
        )
        got, expected = run(request), reference.select(request)
        for name in ("scores", "lo", "hi", "anchor_scores"):
            np.testing.assert_allclose(got[name], getattr(expected, name), rtol=0, atol=2e-6, err_msg=name)
        assert got["ids"] is not None
        assert (got["ids"] == expected.ids).mean() > 0.99
        assert got["picks"] is not None
        assert (got["picks"] == expected.picks).mean() > 0.99


@pytest.mark.gpu
def test_an_anchor_lies_at_delta_zero(rng: np.random.Generator) -> None:
    ids = rng.integers(0, 5000, 70)
    request = validated(
        rng.standard_normal((70, 100)).astype(np.float32),
        rng.standard_normal((5000, 3, 100)).astype(np.float16),
        k=0,
        anchor=ids,
        zones=ZoneSpec(lo=0, hi=0, policy="hardest"),
        picks=1,
        counts=True,
        exclude=None,
    )
    picks = run(request)["picks"]
    assert picks is not None
    np.testing.assert_array_equal(picks[:, 0], ids)


@pytest.mark.gpu
def test_runs_are_equal_to_the_bit(rng: np.random.Generator) -> None:
    request = validated(
        rng.standard_normal((70, 100)).astype(np.float32),
        rng.standard_normal((30_000, 100)).astype(np.float16),
        k=100,
        anchor=None,
        zones=RANKS,
        picks=10,
        counts=True,
        exclude=None,
    )
    first = run(request)
    for _ in range(5):
        again = run(request)
        for name in FIELDS:
            np.testing.assert_array_equal(first[name], again[name], err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("half_queries", [False, True])
@pytest.mark.parametrize("tokens", [1, 32])
def test_kernels_for_hopper_select_what_others_select(rng: np.random.Generator, tokens: int, half_queries: bool) -> None:
    import torch

    hopper = torch.cuda.get_device_capability() == (9, 0)
    for batch, exact in itertools.product((1, 64, 129, 300), (True, False)):
        draw = functools.partial(rng.integers, -3, 4) if exact else functools.partial(rng.normal, 0, 1)
        queries = torch.from_numpy(draw(size=(batch, 256)).astype(np.float32)).cuda()
        items = torch.from_numpy(draw(size=(60_000 // tokens, tokens, 256)).astype(np.float16)).cuda()
        index = cuda.Index(items)
        assert index.architecture(batch, half_queries=half_queries) == ("sm_90a" if hopper else "sm_80")
        found, others = (
            on_host(index.select(queries.half() if half_queries else queries, k=100, portable=portable)) for portable in (False, True)
        )
        np.testing.assert_allclose(found["scores"], others["scores"], rtol=0, atol=0 if exact else 2e-4)
        if exact:
            np.testing.assert_array_equal(found["ids"], others["ids"])


@pytest.mark.gpu
@pytest.mark.parametrize("half_queries", [False, True])
@pytest.mark.parametrize("tokens", [1, 32])
def test_zones_by_the_kernels_for_hopper_are_those_of_others(rng: np.random.Generator, tokens: int, half_queries: bool) -> None:
    """Where dot products are exact; elsewhere an anchor's own item is the one at distance 0, whatever the instruction rounds to."""
    import torch

    hopper = torch.cuda.get_device_capability() == (9, 0)
    band = ZoneSpec(lo=20, hi=90, policy="softmax", temperature=20.0)
    ranks = ZoneSpec(lo=0.01, hi=0.1, bounds="rank", policy="uniform")
    own = {"zones": ZoneSpec(lo=0, hi=0, policy="hardest"), "picks": 1}
    for batch, exact in itertools.product((1, 64, 129, 300), (True, False)):
        draw = functools.partial(rng.integers, -3, 4) if exact else functools.partial(rng.normal, 0, 1)
        queries = torch.from_numpy(draw(size=(batch, 256)).astype(np.float32)).cuda()
        queries = queries.half() if half_queries else queries
        items = torch.from_numpy(draw(size=(60_000 // tokens, tokens, 256)).astype(np.float16)).cuda()
        index, ids = cuda.Index(items), rng.integers(0, len(items), batch)
        assert index.architecture(batch, half_queries=half_queries, zones=band) == ("sm_90a" if hopper else "sm_80")
        if not exact:
            np.testing.assert_array_equal(on_host(index.select(queries, anchor=ids, **own))["picks"][:, 0], ids)
            continue
        for anchor, zones in itertools.product((None, ids), (band, ranks)):
            options = {"k": 20, "anchor": anchor, "zones": zones, "picks": 30, "counts": True}
            found, others = (on_host(index.select(queries, portable=portable, **options)) for portable in (False, True))
            for name in FIELDS:
                np.testing.assert_array_equal(found[name], others[name], err_msg=name)


@pytest.mark.gpu
def test_the_callers_stream_and_workspace() -> None:
    import torch

    request = request_of(3, 17, 4097, 2, 64, anchor="id")
    expected = reference.select(request)
    needed = cuda.workspace_bytes(17, (4097, 2, 64), k=10, zones=RANKS, own_best=False, picks=5, excluded=len(request.excluded))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        room = torch.full((needed,), 255, dtype=torch.uint8, device="cuda")
        assert_same(run(request, stream=side.cuda_stream, workspace=room), expected)
        with pytest.raises(InputError, match="workspace"):
            run(request, stream=side.cuda_stream, workspace=room[: needed - 1])


@pytest.mark.gpu
def test_waits_for_what_the_producer_still_computes() -> None:
    import torch

    side = torch.cuda.Stream()
    slow = torch.randn(4000, 4000, device="cuda")
    queries = torch.zeros(1, 8, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        slow = slow @ slow * 1e-4
    queries += 1  # on the current stream, behind the products
    items = torch.eye(8, device="cuda", dtype=torch.float16)
    result = on_host(cuda.select(queries, items, k=8, stream=side.cuda_stream))
    np.testing.assert_array_equal(result["scores"], np.ones((1, 8)))


@pytest.mark.gpu
def test_searches_that_are_under_way_together(rng: np.random.Generator) -> None:
    """On two streams, of growing size, the queries written over behind them, one list that overflows among them."""
    import torch

    items = torch.from_numpy(rng.standard_normal((200_000, 64)).astype(np.float16)).cuda()
    unlucky = torch.zeros(50_000, 64, device="cuda", dtype=torch.float16)
    unlucky[:, 0] = torch.from_numpy(np.where((np.arange(50_000) // 128 % 16 == 0) & (np.arange(50_000) < 24 * 16 * 128), 0.0, 1.0))
    queries = torch.from_numpy(rng.standard_normal((70, 64)).astype(np.float32)).cuda()
    queries[:, 0] = 1
    torch.cuda.synchronize()
    asked: list[dict[str, Any]] = [{"k": 5}, {"k": 100}, {"k": 5000}, {"k": 5, "zones": RANKS, "picks": 9, "counts": True}]
    for given in (items, unlucky):
        index, streams = cuda.Index(given), [torch.cuda.Stream() for _ in range(2)]
        expected = [on_host(index.select(queries, **options)) for options in asked]
        found = []
        for n, options in enumerate(asked):
            with torch.cuda.stream(streams[n % 2]):
                own = queries.clone()
                found.append(index.select(own, **options, stream=streams[n % 2].cuda_stream, sync=False))
                own.fill_(7)
        for result, wanted in zip(reversed(found), reversed(expected), strict=True):
            for name, value in on_host(result).items():
                np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@pytest.mark.gpu
def test_what_does_not_fit_is_refused() -> None:
    import torch

    queries, items = torch.zeros(2, 8, device="cuda"), torch.zeros(5, 8, device="cuda", dtype=torch.float16)
    for bad_queries, bad_items, message in (
        (queries.cpu(), items, "queries: on DLPack device"),
        (queries, items.cpu(), "items: on DLPack device"),
        (queries.double(), items, "queries: dtype"),
        (queries, items.to(torch.bfloat16), "items: dtype"),
        (queries, items[:, :4], "items: not C-contiguous"),
        (queries, items[:, :4].contiguous(), "D=8 and items D=4"),
        (queries[0], items, "queries: shape"),
    ):
        with pytest.raises(InputError, match=message):
            cuda.select(bad_queries, bad_items, k=1)
    with pytest.raises(InputError, match="anchor"):
        cuda.select(queries, items, zones=ABSOLUTE, anchor=np.array([0, 5]), counts=True)


@pytest.mark.gpu
def test_the_callers_device_stays_current() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    request = request_of(3, 17, 111, 2, 64)
    with torch.cuda.device(0):
        assert_same(run(request, device="cuda:1"), reference.select(request))
        assert torch.cuda.current_device() == 0
    with pytest.raises(InputError, match="CUDA device"):
        cuda.select(torch.zeros(2, 8, device="cuda:0"), torch.zeros(5, 8, device="cuda:1"), k=1)


@pytest.mark.gpu
@pytest.mark.parametrize("anchor", ["best", "id", "score"])
@pytest.mark.parametrize("pairs", [pooled.PAIRS, 20_000])
def test_pooled_zones_are_the_references(anchor: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(pooled, "PAIRS", pairs)  # all pairs, or a sample of them
    monkeypatch.setattr(pooled, "LEAST_QUERIES", 20)
    rng = np.random.default_rng(0)
    queries, items = rng.integers(-3, 4, (65, 64)).astype(np.float32), rng.integers(-3, 4, (3001, 2, 64)).astype(np.float16)
    anchors = {"best": None, "id": rng.integers(0, 3001, 65), "score": rng.integers(-9, 90, 65).astype(np.float32)}[anchor]
    zones = ZoneSpec(lo=0.1, hi=0.4, bounds="pooled")
    options: dict[str, Any] = {"zones": zones, "picks": 5, "counts": True, "k": 3, "exclude": rng.integers(0, 3001, (65, 2))}
    expected = select_zones(queries, items, anchor=anchors, backend="reference", **options)
    on_device = None if anchors is None else torch.from_numpy(anchors).cuda()
    result = select_zones(torch.from_numpy(queries).cuda(), torch.from_numpy(items).cuda(), anchor=on_device, **options)
    assert_same(on_host(result), expected)
