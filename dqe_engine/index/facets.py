"""What the metadata of items holds: per key, which values how many of them have. What a page of filters is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metadata import MetadataColumns
from .metadata_values import Kind, Tally

MOST_KEYS = 200
"""Keys that facets are given of; of more, those that most items have."""
LONGEST = 200
"""Characters of a key or value that is listed. Longer ones are texts to be read, not to be chosen from."""


@dataclass(frozen=True)
class FacetValue:
    """`value`: as a filter takes it. `count`: how many items have it; in lists, beside others."""

    value: str | bool | int | float
    count: int


@dataclass(frozen=True)
class Facet:
    """The values of one kind under one key, over the items that passed the filter.

    listed: whether they stand in lists, for which a filter has "contains". values: the most common ones, of as many those that were seen
    first, or, of numbers, the least. distinct: how many there are. least, most: of numbers. missing: items that lack the key, whatever
    the kind, as `{"exists": false}` finds them.
    """

    key: str
    kind: Kind
    listed: bool
    values: tuple[FacetValue, ...]
    distinct: int
    missing: int
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Facets:
    """total: items that passed the filter. facets: by key; null, objects and lists within lists have none."""

    total: int
    facets: tuple[Facet, ...]


def collect_facets(columns: MetadataColumns, size: int, chosen: NDArray[np.bool_] | None, total: int, most: int) -> Facets:
    """Over the first `size` items, those that are chosen (None: all), which are `total`."""
    facets: list[Facet] = []
    for key in columns.most_common_keys(MOST_KEYS):
        if len(key) > LONGEST:
            continue
        present, tallies = columns.tallies(key, size, chosen)
        facets += [_facet(key, tally, total - present, most) for tally in _merged(tallies)]
    return Facets(total, tuple(sorted(facets, key=lambda facet: (facet.key, facet.kind, facet.listed))))


def _merged(tallies: Sequence[Tally]) -> list[Tally]:
    """One for each kind: numbers that float64 would round are kept apart from the others."""
    found: dict[tuple[Kind, bool], Tally] = {}
    for tally in tallies:
        if (before := found.get(at := (tally.kind, tally.listed))) is not None:
            values = [*_as_list(before.values), *_as_list(tally.values)]
            tally = tally._replace(values=values, counts=np.concatenate((before.counts, tally.counts)))
        found[at] = tally
    return list(found.values())


def _facet(key: str, tally: Tally, missing: int, most: int) -> Facet:
    there = np.flatnonzero(tally.counts)
    least = largest = None
    if tally.kind == "number":
        numbers = (tally.values[0], tally.values[-1]) if isinstance(tally.values, np.ndarray) else [tally.values[i] for i in there.tolist()]
        least, largest = _plain(min(numbers)), _plain(max(numbers))  # an array's are sorted, and all there
    listed = [(_plain(tally.values[i]), int(tally.counts[i])) for i in _most_common(tally.counts, there, most).tolist()]
    values = tuple(FacetValue(value, count) for value, count in listed if not isinstance(value, str) or len(value) <= LONGEST)
    return Facet(key, tally.kind, tally.listed, values, len(there), missing, least, largest)


def _most_common(counts: NDArray[np.int64], there: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Positions of the `most` largest counts, the largest first; of equal ones the first."""
    if len(there) > most:
        found = counts[there]
        least = np.partition(found, len(found) - most)[len(found) - most]
        above = there[found > least]
        there = np.concatenate((above, there[found == least][: most - len(above)]))
    return there[np.lexsort((there, -counts[there]))]


def _as_list(values: Sequence[Any] | NDArray[Any]) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
