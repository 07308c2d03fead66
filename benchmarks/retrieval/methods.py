"""Ways to store a gallery and search it: what each keeps, and how it answers a MaxSim query."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dqe_engine.tuning.contenders import Found, Search
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.arrays import F32, I64

from .galleries import Gallery

Scores = Literal["exact", "own"]


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a method. `scores`: those of MaxSim on the vectors as stored, or an estimate of its own.

    `exact`: the answer is that of a full MaxSim search over the vectors as stored.
    """

    settings: dict[str, int]
    search: Search
    exact: bool = False
    scores: Scores = "exact"
    stored: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True, slots=True)
class Built:
    """A method's index of one gallery. `size`: bytes of all that a search reads."""

    size: int
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Method:
    """`how`: what is stored and how MaxSim is answered, for the report. `obstacle`: why it is left out of a gallery, if it is."""

    name: str
    how: str
    build: Callable[[Gallery], Built]
    package: str | None = None
    obstacle: Callable[[Gallery], str | None] = lambda gallery: None

    def timed_build(self, gallery: Gallery) -> tuple[Built, float]:
        """The index, and the seconds that it took; shared views of the gallery are made before."""
        _ = gallery.rows, gallery.pooled
        started = time.perf_counter()
        return self.build(gallery), time.perf_counter() - started


def ours(name: str, stored: Literal["float32", "float16"], *, screened: bool = False) -> Method:
    def build(gallery: Gallery) -> Built:
        items = gallery.items.astype(stored, copy=False)
        screen = Screen.build(items) if screened else None

        def search(queries: F32, references: I64, k: int) -> Found:
            found = select_zones(queries, items, k=k, exclude=references[:, None], screen=screen, backend="cpu")
            return found.scores, found.ids

        return Built(items.nbytes + (screen.nbytes if screen else 0), [Point({}, search, exact=True, stored=stored)])

    beside = ", with 8-bit codes beside them that say which need not be read" if screened else ""
    return Method(name, f"every token as {stored}{beside}; one fused pass takes the maximum over an item's tokens. Exact.", build)
