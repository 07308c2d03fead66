"""What every zone backend receives, already validated, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

from .bitmaps import U64, counted, cut, unpacked, words_for
from .screen import Screen

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class DeviceArray(Protocol):
    """An array of any framework that speaks DLPack."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


Items = NDArray[Any] | Sequence[NDArray[Any]]
Exclusions = Sequence[Sequence[int] | NDArray[np.integer]] | NDArray[np.integer]

MAX_ITEMS = 2**32 - 2
"""The kernels keep a position beside a score in 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZoneSelection:
    """One row per query. Ties: key descending, then id ascending; rows are padded with id -1 and score -inf.

    Fields that were not asked for are None. The zone of Δ = anchor - score follows `lo` and `hi`: near Δ < lo,
    mid lo <= Δ <= hi, easy Δ > hi.
    """

    scores: F32
    """(B, k), descending."""
    ids: I64
    """(B, k), positions in `items`."""
    counts: I64 | None
    """(B, 3): candidates in near, mid and easy."""
    picks: I64 | None
    """(B, P), positions in `items`, by pick key descending."""
    pick_scores: F32 | None
    """(B, P), the picks' scores (not their keys)."""
    lo: F32 | None
    """(B,), the absolute bounds that applied; NaN where ranks were asked of a query without candidates."""
    hi: F32 | None
    anchor_scores: F32 | None
    """(B,), NaN where the query's own best was asked for and it has no candidate."""
    backend: str
    """What ran: "reference", "cpu" or "cuda" (then the arrays are on the device)."""
    rescored: int | None = None
    """(query, item) pairs whose bound from the screen did not decide them and that were scored in full; None: no screen was used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZoneRequest:
    """Validated arguments of `select_zones`; shards always have their token axis, and zones are absolute or by rank."""

    queries: F32  # (B, D)
    shards: tuple[NDArray[Any], ...]  # each (n, M, D), all float32 or all float16; at least one
    k: int
    anchor_ids: I64 | None  # at most one of the two; neither: the query's own best
    anchor_scores: F32 | None
    zones: ZoneSpec | None
    picks: int
    counts: bool
    offsets: I64  # (B + 1,): query b excludes excluded[offsets[b] : offsets[b + 1]]
    excluded: I64  # (E,), ascending and distinct within a query
    allowed: U64 | None  # (1, W) or (B, W), bits as in `bitmaps`: what may be returned, unless `excluded`; None for all
    first_query: int
    screen: Screen | None

    def __post_init__(self) -> None:
        assert self.zones is None or self.zones.bounds != "pooled", "pooled bounds are resolved before a request is made"

    @property
    def batch(self) -> int:
        return len(self.queries)

    @property
    def size(self) -> int:
        """N, the items of all shards."""
        return sum(map(len, self.shards))

    @property
    def candidates(self) -> int:
        """The most items that `allowed` lets one query return."""
        return self.size if self.allowed is None else max(map(counted, self.allowed), default=0)


def validated(
    queries: F32,
    items: Items,
    *,
    k: int,
    anchor: I64 | F32 | None,
    zones: ZoneSpec | None,
    picks: int,
    counts: bool,
    exclude: Exclusions | None,
    allowed: U64 | None = None,
    first_query: int = 0,
    screen: Screen | None = None,
) -> ZoneRequest:
    """Check shapes, dtypes, contiguity and options; `zones` must not be pooled. Raises InputError; copies nothing the size of an input."""
    _check_array("queries", queries, (np.float32,), (2,))
    shards = shards_of(items)
    (batch, width), (_, tokens, item_width), size = queries.shape, shards[0].shape, sum(map(len, shards))
    if width != item_width or width == 0:
        raise InputError(f"queries have D={width} and items D={item_width}; both must be the same, at least 1")
    if tokens == 0:
        raise InputError(f"items of shape {shards[0].shape} have no tokens; the middle axis (M) must be at least 1")
    if size > MAX_ITEMS:
        raise InputError(f"items: {size} in all, expected at most {MAX_ITEMS}; search parts and merge them")
    for name, value in (("k", k), ("picks", picks), ("first_query", first_query)):
        if value < 0:
            raise InputError(f"{name}={value}: expected 0 or more")
    if zones is None and (picks or counts or anchor is not None):
        raise InputError("anchor, picks and counts need zones: pass zones=ZoneSpec(lo=..., hi=...)")
    if screen is not None:
        screen.check_fits(shards)
    anchor_ids, anchor_scores = _split_anchor(anchor, batch, size)
    offsets, excluded = exclusions(exclude, batch, size)
    return ZoneRequest(
        queries=queries,
        shards=shards,
        k=k,
        anchor_ids=anchor_ids,
        anchor_scores=anchor_scores,
        zones=zones,
        picks=picks,
        counts=counts,
        offsets=offsets,
        excluded=excluded,
        allowed=None if allowed is None else checked_bitmap(allowed, batch, size),
        first_query=first_query,
        screen=screen,
    )


def shards_of(items: Items) -> tuple[NDArray[Any], ...]:
    """One or several arrays as (n, M, D) views of one dtype, M and D. Raises InputError."""
    arrays = (items,) if not isinstance(items, (list, tuple)) else tuple(items)
    if not arrays:
        raise InputError("items: an empty sequence; pass at least one array, of no items if need be")
    shards = []
    for at, array in enumerate(arrays):
        name = "items" if len(arrays) == 1 else f"items[{at}]"
        _check_array(name, array, (np.float32, np.float16), (2, 3))
        shards.append(array[:, None, :] if array.ndim == 2 else array)
        if shards[at].shape[1:] != shards[0].shape[1:] or array.dtype != arrays[0].dtype:
            raise InputError(
                f"{name}: {array.dtype} of shape {array.shape}, but items[0] is {arrays[0].dtype} of shape {arrays[0].shape}; "
                "shards of one gallery must agree in all but their number of items"
            )
    return tuple(shards)


def _check_array(name: str, array: Any, dtypes: tuple[type, ...], ranks: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype not in dtypes:
        expected = " or ".join(np.dtype(kind).name for kind in dtypes)
        raise InputError(f"{name}: dtype {array.dtype}, expected {expected}; convert with astype")
    if array.ndim not in ranks:
        raise InputError(f"{name}: shape {array.shape}, expected {' or '.join(map(str, ranks))} dimensions")
    if not array.flags.c_contiguous:
        raise InputError(f"{name}: not C-contiguous (strides {array.strides}); pass np.ascontiguousarray({name})")


def _split_anchor(anchor: Any, batch: int, size: int) -> tuple[I64 | None, F32 | None]:
    if anchor is None:
        return None, None
    _check_array("anchor", anchor, (np.int64, np.float32), (1,))
    if len(anchor) != batch:
        raise InputError(f"anchor: {len(anchor)} entries for {batch} queries")
    if anchor.dtype == np.float32:
        return None, anchor
    check_ids("anchor", anchor, size)
    return anchor, None


def check_ids(name: str, ids: I64, size: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        wrong = ids[(ids < 0) | (ids >= size)]
        raise InputError(f"{name}: id {wrong[0]} is not a position in items (0 to {size - 1})")


def checked_bitmap(allowed: U64, batch: int, size: int) -> U64:
    """(1, W) or (B, W), C-contiguous, without bits behind the last item. Raises InputError."""
    _check_array("allowed", allowed, (np.uint64,), (1, 2))
    words = allowed[None] if allowed.ndim == 1 else allowed
    if words.shape[1] != words_for(size) or (allowed.ndim == 2 and len(words) != batch):
        expected = f"({words_for(size)},) or ({batch}, {words_for(size)})"
        raise InputError(f"allowed: shape {allowed.shape}, expected {expected}: a bit for each of {size} items, 64 to a word")
    return cut(words, size)


def excluding_others(exclude: Exclusions | None, allowed: U64, batch: int, size: int) -> list[I64]:
    """Per query, what `exclude` says and whatever is not among the `allowed`, as `checked_bitmap` gives them: sorted and distinct."""
    offsets, excluded = exclusions(exclude, batch, size)
    others = [np.flatnonzero(~unpacked(words, size)) for words in allowed]
    return [np.union1d(others[b % len(others)], excluded[offsets[b] : offsets[b + 1]]) for b in range(batch)]


def exclusions(exclude: Exclusions | None, batch: int, size: int) -> tuple[I64, I64]:
    """Per-query ids as offsets (B + 1,) into one array, ascending and distinct within each query."""
    if exclude is None:
        return np.zeros(batch + 1, np.int64), np.empty(0, np.int64)
    if len(exclude) != batch:
        raise InputError(f"exclude: {len(exclude)} entries for {batch} queries")
    entries = [np.asarray(entry) for entry in exclude]
    for row, entry in enumerate(entries):
        if entry.ndim != 1 or (entry.size and not np.issubdtype(entry.dtype, np.integer)):
            raise InputError(f"exclude[{row}]: expected a sequence of integer ids, got {entry.dtype} of shape {entry.shape}")
    ids = np.concatenate([entry.astype(np.int64) for entry in entries]) if entries else np.empty(0, np.int64)
    check_ids("exclude", ids, size)
    offsets = np.cumsum([0, *(entry.size for entry in entries)])
    rises = ids[1:] > ids[:-1]
    starts = offsets[1:-1]
    rises[starts[(starts > 0) & (starts < len(ids))] - 1] = True  # from one query to the next they need not
    if rises.all():
        return offsets, ids
    pairs = np.unique(np.repeat(np.arange(batch, dtype=np.int64), [entry.size for entry in entries]) * size + ids)
    offsets = np.searchsorted(pairs, np.arange(batch + 1, dtype=np.int64) * size).astype(np.int64)
    return offsets, pairs % size if size else pairs
