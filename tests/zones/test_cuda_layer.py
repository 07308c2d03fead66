"""The checks of the CUDA backend's Python layer, which need no device: a stand-in for the compiled module shows what would reach it."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import types
from typing import Any

import numpy as np
import pytest

from dqe_engine import device_arrays
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import ForeignArray
from dqe_engine.errors import BackendError, InputError
from dqe_engine.zones import cuda, pooled, reference, select_zones
from dqe_engine.zones.bitmaps import packed
from dqe_engine.zones.request import validated

EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", seed=2**63 + 5, temperature=0.7)
ABSOLUTE = ZoneSpec(lo=0, hi=7, policy="hardest")
FIELDS = ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores")


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
        return dict.fromkeys(FIELDS) | {"search": None}


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
    with pytest.raises(InputError, match="items: on CUDA device 0, and the queries on device 1"):
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
        return {name: None if value is None else self.put(value) for name, value in fields.items()} | {"search": None}

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
        ([[1.0]], ITEMS, {}, "queries: got list, expected a CUDA array"),
        (QUERIES, OnDevice(np.zeros((5, 8))), {}, "items: dtype float64"),
        (QUERIES, OnDevice(np.zeros((5, 16), np.float16)[:, ::2]), {}, "items: not C-contiguous"),
        (QUERIES, OnDevice(np.zeros((5, 9), np.float16)), {}, "D=8 and items D=9"),
        (QUERIES, OnDevice(np.zeros((5, 0, 8), np.float16)), {}, "no tokens"),
        (QUERIES, OnDevice(np.zeros((5, 8), np.float16), device=1), {}, "items: on CUDA device 1"),
        (QUERIES, ITEMS, {"k": -1}, "k=-1"),
        (QUERIES, ITEMS, {"picks": 1}, "need zones"),
        (QUERIES, ITEMS, {"zones": ABSOLUTE, "anchor": np.zeros(3, np.float32)}, "3 entries, expected 2, one for each query"),
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
    assert _kernels_cuda.workspace_bytes(64, 10**6, 1, 256, False, True, 100, 10, True, True, True, 5) < lists + 65 * 5 * 10**6
