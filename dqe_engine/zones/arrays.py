"""Arrays that callers pass: what they may be, and how they are checked. Nothing the size of an input is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

from .bitmaps import U64, cut, unpacked, words_for

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
MOST_RESULT_BYTES = 1 << 30
"""Of one call's top-k and picks: more is asked for by mistake, or by a stranger."""
_TOP_BYTES, _PICK_BYTES = 12, 20
"""Of an id and a score; and with the key of a pick."""
_MOST = 2**62
"""Of any count: sums of a few still fit 64 bits."""


def check_counts(batch: int, *, k: int, picks: int, first_query: int) -> None:
    """Raises InputError for what is no count, and where the results of a call would take more than `MOST_RESULT_BYTES`."""
    for name, value in (("k", k), ("picks", picks), ("first_query", first_query)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise InputError(f"{name}: expected a whole number, got {type(value).__name__}")
        if not 0 <= value <= _MOST:
            raise InputError(f"{name}={value}: expected 0 {'or more' if value < 0 else f'to {_MOST}'}")
    if (size := batch * (_TOP_BYTES * int(k) + _PICK_BYTES * int(picks))) > MOST_RESULT_BYTES:
        raise InputError(
            f"k={k} and picks={picks} for {batch} queries: results of {size / 2**30:.1f} GiB, at most {MOST_RESULT_BYTES / 2**30:.0f} GiB "
            "at a time; ask for fewer, or for the queries in blocks"
        )


def shards_of(items: Items) -> tuple[NDArray[Any], ...]:
    """One or several arrays as (n, M, D) views of one dtype, M and D. Raises InputError."""
    arrays = (items,) if not isinstance(items, (list, tuple)) else tuple(items)
    if not arrays:
        raise InputError("items: an empty sequence; pass at least one array, which may hold 0 items")
    shards = []
    for at, array in enumerate(arrays):
        name = "items" if len(arrays) == 1 else f"items[{at}]"
        check_array(name, array, (np.float32, np.float16), (2, 3))
        shards.append(array[:, None, :] if array.ndim == 2 else array)
        if shards[at].shape[1:] != shards[0].shape[1:] or array.dtype != arrays[0].dtype:
            raise InputError(
                f"{name}: {array.dtype} of shape {array.shape}, but items[0] is {arrays[0].dtype} of shape {arrays[0].shape}; "
                "shards of one gallery must agree in all but their number of items"
            )
    return tuple(shards)


def check_array(name: str, array: Any, dtypes: tuple[type, ...], ranks: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    if array.dtype not in dtypes:
        expected = " or ".join(np.dtype(kind).name for kind in dtypes)
        raise InputError(f"{name}: dtype {array.dtype}, expected {expected}; convert with astype")
    if array.ndim not in ranks:
        raise InputError(f"{name}: shape {array.shape}, expected {' or '.join(map(str, ranks))} dimensions")
    if not array.flags.c_contiguous:
        raise InputError(f"{name}: not C-contiguous (strides {array.strides}); pass np.ascontiguousarray({name})")


def check_ids(name: str, ids: I64, size: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        wrong = ids[(ids < 0) | (ids >= size)]
        raise InputError(f"{name}: id {wrong[0]} is not a position in items (0 to {size - 1})")


def checked_bitmap(allowed: U64, batch: int, size: int) -> U64:
    """(1, W) or (B, W), C-contiguous, without bits behind the last item. Raises InputError."""
    check_array("allowed", allowed, (np.uint64,), (1, 2))
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
        raise InputError(f"exclude: {len(exclude)} entries, expected {batch}, one for each query")
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
