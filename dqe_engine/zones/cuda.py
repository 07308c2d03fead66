"""Zone selection on a CUDA device: arrays of any framework come in through DLPack and stay there, and so do the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import CudaMemory
from dqe_engine.errors import BackendError, InputError

from .arrays import I64, Exclusions, check_counts, check_ids, checked_bitmap, excluding_others, exclusions
from .bitmaps import U64
from .device_pending import Pending, PendingArray, device_errors
from .device_screen import SM_80, DeviceScreen, Unscreened
from .pooled import Pool, resolve
from .request import ZoneSelection

_POLICIES = {"hardest": 0, "uniform": 1, "softmax": 2}
_DLPACK_CPU, _DLPACK_CUDA = 1, 2
_LEGACY_DEFAULT_STREAM = 1  # DLPack's number for the handle 0
_NO_ZONES = ZoneSpec(lo=0.0, hi=0.0)


def kernels() -> ModuleType:
    """The compiled module. Raises BackendError where it is not built or no device is there."""
    if find_spec("dqe_engine._kernels_cuda") is None:
        raise BackendError(
            "backend='cuda': the CUDA kernels are not built; put nvcc on PATH and install with -C cmake.define.DQE_CUDA=ON, "
            "or use backend='cpu'"
        )
    module = import_module("dqe_engine._kernels_cuda")
    if module.device_count() == 0:
        raise BackendError(
            "backend='cuda': no CUDA device was found, or its driver is older than the kernels; update the driver, or use backend='cpu'"
        )
    return module


def workspace_bytes(
    batch: int,
    items: tuple[int, ...],
    *,
    half_queries: bool = False,
    half_items: bool = True,
    k: int = 0,
    zones: ZoneSpec | None = None,
    own_best: bool = True,
    picks: int = 0,
    excluded: int = 0,
    screened: bool = False,
) -> int:
    """Bytes of device memory that `select` needs beside operands and results, for `items` of shape (N, D) or (N, M, D), on the current
    CUDA device.

    own_best: no `anchor` is given. excluded: ids in all lists together. screened: the index has a screen.
    """
    if len(items) not in (2, 3):
        raise InputError(f"items: shape {items}, expected (N, D) or (N, M, D)")
    size, tokens, width = _with_tokens(items)
    ranks = zones is not None and zones.bounds == "rank"
    picks = picks if zones else 0
    result: int = kernels().workspace_bytes(
        batch, size, tokens, width, half_queries, half_items, k, picks, zones is not None, own_best, ranks, excluded, screened
    )
    return result


def select(queries: Any, items: Any, *, stream: int = 0, **options: Any) -> ZoneSelection:
    """`Index(items).select(queries, ...)`, for items that are searched once."""
    return Index(items, stream=stream).select(queries, stream=stream, **options)


class Index:
    """Items on a CUDA device, checked once for many searches.

    items: (N, D) or (N, M, D), float16 or float32, C-contiguous. float16 items use the tensor cores: float32 queries are split in two
        float16 parts, which keeps about 22 bits of each coordinate. They stay where they are, and alive as long as the index is; after
        writing to them make a new one.
    stream: handle of the CUDA stream that the first searches work on.
    screen: keep an 8-bit copy of the items too (half the memory of float16 items again, a quarter of float32), by whose certified bounds a
        top-k without zones reads only what can be among the best; results stay equal to the bit. "auto" uses it where that is expected to
        be faster on this device (`describe`), True wherever it can. Such a search takes the kernels for sm_80 (see `architecture`), whose
        results it has. Not run on a device yet.

    It keeps a workspace as large as the largest that a search has needed. Threads may search at the same time, and those that find the
    workspace taken allocate memory for the time of the call.

    Raises InputError for arrays that do not fit, BackendError where kernels or device are missing.
    """

    def __init__(self, items: Any, *, stream: int = 0, screen: bool | Literal["auto"] = False) -> None:
        self._module = kernels()
        self._operand: Any = None  # before `_items`, and let go before it: the array must outlive what was taken from it
        self._items = items
        self._operand = self._taken(stream)
        self._ready = {stream}
        self._room = self._module.Room()
        self.device: int = self._operand.device
        self.size, self.tokens, self.width = _with_tokens(self._operand.shape)
        if self.tokens == 0:
            raise InputError(f"items of shape {self._operand.shape} have no tokens; the middle axis (M) must be at least 1")
        self._screen = None
        if screen:
            rule = DeviceScreen(self.size, self.tokens, self.width, 2 if self._operand.dtype == "float16" else 4, always=screen is True)
            with device_errors():
                self._codes = self._module.Codes(self._operand, stream) if rule.suits else None
            self._screen = rule

    def describe(self, batch: int = 1, k: int = 10, *, half_queries: bool = False) -> str:
        """What a search of `batch` queries for the `k` best would read, why, and which kernels it takes."""
        kernels = self.architecture(batch, k=k, half_queries=half_queries)
        if self._screen is None:
            return f"no screen was asked for: every search reads the items (screen='auto' keeps 8-bit codes too); {kernels} kernels"
        return f"{self._screen.describe(batch, k, self._unscreened(batch, half_queries))}; {kernels} kernels"

    def _taken(self, stream: int) -> Any:
        return _operand(self._module, "items", self._items, ("float16", "float32"), (2, 3), stream)

    def _unscreened(self, batch: int, half_queries: bool) -> Unscreened:
        architecture, a_pass = self._module.architecture(self._operand, batch, half_queries, False, False)
        return architecture, a_pass

    def architecture(
        self,
        batch: int,
        *,
        k: int = 10,
        half_queries: bool = False,
        zones: ZoneSpec | None = None,
        own_best: bool = True,
        excluded: int = 0,
    ) -> str:
        """Which kernels give the scores of a search of `batch` queries: "sm_90a" (TMA and wgmma; H100 and H200 alone) or "sm_80" (all
        devices).

        sm_90a serves float16 items whose rows begin at multiples of 16 bytes, if M is a power of two up to 128 and the prepared queries
        fit shared memory: D up to 640 for float16 queries, 320 for float32 ones. A search that uses the screen takes sm_80 for all that
        it scores, and so do zones with ranks or exclusions over more items than scores can be kept of (some 4 million).

        k: of a search without zones. zones, own_best, excluded: as for `workspace_bytes`.
        """
        if zones is not None:
            asked = own_best, zones.bounds == "rank", excluded > 0
            kernels: str = self._module.architecture(self._operand, batch, half_queries, True, False, *asked)[0]
            return kernels
        unscreened = self._unscreened(batch, half_queries)
        architecture = unscreened[0]
        if self._screen is not None and self._screen.would_pay(batch, k, unscreened):
            architecture = self._module.architecture(self._operand, batch, half_queries, False, True)[0]
        return architecture

    def select(
        self,
        queries: Any,
        *,
        k: int = 0,
        anchor: Any = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        counts: bool = False,
        exclude: Exclusions | None = None,
        allowed: U64 | None = None,
        first_query: int = 0,
        portable: bool = False,
        stream: int = 0,
        workspace: Any = None,
        sync: bool = True,
    ) -> ZoneSelection:
        """What `select_zones` selects; the result's fields are DLPack arrays on the items' device.

        queries: (B, D) float32 or float16, on the items' device.
        anchor: None, or int64 or float32 (B,) on the device or as a NumPy array.
        zones: pooled ones cost copies of some thousand rows to the host, and a second call where `anchor` is None; to pay once for many
            calls, resolve them before (`resolve_pooled`).
        exclude, allowed: as in `select_zones`, on the host. The device takes lists alone, so what is not allowed is excluded: 8 bytes for
            each query and item, which filters that pass much can afford.
        portable: take the kernels for sm_80 also where those for sm_90a would serve (see `architecture`). Scores may differ in their last
            bits.
        stream: handle of the CUDA stream to work on (`torch.cuda.current_stream().cuda_stream`). The result's memory is freed behind the
            work on the streams that took it (`torch.from_dlpack` names the current one).
        sync: wait for the search before the call returns. False: it is started alone, and whoever takes the first of its arrays through
            DLPack waits for it. A list of candidates that overflowed is found then, and the search repeated; a wrong anchor or a device
            that failed is raised then, at each try. Several searches of an index may be under way, on one stream or several, as may
            other work. Queries and anchors on the device are copied first: work behind the search on `stream` may write over them. A
            result that nobody takes is waited for when it is dropped. `rescored` is None. While the stream is captured into a graph,
            such a search is refused.
        workspace: an array on the device of at least `workspace_bytes(...)` bytes; None for the index's own. Zones measured from
            the query's own best, with ranks as bounds or with exclusions keep the scores of a block of queries in it: up to 1 GiB, and a
            quarter of that for ranks. sm_90a copies the items of given anchors to it, 2·M·D bytes for each query of a block (1,024).

        Raises InputError for arguments that do not fit, BackendError where kernels or device are missing or the device fails.
        """
        if zones is None and (picks or counts or anchor is not None):
            raise InputError("anchor, picks and counts need zones: pass zones=ZoneSpec(lo=..., hi=...)")
        q, t, a, room = self._operands(queries, anchor, workspace, stream)
        batch, size = q.shape[0], self.size
        check_counts(batch, k=k, picks=picks, first_query=first_query)
        bitmap = None if allowed is None else checked_bitmap(allowed, batch, size)
        if bitmap is not None:
            exclude = excluding_others(exclude, bitmap, batch, size)
        offsets, excluded = exclusions(exclude, batch, size)
        offsets, excluded = (np.array(part, np.int64) if not sync else np.ascontiguousarray(part, np.int64) for part in (offsets, excluded))
        if not sync and isinstance(anchor, np.ndarray):  # the caller may write over it
            a = self._module.Operand(anchor.copy())
        screen = self._screen_for(batch, k, q.dtype == "float16", portable=portable) if zones is None else None

        def swept(spec: ZoneSpec | None, k: int, picks: int, counts: bool, anchor: Any, workspace: Any, sync: bool) -> dict[str, Any]:
            given = spec or _NO_ZONES
            with device_errors():
                fields: dict[str, Any] = self._module.select(
                    q,
                    t,
                    k=k,
                    picks=picks,
                    counts=counts,
                    zones=spec is not None,
                    ranks=given.bounds == "rank",
                    lo=given.lo,
                    hi=given.hi,
                    policy=_POLICIES[given.policy],
                    temperature=given.temperature,
                    seed=given.seed,
                    anchor=anchor,
                    first_query=first_query,
                    offsets=offsets,
                    excluded=excluded,
                    portable=portable,
                    stream=stream,
                    workspace=workspace,
                    room=self._room,
                    codes=self._codes if screen else None,
                    sync=sync,
                )
            started = fields.pop("search")
            if started is not None:
                pending = Pending(started, partial(screen.learn, batch, k) if screen else None, self, queries, a, anchor, workspace)
                return {name: None if value is None else PendingArray(value, pending) for name, value in fields.items()}
            if screen:
                fields["rescored"] = screen.learn(batch, k, fields["rescored"])
            return fields

        if zones is not None and zones.bounds == "pooled":
            best = swept(None, 1, 0, False, None, None, True)["ids"] if anchor is None and size else None
            hidden: dict[str, Any] = {"offsets": offsets, "excluded": excluded, "allowed": bitmap}
            sizes = {"batch": batch, "size": size, "tokens": self.tokens}
            zones = _resolve_pooled(zones, queries, self._items, anchor, best, device=q.device, **sizes, **hidden)
        return ZoneSelection(**swept(zones, k, picks, counts, a, room, sync), backend="cuda")

    def _operands(self, queries: Any, anchor: Any, workspace: Any, stream: int) -> tuple[Any, Any, Any, Any]:
        """Queries, items, anchor and workspace as the kernels take them, checked and on one device. Raises InputError."""
        q = _operand(self._module, "queries", queries, ("float32", "float16"), (2,), stream)
        if stream not in self._ready:  # what produced the items has to be waited for there too
            self._operand = self._taken(stream)
            self._ready.add(stream)
        t, (batch, width) = self._operand, q.shape
        if width != self.width or width == 0:
            raise InputError(f"queries have D={width} and items D={self.width}; both must be the same, at least 1")
        a = None if anchor is None else _operand(self._module, "anchor", anchor, ("int64", "float32"), (1,), stream, host=True)
        if a is not None and a.shape != (batch,):
            raise InputError(f"anchor: {a.shape[0]} entries, expected {batch}, one for each query")
        room = None if workspace is None else _operand(self._module, "workspace", workspace, None, None, stream)
        for name, operand in (("items", t), ("anchor", a if a is not None and a.on_device else None), ("workspace", room)):
            if operand is not None and operand.device != q.device:
                raise InputError(f"{name}: on CUDA device {operand.device}, and the queries on device {q.device}; move one of them")
        return q, t, a, room

    def _screen_for(self, batch: int, k: int, half_queries: bool, *, portable: bool) -> DeviceScreen | None:
        """The screen, if a top-k search that is now carried out uses it."""
        if self._screen is None:
            return None
        unscreened = SM_80 if portable else self._unscreened(batch, half_queries)
        return self._screen if self._screen.pays(batch, k, unscreened) else None


def _resolve_pooled(
    spec: ZoneSpec,
    queries: Any,
    items: Any,
    anchor: Any,
    best: Any,
    *,
    device: int,
    offsets: I64,
    excluded: I64,
    allowed: U64 | None,
    **sizes: int,
) -> ZoneSpec:
    """The absolute zones for arrays on a device. best: (B, 1) each query's own best, where that is the anchor."""
    with CudaMemory.open(device) as memory:
        anchors = best if anchor is None else anchor
        on_host = anchors if anchors is None or isinstance(anchors, np.ndarray) else memory.download(anchors)
        ids = None if on_host is None or on_host.dtype != np.int64 else on_host.reshape(-1)
        if ids is not None and anchor is not None:
            check_ids("anchor", ids, sizes["size"])
        pool = Pool(
            queries=lambda rows: memory.download(queries, rows).astype(np.float32, copy=False),
            items=lambda positions: _with_token_axis(memory.download(items, positions)),
            anchor_ids=ids,
            anchor_scores=None if on_host is None or ids is not None else on_host,
            offsets=offsets,
            excluded=excluded,
            allowed=allowed,
            **sizes,
        )
        return resolve(spec, pool)


def _with_token_axis(items: NDArray[Any]) -> NDArray[Any]:
    return items[:, None, :] if items.ndim == 2 else items


def _with_tokens(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(N, D) is (N, 1, D)."""
    return shape[0], 1 if len(shape) == 2 else shape[1], shape[-1]


def _operand(
    module: ModuleType,
    name: str,
    array: Any,
    dtypes: tuple[str, ...] | None,
    ranks: tuple[int, ...] | None,
    stream: int,
    *,
    host: bool = False,
) -> Any:
    """Import an array through DLPack, ready on `stream`, and check it. Raises InputError."""
    if not hasattr(array, "__dlpack_device__"):
        raise InputError(f"{name}: got {type(array).__name__}, expected a CUDA array with DLPack, such as a torch.Tensor on the device")
    kind, number = (int(part) for part in array.__dlpack_device__())
    if kind != _DLPACK_CUDA and not (host and isinstance(array, np.ndarray)):
        raise InputError(f"{name}: on DLPack device type {kind}, expected CUDA ({_DLPACK_CUDA}); move it there, or use backend='cpu'")
    operand = module.Operand(array if kind != _DLPACK_CUDA else _exported(module, name, array, number, stream))
    if dtypes is not None and operand.dtype not in dtypes:
        raise InputError(f"{name}: dtype {operand.dtype}, expected {' or '.join(dtypes)}; convert it first")
    if ranks is not None and len(operand.shape) not in ranks:
        raise InputError(f"{name}: shape {operand.shape}, expected {' or '.join(map(str, ranks))} dimensions")
    if not operand.contiguous:
        raise InputError(f"{name}: not C-contiguous; pass a contiguous copy")
    return operand


def _exported(module: ModuleType, name: str, array: Any, device: int, stream: int) -> Any:
    """The array's DLPack capsule; its producer makes `stream` wait for what it still computes. Raises InputError."""
    try:
        with _current(module, device):  # PyTorch exports from the current device alone
            return array.__dlpack__(stream=stream or _LEGACY_DEFAULT_STREAM)
    except BufferError as e:
        raise InputError(f"{name}: {type(array).__name__} cannot be exported through DLPack: {e}") from e


@contextmanager
def _current(module: ModuleType, device: int) -> Iterator[None]:
    before = module.current_device()
    if before == device:
        yield
        return
    module.set_device(device)
    try:
        yield
    finally:
        module.set_device(before)
