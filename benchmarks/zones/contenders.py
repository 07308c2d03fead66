"""Exact top-k, with and without zones: ours and the libraries'. Each gets its vectors in the layout that suits it best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine import zones
from dqe_engine.contracts.zones import ZoneSpec

from ..harness import Contender
from .checks import SearchAnswer, ZoneAnswer
from .vectors import Storage, Vectors

ZoneMode = Literal["target", "own best", "rank"]
PICKS = 16
TEMPERATURE = 0.05
RANKS = (0.001, 0.01)
_FAISS_HALF_ATOL = 5e-5
"""FAISS rounds ties to float16 away from zero, IEEE to even: now and then a coordinate is off by a unit in the last place."""


@dataclass(frozen=True, slots=True, eq=False)
class SearchInputs:
    """`data.queries` are the batch to search, not all there are; `bounds` are absolute, None where no zones are asked."""

    data: Vectors
    k: int
    threads: int
    bounds: tuple[float, float] | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    """What several contenders can use without disturbing one another: the float32 items, FAISS's flat index."""

    def float32_items(self) -> NDArray[np.float32]:
        if "float32" not in self.shared:
            self.shared["float32"] = self.data.items.astype(np.float32, copy=False)
        items: NDArray[np.float32] = self.shared["float32"]
        return items


def ours(name: str, *, stored: Storage = "float32", screened: bool = False, mode: ZoneMode | None = None) -> Contender:
    def prepare(inputs: SearchInputs) -> Callable[[], zones.ZoneSelection]:
        items = inputs.data.items.astype(stored, copy=False)
        options: dict[str, Any] = {"k": inputs.k, "backend": "cpu", "threads": inputs.threads}
        if screened:
            options["screen"] = zones.Screen.build(items)
        if mode is not None:
            options |= _zone_options(inputs, mode)
        return lambda: zones.select_zones(inputs.data.queries, items, **options)

    def answer(found: zones.ZoneSelection) -> SearchAnswer:
        rescored = {} if found.rescored is None else {"rescored_per_query": found.rescored / len(found.scores)}
        return SearchAnswer(found.scores, found.ids, stored, _zone_answer(found) if mode else None, notes=rescored)

    return Contender(name, prepare, answer)


def _zone_options(inputs: SearchInputs, mode: ZoneMode) -> dict[str, Any]:
    if mode == "rank":
        spec = ZoneSpec(lo=RANKS[0], hi=RANKS[1], bounds="rank", policy="softmax", temperature=TEMPERATURE)
    else:
        assert inputs.bounds is not None
        spec = ZoneSpec(lo=inputs.bounds[0], hi=inputs.bounds[1], policy="softmax", temperature=TEMPERATURE)
    return {"zones": spec, "picks": PICKS, "counts": True, "anchor": None if mode == "own best" else inputs.data.targets}


def _zone_answer(found: zones.ZoneSelection) -> ZoneAnswer:
    assert found.lo is not None
    assert found.hi is not None
    assert found.anchor_scores is not None
    assert found.counts is not None
    assert found.picks is not None
    return ZoneAnswer(found.lo, found.hi, found.anchor_scores, found.counts, found.picks)


def numpy_top_k() -> Contender:
    def prepare(inputs: SearchInputs) -> Callable[[], SearchAnswer]:
        queries, items, k = inputs.data.queries, inputs.float32_items(), inputs.k
        scores = np.empty((len(queries), len(items)), np.float32)

        def run() -> SearchAnswer:
            np.matmul(queries, items.T, out=scores)
            best = np.argpartition(scores, -k, axis=1)[:, -k:]
            kept = np.take_along_axis(scores, best, axis=1)
            order = np.argsort(-kept, axis=1)
            return SearchAnswer(np.take_along_axis(kept, order, axis=1), np.take_along_axis(best, order, axis=1))

        return run

    return Contender("NumPy matmul + argpartition", prepare)


def _torch(inputs: SearchInputs) -> tuple[Any, Any, Any, Any]:
    import torch

    torch.set_num_threads(inputs.threads)
    queries = torch.from_numpy(inputs.data.queries)
    items = torch.from_numpy(inputs.float32_items())
    return torch, queries, items, torch.empty((len(queries), len(items)))


def torch_top_k() -> Contender:
    """The score matrix is allocated beforehand, in PyTorch's favour."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        torch, queries, items, scores = _torch(inputs)
        return lambda: torch.topk(torch.matmul(queries, items.T, out=scores), inputs.k, dim=1)

    return Contender("PyTorch matmul + topk", prepare, _torch_answer, "torch")


def torch_matmul(k: int) -> Contender:
    """Only the score matrix: a lower bound for whatever selects from it."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        torch, queries, items, scores = _torch(inputs)
        return lambda: torch.matmul(queries, items.T, out=scores)

    def answer(scores: Any) -> SearchAnswer:
        values, ids = scores.topk(k, dim=1)
        return SearchAnswer(values.numpy(), ids.numpy())

    return Contender("PyTorch matmul alone", prepare, answer, "torch")


def torch_einsum() -> Contender:
    """MaxSim as it is usually written: (B, N, M) dot products, then their maximum."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        import torch

        torch.set_num_threads(inputs.threads)
        queries, items = torch.from_numpy(inputs.data.queries), torch.from_numpy(inputs.float32_items())
        return lambda: torch.einsum("bd,nmd->bnm", queries, items).amax(dim=2).topk(inputs.k, dim=1)

    return Contender("PyTorch einsum + amax + topk", prepare, _torch_answer, "torch")


def torch_by_token() -> Contender:
    """The same with one matmul per token, the tokens apart in memory beforehand: (B, N) at a time, no (B, N, M)."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        import torch

        torch.set_num_threads(inputs.threads)
        queries = torch.from_numpy(inputs.data.queries)
        tokens = torch.from_numpy(np.ascontiguousarray(inputs.data.items.swapaxes(0, 1), np.float32))  # (M, N, D)

        def run() -> Any:
            best = queries @ tokens[0].T
            for token in tokens[1:]:
                torch.maximum(best, queries @ token.T, out=best)
            return best.topk(inputs.k, dim=1)

        return run

    return Contender("PyTorch matmul by token + topk", prepare, _torch_answer, "torch")


def _torch_answer(found: Any) -> SearchAnswer:
    return SearchAnswer(found[0].numpy(), found[1].numpy())


def torch_zones() -> Contender:
    """Top-k, zone masks, counts, and Gumbel picks drawn for the mid zone's members only."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        torch, queries, items, scores = _torch(inputs)
        assert inputs.bounds is not None
        (lo, hi), targets, rows = inputs.bounds, torch.from_numpy(inputs.data.targets), torch.arange(len(queries))

        def run() -> Any:
            top = torch.topk(torch.matmul(queries, items.T, out=scores), inputs.k, dim=1)
            anchors = scores[rows, targets]
            delta = anchors[:, None] - scores
            mid = (delta >= lo) & (delta <= hi)
            counts = torch.stack([(delta < lo).sum(1), mid.sum(1), (delta > hi).sum(1)], dim=1)
            inside = scores[mid]
            keys = torch.full_like(scores, -torch.inf)
            keys[mid] = inside / TEMPERATURE - torch.empty_like(inside).exponential_().log()
            best = keys.topk(PICKS, dim=1)
            return *top, anchors, counts, torch.where(best.values > -torch.inf, best.indices, -1), lo, hi

        return run

    def answer(found: Any) -> SearchAnswer:
        scores, ids, anchors, counts, picks = (part.numpy() for part in found[:5])
        lo, hi = (np.full(len(ids), bound, np.float32) for bound in found[5:])
        return SearchAnswer(scores, ids, zones=ZoneAnswer(lo, hi, anchors, counts, picks))

    return Contender("PyTorch matmul + topk + zones", prepare, answer, "torch")


def faiss_flat(name: str, threshold: int) -> Contender:
    """`threshold`: from how many queries on FAISS computes the products by BLAS; its default is 128000, so in effect never."""

    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        import faiss

        if "faiss" not in inputs.shared:
            inputs.shared["faiss"] = faiss.IndexFlatIP(inputs.data.items.shape[1])
            inputs.shared["faiss"].add(inputs.float32_items())
        index = inputs.shared["faiss"]

        def run() -> Any:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return index.search(inputs.data.queries, inputs.k)

        faiss.omp_set_num_threads(inputs.threads)
        return run

    return Contender(name, prepare, lambda found: SearchAnswer(found[0], found[1]), "faiss")


def faiss_half() -> Contender:
    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        import faiss

        faiss.omp_set_num_threads(inputs.threads)
        width = inputs.data.items.shape[1]
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        for start in range(0, len(inputs.data.items), 1 << 18):
            index.add(inputs.data.items[start : start + (1 << 18)].astype(np.float32, copy=False))
        return lambda: index.search(inputs.data.queries, inputs.k)

    return Contender("FAISS f16", prepare, lambda found: SearchAnswer(found[0], found[1], "float16", atol=_FAISS_HALF_ATOL), "faiss")


def usearch_exact() -> Contender:
    def prepare(inputs: SearchInputs) -> Callable[[], Any]:
        from usearch.compiled import MetricKind
        from usearch.index import search

        items, queries = inputs.float32_items(), inputs.data.queries
        return lambda: search(items, queries, inputs.k, MetricKind.IP, exact=True, threads=inputs.threads)

    def answer(found: Any) -> SearchAnswer:
        keys, distances = np.atleast_2d(found.keys), np.atleast_2d(found.distances)
        return SearchAnswer(1 - distances, keys)

    return Contender("USearch exact", prepare, answer, "usearch")
