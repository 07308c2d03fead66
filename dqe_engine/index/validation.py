"""Checks of what callers hand to the index: ids, token rows, metadata, counts, models. All but `check_model` raise InputError."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import IndexFormatError, InputError


def quoted(ids: Sequence[str]) -> str:
    """Up to five ids, for a message."""
    return ", ".join(map(repr, ids[:5])) + (", …" if len(ids) > 5 else "")


def check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_search(
    queries: NDArray[Any], k: object, width: int, *, exclude: Sequence[Collection[str]] | None, zones: ZoneSpec | None, picks: object
) -> None:
    """What every index's `search` takes; see `GalleryIndex.search`."""
    if queries.ndim != 2 or queries.shape[1] != width or queries.dtype != np.float32:
        raise InputError(f"expected queries of shape (B, {width}) float32, got {queries.shape} {queries.dtype}")
    check_count("k", k, 1)
    check_count("picks", picks, 0)
    if picks and zones is None:
        raise InputError("picks need zones: pass zones=ZoneSpec(lo=..., hi=...)")
    if zones is not None and zones.bounds != "absolute":
        raise InputError(
            f"zones with {zones.bounds} bounds need a target, which a search has not; give absolute bounds, for Δ to its own best hit"
        )
    if exclude is not None and not isinstance(exclude, Sequence):
        raise InputError(f"exclude: expected a sequence with a collection of ids per query, got {type(exclude).__name__}")
    if exclude is not None and len(exclude) != len(queries):
        raise InputError(f"{len(exclude)} exclusions for {len(queries)} queries")
    for ids in exclude or ():
        check_no_single_str("exclude", ids)


def check_ids(ids: Sequence[str]) -> None:
    """Non-empty strings that UTF-8 can hold, none twice."""
    for id in ids:
        if not isinstance(id, str) or not id:
            raise InputError(f"ids are non-empty strings, got {id!r}")
        try:
            id.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"id {id!r} is not valid Unicode (lone surrogates); rename the item") from error
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        repeated = list(dict.fromkeys(id for id in ids if id in seen or seen.add(id)))  # type: ignore[func-returns-value]
        raise InputError(f"{len(repeated)} ids are given more than once: {quoted(repeated)}")


def check_known(ids: Collection[str], rows: Iterable[int | None]) -> list[int]:
    """The rows of these ids, all of which must have one. The error names up to five that have none."""
    found = list(rows)
    if unknown := [id for id, row in zip(ids, found, strict=True) if row is None]:
        raise InputError(f"{len(unknown)} ids are not in the index: {quoted(unknown)}; leave them out")
    return [row for row in found if row is not None]


def check_model(found: str, wanted: str, *, where: object) -> None:
    """Raise IndexFormatError unless both hashes are of one model."""
    if found != wanted:
        raise IndexFormatError(f"{where} was made with model {found[:12]}, this bundle is {wanted[:12]}; index the images again with it")


def check_no_single_str(name: str, ids: Collection[str]) -> None:
    if isinstance(ids, str):
        raise InputError(f"{name}: expected a collection of ids, got a single str; wrap it in a list")
    if not isinstance(ids, Collection):
        raise InputError(f"{name}: expected a collection of ids, got {type(ids).__name__}")


def checked_metadata(id: str, entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A deep copy of the entry, which JSON must be able to hold without change (so no NaN, tuples or non-string keys)."""
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise InputError(f"metadata of {id!r}: expected a JSON object, got {type(entry).__name__}")
    try:
        copied = msgspec.json.decode(msgspec.json.encode(dict(entry)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata of {id!r} is not JSON ({error})") from error
    if copied != entry:
        raise InputError(f"metadata of {id!r} would change in JSON; use strings, finite numbers, bools, null, lists and objects")
    return dict(copied)
