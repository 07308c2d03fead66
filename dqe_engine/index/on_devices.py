"""`DeviceIndex`: the target tokens of a `GalleryIndex` on one or more CUDA devices, searched there. It has run on stand-ins alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import CudaMemory
from dqe_engine.errors import InputError
from dqe_engine.forks import ProcessBound
from dqe_engine.zones import ZoneSelection, cuda
from dqe_engine.zones.arrays import F32
from dqe_engine.zones.bitmaps import WORD, words_for

from .columns import Rows
from .filters import Combination, Filter
from .gallery import GalleryIndex
from .merging import best_scores, merge_answers
from .searched import Ability, Health
from .snapshot import IndexMatches, Snapshot
from .validation import check_search


class Slice(Protocol):
    """Consecutive rows of an index on one device."""

    def select(self, queries: F32, **options: Any) -> ZoneSelection:
        """`cuda.Index.select` for queries on the host, with what it found as NumPy arrays."""


class CudaSlice:
    """Rows on the CUDA device of that number. Raises InputError where there is no such device, BackendError where it has no room."""

    def __init__(self, parts: Sequence[Rows], device: int) -> None:
        check_devices([device])
        self._device = device
        with CudaMemory.open(device) as memory:
            self._index = cuda.Index(memory.placed([np.ascontiguousarray(part) for part in parts]))

    def select(self, queries: F32, **options: Any) -> ZoneSelection:
        with CudaMemory.open(self._device) as memory:
            found = self._index.select(memory.upload(queries), **options)
            values = {field.name: getattr(found, field.name) for field in fields(found)}
            arrays: dict[str, Any] = {name: memory.download(value) for name, value in values.items() if hasattr(value, "__dlpack__")}
            return replace(found, **arrays)


def check_devices(devices: Sequence[int]) -> None:
    """Raises InputError for a CUDA device that is not there, BackendError where there is none at all or the kernels are not built."""
    if not devices:
        return
    count = cuda.kernels().device_count()
    for device in devices:
        if device >= count:
            raise InputError(f"device {device}: this machine has {count} CUDA devices, numbered from 0; choose among them")


OpenSlice = Callable[[Sequence[Rows], int], Slice]


@dataclass(frozen=True, eq=False)
class DeviceSnapshot(Snapshot):
    """A `Snapshot` that is searched on devices; all else is read from the host."""

    slices: tuple[tuple[int, int, Slice], ...] = ()
    """First row, last row + 1, and the rows on their device; the first row is a multiple of `WORD`."""
    workers: ThreadPoolExecutor | None = None

    def search(
        self,
        queries: F32,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | Combination | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        anchors: F32 | None = None,
        threads: int = 0,
    ) -> tuple[IndexMatches, ...]:
        """See `Snapshot.search`. `threads`: without effect. Raises InputError for picks by a draw from several slices, since a draw belongs
        to a position in one array, and for what `GalleryIndex.search` refuses."""
        check_search(queries, k, self.targets[0].shape[2], exclude=exclude, zones=zones, picks=picks)
        if zones is not None and picks and zones.policy != "hardest" and len(self.slices) > 1:
            raise InputError(
                f"picks by policy {zones.policy!r}: random draws need the rows of one device, not of {len(self.slices)}; take policy "
                "'hardest'"
            )
        allowed, excluded, count = self._candidates(exclude, filter)

        def ask(part: tuple[int, int, Slice], **options: Any) -> tuple[IndexMatches, ...]:
            start, end, rows = part
            words = None if allowed is None else allowed[start // WORD : words_for(end)]
            lists = None if excluded is None else [ids[(ids >= start) & (ids < end)] - start for ids in excluded]
            return self._answers(rows.select(np.ascontiguousarray(queries), exclude=lists, allowed=words, **options), start)

        def ask_all(k: int, zones: ZoneSpec | None, anchors: F32 | None) -> dict[int, tuple[IndexMatches, ...]]:
            options: dict[str, Any] = {
                "k": min(k, count),
                "zones": zones,
                "counts": zones is not None,
                "picks": min(picks, count) if zones else 0,
            }
            one = partial(ask, **options, anchor=anchors if zones else None)
            return dict(enumerate(map(one, self.slices) if self.workers is None else self.workers.map(one, self.slices)))

        if len(self.slices) == 1:
            return ask_all(k, zones, anchors)[0]
        found = ask_all(k, None, None)
        zoned = None if zones is None else ask_all(0, zones, best_scores(found, len(queries)) if anchors is None else anchors)
        return merge_answers(found, zoned, queries=len(queries), k=k, picks=picks)


class DeviceIndex(ProcessBound):
    """The target tokens of `index`, as it is now, on these CUDA devices, for an engine to `attach`. Metadata, filters and image tokens stay
    on the host. After changes to `index` make a new one.

    devices: numbers of CUDA devices. Each holds a part of the rows, about as many as every other. A search asks all of them at the same
    time; where zones are counted, by Δ to the best hit of all, a second time. Storage "f16" takes half the memory, and the tensor cores.
    A filter costs 8 bytes on the device for each query and item that does not pass.
    """

    instead = "make it in the other process, from its own index"

    def __init__(self, index: GalleryIndex, devices: Sequence[int] = (0,), *, open_slice: OpenSlice = CudaSlice) -> None:
        """`open_slice` puts rows on a device. Raises InputError for devices that are not there, BackendError where one has no room."""
        given = list(devices)
        if not given or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in given) or len({*given}) < len(given):
            raise InputError(f"devices: expected different numbers from 0, at least one, got {given}")
        snapshot = index.snapshot()
        slices = []
        for n, device in enumerate(given):
            start, end = (_bound(snapshot.rows, at, len(given)) for at in (n, n + 1))
            if start < end:
                slices.append((start, end, open_slice(_cut(snapshot.targets, start, end), device)))
        self._require_model, self._devices = index.require_model, given
        self._lacks: Mapping[Ability, str] = {**index.lacks, "write": "change the index that it was made from, and make it again"}
        self._workers = ThreadPoolExecutor(len(slices), "dqe-device") if len(slices) > 1 else None
        held = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
        self._now: DeviceSnapshot | None = DeviceSnapshot(**held, slices=tuple(slices), workers=self._workers)
        self.bind_to_process()

    def __repr__(self) -> str:
        return f"<DeviceIndex of {0 if self._now is None else self._now.count} items on CUDA devices {self._devices}>"

    def snapshot(self) -> DeviceSnapshot:
        self.check_process()
        if self._now is None:
            raise InputError("this index is closed; make it again")
        return self._now

    at_hand, watched = True, None

    @property
    def lacks(self) -> Mapping[Ability, str]:
        return self._lacks

    def refresh(self) -> bool:
        """There is nothing to follow."""
        return False

    def look(self) -> Health:
        return Health()

    def require_model(self, model_hash: str, /) -> None:
        """See `GalleryIndex.require_model`."""
        self._require_model(model_hash)

    def close(self) -> None:
        """Let go of the devices' memory, once no search uses it. The index that it was made from stays open. May be called twice."""
        self._now = self._workers = None  # the threads end with the last snapshot


def _bound(rows: int, at: int, of: int) -> int:
    return rows if at == of else rows * at // of // WORD * WORD


def _cut(shards: Sequence[Rows], start: int, end: int) -> list[NDArray[Any]]:
    """Rows `start` to `end` of arrays that follow one another, as views."""
    firsts = accumulate(map(len, shards), initial=0)
    parts = [shard[max(start - first, 0) : max(end - first, 0)] for shard, first in zip(shards, firsts, strict=False)]
    return [part for part in parts if len(part)]
