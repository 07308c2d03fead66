"""What every zone backend receives, already validated, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Exclusions = Sequence[Sequence[int] | NDArray[np.integer]] | NDArray[np.integer]


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
    """(B,), the absolute bounds that applied; NaN where quantiles were asked of a query without candidates."""
    hi: F32 | None
    anchor_scores: F32 | None
    """(B,), NaN where the query's own best was asked for and it has no candidate."""
    backend: str
    """What ran: "reference" or "cpu"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZoneRequest:
    """Validated arguments of `select_zones`; `items` always has its token axis."""

    queries: F32  # (B, D)
    items: NDArray[Any]  # (N, M, D) float32 or float16
    k: int
    anchor_ids: I64 | None  # at most one of the two; neither: the query's own best
    anchor_scores: F32 | None
    zones: ZoneSpec | None
    picks: int
    counts: bool
    excluded_rows: I64  # (E,), ascending
    excluded_ids: I64  # (E,)
    first_query: int

    @property
    def batch(self) -> int:
        return len(self.queries)


def validated(
    queries: F32,
    items: NDArray[Any],
    *,
    k: int,
    anchor: I64 | F32 | None,
    zones: ZoneSpec | None,
    picks: int,
    counts: bool,
    exclude: Exclusions | None,
    first_query: int = 0,
) -> ZoneRequest:
    """Check shapes, dtypes, contiguity and options. Raises InputError; copies nothing the size of an input."""
    _check_array("queries", queries, (np.float32,), (2,))
    _check_array("items", items, (np.float32, np.float16), (2, 3))
    if items.ndim == 2:
        items = items[:, None, :]  # (N, 1, D)
    (batch, width), (size, tokens, item_width) = queries.shape, items.shape
    if width != item_width or width == 0:
        raise InputError(f"queries have D={width} and items D={item_width}; both must be the same, at least 1")
    if tokens == 0:
        raise InputError(f"items of shape {items.shape} have no tokens; the middle axis (M) must be at least 1")
    for name, value in (("k", k), ("picks", picks), ("first_query", first_query)):
        if value < 0:
            raise InputError(f"{name}={value}: expected 0 or more")
    if zones is None and (picks or counts or anchor is not None):
        raise InputError("anchor, picks and counts need zones: pass zones=ZoneSpec(lo=..., hi=...)")
    anchor_ids, anchor_scores = _split_anchor(anchor, batch, size)
    rows, ids = _exclusions(exclude, batch, size)
    return ZoneRequest(
        queries=queries,
        items=items,
        k=k,
        anchor_ids=anchor_ids,
        anchor_scores=anchor_scores,
        zones=zones,
        picks=picks,
        counts=counts,
        excluded_rows=rows,
        excluded_ids=ids,
        first_query=first_query,
    )


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
    _check_ids("anchor", anchor, size)
    return anchor, None


def _check_ids(name: str, ids: I64, size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise InputError(f"{name}: id {wrong[0]} is not a position in items (0 to {size - 1})")


def _exclusions(exclude: Exclusions | None, batch: int, size: int) -> tuple[I64, I64]:
    """Flatten per-query ids to pairs (row, id), rows ascending."""
    if exclude is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if len(exclude) != batch:
        raise InputError(f"exclude: {len(exclude)} entries for {batch} queries")
    entries = [np.asarray(entry) for entry in exclude]
    for row, entry in enumerate(entries):
        if entry.ndim != 1 or (entry.size and not np.issubdtype(entry.dtype, np.integer)):
            raise InputError(f"exclude[{row}]: expected a sequence of integer ids, got {entry.dtype} of shape {entry.shape}")
    rows = np.repeat(np.arange(batch, dtype=np.int64), [entry.size for entry in entries])
    ids = np.concatenate([entry.astype(np.int64) for entry in entries]) if entries else np.empty(0, np.int64)
    _check_ids("exclude", ids, size)
    return rows, ids
