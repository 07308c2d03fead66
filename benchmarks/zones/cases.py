"""The searches to measure: top-k with and without zones, MaxSim, and the scaling series."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from dqe_engine.zones.compiled import screens_panels

from ..harness import Contender
from . import contenders as by
from .checks import SearchCheck
from .vectors import Vectors, VectorSpec, mid_bounds, vectors

FEW_QUERIES = 4
"""Up to so many, screening gains on any processor."""
FAISS_THRESHOLD, FAISS_DEFAULT = 20, 128_000


@dataclass(frozen=True, slots=True)
class SearchCase:
    """`batch` queries against the items of `spec`."""

    spec: VectorSpec
    batch: int
    threads: int
    k: int = 50
    with_zones: bool = False
    gallery: int = 0
    """Search the first items of a gallery of this size, so that a series of sizes is made once; 0: all there are."""

    @property
    def label(self) -> str:
        s = self.spec
        tokens = f" × {s.tokens} tokens" if s.tokens > 1 else ""
        return f"{s.kind}, N = {s.items:,}{tokens}, D = {s.width}, B = {self.batch}"

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self.spec) | {"batch": self.batch, "k": self.k, "threads": self.threads}

    def small(self) -> Self:
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, items=max(2 * self.k, 256)), gallery=0)

    def inputs(self) -> by.SearchInputs:
        data = vectors(dataclasses.replace(self.spec, items=max(self.gallery, self.spec.items)))
        part = Vectors(data.items[: self.spec.items], data.queries[: self.batch], data.targets[: self.batch])
        return by.SearchInputs(part, self.k, self.threads, mid_bounds(data) if self.with_zones else None)

    def checker(self, inputs: by.SearchInputs) -> SearchCheck:
        return SearchCheck(inputs.data.queries, inputs.data.items, self.k)

    def contenders(self) -> Sequence[Contender]:
        raise NotImplementedError


class TopKCase(SearchCase):
    """All modes and libraries."""

    __slots__ = ()

    def contenders(self) -> Sequence[Contender]:
        screened = self.batch <= FEW_QUERIES or screens_panels()
        return [
            by.ours("ours"),
            by.ours("ours f16", stored="float16"),
            *([by.ours("ours screened", screened=True)] if screened else []),
            by.ours("ours + zones", mode="target"),
            by.ours("ours + zones, own best", mode="own best"),
            by.ours("ours + zones, rank", mode="rank"),
            by.numpy_top_k(),
            by.torch_top_k(),
            by.torch_zones(),
            by.torch_matmul(self.k),
            # Below 20 queries the threshold of 20 is the default's way; one query on, BLAS always.
            *([by.faiss_flat("FAISS flat, BLAS forced", 1)] if self.batch < FAISS_THRESHOLD else []),
            by.faiss_flat("FAISS flat, BLAS from 20", FAISS_THRESHOLD),
            by.faiss_flat("FAISS flat, default", FAISS_DEFAULT),
            by.faiss_half(),
            by.usearch_exact(),
        ]


class MaxSimCase(SearchCase):
    """Each item is the best of its tokens."""

    __slots__ = ()

    def contenders(self) -> Sequence[Contender]:
        return [
            by.ours("ours"),
            by.ours("ours f16", stored="float16"),
            *([by.ours("ours screened", screened=True)] if screens_panels() else []),
            by.torch_einsum(),
            by.torch_by_token(),
        ]


class ScalingCase(SearchCase):
    """Meant for items stored as float16, so that five million fit; libraries that need float32 convert beforehand."""

    __slots__ = ()

    def contenders(self) -> Sequence[Contender]:
        screened = self.batch <= FEW_QUERIES or screens_panels()
        return [
            by.ours("ours f16", stored="float16"),
            *([by.ours("ours screened", stored="float16", screened=True)] if screened else []),
            by.torch_top_k(),
            by.faiss_flat("FAISS flat, BLAS forced", 1),
            by.faiss_flat("FAISS flat, default", FAISS_DEFAULT),
            by.faiss_half(),
        ]

    def bytes_needed(self, name: str) -> int:
        """About what a contender holds beside the gallery and what others hold already; they are all held at once."""
        values, scores = self.spec.items * self.spec.width, 4 * self.batch * self.spec.items
        needed = {"ours screened": values, "PyTorch matmul + topk": 4 * values + scores, "FAISS flat, BLAS forced": 4 * values}
        return needed.get(name, 2 * values if name == "FAISS f16" else 0)
