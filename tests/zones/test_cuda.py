"""The CUDA backend through its Python layer: on a device against the reference, and its checks on any machine."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import math
import types
from typing import Any

import numpy as np
import pytest

from dqe_engine import device_arrays
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import ForeignArray
from dqe_engine.errors import BackendError, InputError
from dqe_engine.zones import ZoneSelection, cuda, pooled, reference, select_zones
from dqe_engine.zones.bitmaps import packed
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


# The checks of the Python layer need no device: a stand-in for the compiled module shows what would reach it.


class OnDevice:
    """An array that says it lies on a CUDA device."""

    def __init__(self, array: np.ndarray, device: int = 0, module: Module | None = None) -> None:
        self.array, self.device, self.module = array, device, module
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int) -> OnDevice:
        if self.module and self.module.current != self.device:  # as PyTorch from 2.10 on
            raise BufferError("Can't export tensors on a different CUDA device index.")
        self.streams.append(stream)
        return self


class Operand:
    def __init__(self, source: Any) -> None:
        self.on_device = isinstance(source, OnDevice)
        self.device = source.device if isinstance(source, OnDevice) else 0
        array = source.array if isinstance(source, OnDevice) else source
        self.shape, self.dtype, self.contiguous = array.shape, str(array.dtype), array.flags.c_contiguous


class Module:
    """What dqe_engine._kernels_cuda offers; `select` notes its options."""

    Operand = Operand
    Room = object

    def __init__(self, failure: Exception | None = None) -> None:
        self.options: dict[str, Any] = {}
        self.failure = failure
        self.current = 0

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: int) -> None:
        self.current = device

    def select(self, queries: Operand, items: Operand, **options: Any) -> dict[str, Any]:
        self.options = options
        if self.failure:
            raise self.failure
        return dict.fromkeys(FIELDS) | {"passes": 1}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    stand_in = Module()
    monkeypatch.setattr(cuda, "kernels", lambda: stand_in)
    return stand_in


QUERIES, ITEMS = OnDevice(np.zeros((2, 8), np.float32)), OnDevice(np.zeros((5, 8), np.float16))


def test_options_reach_the_kernels(module: Module) -> None:
    queries = OnDevice(np.zeros((2, 8), np.float32))
    anchor = np.array([1, 4])
    result = cuda.select(queries, ITEMS, k=3, anchor=anchor, zones=EVERYTHING, picks=2, counts=True, exclude=[[3, 1, 1], []], stream=77)
    assert result.backend == "cuda"
    assert queries.streams == [77]
    seen = module.options
    assert (seen["k"], seen["picks"], seen["counts"], seen["zones"], seen["ranks"]) == (3, 2, True, True, False)
    assert (seen["policy"], seen["temperature"], seen["seed"], seen["stream"]) == (2, 0.7, 2**63 + 5, 77)
    assert seen["offsets"].tolist() == [0, 2, 2]
    assert seen["excluded"].tolist() == [1, 3]
    assert seen["anchor"].dtype == "int64"
    assert seen["portable"] is False
    cuda.select(queries, ITEMS, k=1, exclude=[[3], []], allowed=np.array([0b01101], np.uint64))  # the device takes lists
    seen = module.options
    assert seen["offsets"].tolist() == [0, 3, 5]
    assert seen["excluded"].tolist() == [1, 3, 4, 1, 4]
    cuda.select(queries, ITEMS, k=1, portable=True)
    assert queries.streams == [77, 1, 1]  # DLPack's number of the default stream
    assert module.options["portable"] is True


def test_arrays_are_exported_while_their_device_is_current(module: Module) -> None:
    queries, items = OnDevice(QUERIES.array, 1, module), OnDevice(ITEMS.array, 1, module)
    cuda.select(queries, items, k=1)
    assert queries.streams == items.streams == [1]
    assert module.current == 0  # the caller's
    module.current = 3
    with pytest.raises(InputError, match="items: on CUDA device 0, the queries on device 1"):
        cuda.select(queries, OnDevice(ITEMS.array, 0, module), k=1)
    assert module.current == 3


def test_what_pytorch_does_not_export_is_refused_in_one_line(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    queries = torch.zeros(2, 8, requires_grad=True)
    monkeypatch.setattr(type(queries), "__dlpack_device__", lambda self: (2, 0))
    with pytest.raises(InputError, match=r"^queries: Tensor cannot be exported .*require gradient, use tensor\.detach\(\)$"):
        cuda.select(queries, ITEMS, k=1)


def test_an_index_takes_its_items_once_for_each_stream(module: Module) -> None:
    items = OnDevice(ITEMS.array)
    index = cuda.Index(items, stream=7)
    for stream in (7, 7, 8, 8, 7):
        assert index.select(QUERIES, k=1, stream=stream).backend == "cuda"
    assert items.streams == [7, 8]
    assert (index.size, index.tokens, index.width, index.device) == (5, 1, 8, 0)
    with pytest.raises(InputError, match="D=9 and items D=8"):
        index.select(OnDevice(np.zeros((2, 9), np.float32)), k=1)
    with pytest.raises(InputError, match="no tokens"):
        cuda.Index(OnDevice(np.zeros((5, 0, 8), np.float16)))


class DeviceMemory:
    """A driver whose device memory is the host's, and the kernels as NumPy's reference: what pooled zones need of a device."""

    def __init__(self) -> None:
        self.context, self.copied = 7, 0
        self.arrays: list[Any] = []

    def cuCtxGetCurrent(self, out: Any) -> int:
        out._obj.value = self.context
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, source: Any, size: Any) -> int:
        self.copied += size.value
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0

    def put(self, array: np.ndarray) -> ForeignArray:
        self.arrays.append(array)
        return ForeignArray(array.ctypes.data, array.shape, array.dtype)

    def select(self, queries: Any, items: Any, **options: Any) -> dict[str, Any]:
        spec = options["lo"], options["hi"], "rank" if options["ranks"] else "absolute"
        zones = ZoneSpec(lo=spec[0], hi=spec[1], bounds=spec[2]) if options["zones"] else None
        lists = np.split(options["excluded"], options["offsets"][1:-1])
        found = reference.select(
            validated(
                queries.array.astype(np.float32), items.array, zones=zones, exclude=lists, k=options["k"], picks=options["picks"],
                counts=options["counts"], anchor=None if options["anchor"] is None else options["anchor"].array,
            )
        )  # fmt: skip
        fields = {name: getattr(found, name) for name in FIELDS}
        return {name: None if value is None else self.put(value) for name, value in fields.items()} | {"passes": 1}

    def operand(self, module: Any, name: str, array: Any, *_: Any, **__: Any) -> Any:
        host = array if isinstance(array, np.ndarray) else next(a for a in self.arrays if a.ctypes.data == array.address)
        return types.SimpleNamespace(array=host, shape=host.shape, device=0, on_device=not isinstance(array, np.ndarray))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("anchor", ["best", "id", "id on host", "score"])
@pytest.mark.parametrize("bitmaps", [0, 1, 40])
def test_pooled_zones_are_resolved_from_rows_of_the_device(
    bitmaps: int, anchor: str, tokens: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory()
    monkeypatch.setattr(cuda, "kernels", lambda: memory)
    monkeypatch.setattr(cuda, "_operand", memory.operand)
    monkeypatch.setattr(device_arrays, "load_library", lambda name: memory)
    monkeypatch.setattr(pooled, "PAIRS", 1500)  # of 40 * 111
    monkeypatch.setattr(pooled, "LEAST_QUERIES", 20)
    rng = np.random.default_rng(tokens)
    queries = rng.integers(-3, 4, (40, 5)).astype(np.float16 if half else np.float32)
    items = rng.integers(-3, 4, (111, tokens, 5) if tokens else (111, 5)).astype(np.float16 if half else np.float32)
    exclude = rng.integers(0, 111, (40, 3))
    exclude[0], queries[1] = np.arange(3), np.nan  # a query without a score
    anchors: Any = {"best": None, "score": np.float32(rng.integers(0, 9, 40))}.get(anchor, rng.integers(0, 111, 40))
    zones = ZoneSpec(lo=0.1, hi=0.4, bounds="pooled")
    options: dict[str, Any] = {"zones": zones, "picks": 4, "counts": True, "exclude": exclude}
    if bitmaps:
        options["allowed"] = packed(rng.random((bitmaps, 111)) < 0.6)[0 if bitmaps == 1 else slice(None)]
    given = anchors if anchors is None or anchor == "id on host" else memory.put(anchors)
    found = cuda.select(memory.put(queries), memory.put(items), anchor=given, **options)
    expected = select_zones(queries.astype(np.float32), items, anchor=anchors, backend="reference", **options)
    for name in ("picks", "counts", "lo", "hi"):
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(memory.operand(None, name, getattr(found, name)).array, wanted, err_msg=name)
    assert memory.context == 7  # the caller's
    assert memory.copied < queries.nbytes + 2 * items.nbytes  # rows of the sample and the anchors, not all there is for each query
    with pytest.raises(InputError, match=r"anchor: id 111 is not a position"):
        cuda.select(memory.put(queries), memory.put(items), anchor=np.full(40, 111), **options)


@pytest.mark.parametrize(
    ("queries", "items", "options", "message"),
    [
        (np.zeros((2, 8), np.float32), ITEMS, {}, "queries: on DLPack device type 1"),
        ([[1.0]], ITEMS, {}, "queries: expected a CUDA array"),
        (QUERIES, OnDevice(np.zeros((5, 8))), {}, "items: dtype float64"),
        (QUERIES, OnDevice(np.zeros((5, 16), np.float16)[:, ::2]), {}, "items: not C-contiguous"),
        (QUERIES, OnDevice(np.zeros((5, 9), np.float16)), {}, "D=8 and items D=9"),
        (QUERIES, OnDevice(np.zeros((5, 0, 8), np.float16)), {}, "no tokens"),
        (QUERIES, OnDevice(np.zeros((5, 8), np.float16), device=1), {}, "items: on CUDA device 1"),
        (QUERIES, ITEMS, {"k": -1}, "k=-1"),
        (QUERIES, ITEMS, {"picks": 1}, "need zones"),
        (QUERIES, ITEMS, {"zones": ABSOLUTE, "anchor": np.zeros(3, np.float32)}, "3 entries for 2 queries"),
        (QUERIES, ITEMS, {"zones": ABSOLUTE, "anchor": np.zeros(2)}, "anchor: dtype float64"),
        (QUERIES, ITEMS, {"exclude": [[5], []]}, "exclude: id 5"),
        (QUERIES, ITEMS, {"workspace": np.zeros(5)}, "workspace: on DLPack device type 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_device(
    module: Module, queries: Any, items: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        cuda.select(queries, items, **{"k": 1, **options})


@pytest.mark.parametrize(("failure", "error"), [(ValueError("anchor: bad"), InputError), (RuntimeError("cudaErrorX"), BackendError)])
def test_failures_become_our_errors(module: Module, failure: Exception, error: type[Exception]) -> None:
    module.failure = failure
    with pytest.raises(error, match=str(failure)):
        cuda.select(QUERIES, ITEMS, k=1)


def test_without_the_module_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="DQE_CUDA=ON"):
        cuda.kernels()


def test_the_module_imports_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("dqe_engine._kernels_cuda") is None:
        pytest.skip("dqe_engine._kernels_cuda is not built")
    from dqe_engine import _kernels_cuda

    assert _kernels_cuda.device_count() >= 0
    lists = _kernels_cuda.workspace_bytes(64, 10**6, 1, 256, False, True, 100, 10, True, False, False, 5)
    assert lists < 64 << 20
    assert _kernels_cuda.workspace_bytes(64, 10**6, 1, 256, False, True, 100, 10, True, True, True, 5) < lists + 65 * 4 * 10**6
