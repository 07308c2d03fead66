"""Composed queries over a gallery: what a dataset's loader gives, a model ranks, and a protocol turns into figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError

DEPTH = 50
"""How many of a ranking the protocols read, where they do not filter it."""

WORDLESS_TEXT = "."
"""What a model reads where a query has no text: neither tokenizers nor the runtime make anything of an empty one."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two retrieved sets of images, and which of them a person preferred: 1 or 2."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    preferred: int


@dataclass(frozen=True, slots=True)
class Query:
    """One query; images are ids of the gallery.

    id: the dataset's own. text: as annotated, possibly empty. targets: the valid answers, the labelled one first; none
    where a dataset keeps them secret. exclude: left out of the query's ranking. subset: what a second ranking is
    restricted to (CIRR). aspects: what kind of change the text asks for, where a dataset says so (CIRCO val).
    """

    id: str
    reference: str
    text: str
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    subset: tuple[str, ...] = ()
    preference: Preference | None = None
    aspects: tuple[str, ...] = ()

    @property
    def wordless(self) -> bool:
        return not self.text.strip()

    @property
    def images(self) -> tuple[str, ...]:
        """Every image that the query needs."""
        shown = () if self.preference is None else (*self.preference.first, *self.preference.second)
        return (self.reference, *self.targets, *self.subset, *shown)


@dataclass(frozen=True)
class QuerySet:
    """Queries over one gallery. Rankings hold positions in `gallery`, which also break ties, lower first.

    Raises InputError when the gallery names an image twice or lacks an image that a query names.
    """

    name: str
    queries: tuple[Query, ...]
    gallery: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.position) != len(self.gallery):
            raise InputError(f"{self.name}: the gallery names an image twice; {len(self.gallery)} names, {len(self.position)} images")
        absent = [(q.id, image) for q in self.queries for image in q.images if image not in self.position]
        if absent:
            query, image = absent[0]
            raise InputError(f"{self.name}: {len(absent)} query images are not in the gallery, for example {image} of query {query}")

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def position(self) -> dict[str, int]:
        return {id: at for at, id in enumerate(self.gallery)}

    @property
    def texts(self) -> tuple[str, ...]:
        """What the model reads: the annotated texts, `WORDLESS_TEXT` for those without words."""
        return tuple(WORDLESS_TEXT if q.wordless else q.text for q in self.queries)

    @cached_property
    def reference(self) -> NDArray[np.int64]:
        """(Q,)"""
        return np.asarray([self.position[q.reference] for q in self.queries], np.int64)

    @cached_property
    def target(self) -> NDArray[np.int64]:
        """(Q,): the labelled target, -1 where it is secret."""
        return np.asarray([self.position[q.targets[0]] if q.targets else -1 for q in self.queries], np.int64)

    @property
    def secret(self) -> bool:
        """Whether a dataset keeps the answers: its server takes a submission instead."""
        return any(not q.targets and q.preference is None for q in self.queries)

    @property
    def relevant(self) -> list[list[int]]:
        """Every valid answer of each query, the labelled one first."""
        return [self.positions(q.targets) for q in self.queries]

    @property
    def excluded(self) -> list[list[int]] | None:
        """Per query, what is left out of its ranking; None where nothing is."""
        return [self.positions(q.exclude) for q in self.queries] if any(q.exclude for q in self.queries) else None

    @property
    def depth(self) -> int:
        """How deep a ranking must go: to its end where the protocol filters it to a subset."""
        return len(self.gallery) if any(q.subset for q in self.queries) else DEPTH

    def positions(self, ids: Sequence[str]) -> list[int]:
        return [self.position[id] for id in ids]
