"""FAISS's approximate indexes over the tokens of a gallery: every token is a row, and the rows found name the items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dqe_engine.files import scratch_directory

from .contenders import F32, Built, Contender, Found, Search, by_rows, ladders

BLAS_FROM = 20
"""Queries from which flat search (of coarse cells too) multiplies by BLAS. FAISS's default, in effect never, makes batches several times
slower; always makes one query over a small index several times slower."""
_NEVER = 128_000
_TRAINING_ROWS, _TRAINING_ROUNDS = 64, 10
"""Per centroid. FAISS takes up to 256 and 25; the centroids hardly change and training takes minutes."""
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EFS = (16, 32, 64, 128, 256, 512)
LINKS, EF_CONSTRUCTION = 16, 40
_LARGE = 1 << 20  # rows whose graph is worth a file

RowSearch = Callable[[F32, int], Found]


def fetches(tokens: int, k: int) -> tuple[int, ...]:
    """Rows to fetch: few, where the tokens of an item lie apart; so many that they would hold k items for certain; and as many again, for
    what an approximate index misses."""
    return tuple(dict.fromkeys(count for count in (4 * k, tokens * (k + 1), 2 * tokens * (k + 1))))


def inverted_lists(kind: Literal["flat", "pq"], *, k: int = 10, per_root: int = 2) -> Contender:
    """Cells around centroids, of which the nearest few are read: whole rows, or product codes whose best items are scored again.

    per_root: cells for each root of the number of tokens, about: rounded so that their number is a power of two.
    """

    def build(items: F32) -> Built:
        faiss = _faiss()
        rows, tokens, width = items.reshape(-1, items.shape[2]), items.shape[1], items.shape[2]
        quantizer, assigned = _cells(items, per_root)
        cells = quantizer.ntotal
        index: Any
        if kind == "flat":
            index = faiss.IndexIVFFlat(quantizer, width, cells, faiss.METRIC_INNER_PRODUCT)
        else:
            index = faiss.IndexIVFPQ(quantizer, width, cells, _code(width), 8, faiss.METRIC_INNER_PRODUCT)
            index.pq.cp.max_points_per_centroid, index.pq.cp.niter = _TRAINING_ROWS * 4, _TRAINING_ROUNDS
            index.pq.cp.min_points_per_centroid = 1  # it warns of fewer than 39
            index.train(_sampled(rows, _TRAINING_ROWS * 4 * 256))
        index.is_trained = True
        _add(index, rows, assigned)

        def answers(threads: int) -> list[Any]:
            def searching(values: dict[str, int]) -> Search:
                parameters = faiss.SearchParametersIVF(nprobe=values["nprobe"])
                found = searched(index, threads, parameters, mode=1 if values.get("split") else 0)
                return by_rows(found, tokens, values["fetch"], items if kind == "pq" else None)

            splits: tuple[dict[str, int], ...] = ({}, {"split": 1}) if threads > 1 else ({},)
            wanted = fetches(tokens, k) if kind == "flat" else (6 * k, 25 * k, 100 * k)
            return ladders(
                ([{"nprobe": n, "fetch": fetch} | split for n in PROBES if n <= cells] for fetch in wanted for split in splits), searching
            )

        row = 8 + (4 * width if kind == "flat" else _code(width))  # with its number
        return Built(len(rows) * row + 4 * cells * width + (items.nbytes if kind == "pq" else 0), answers)

    def obstacle(items: F32) -> str | None:
        count, width = items.shape[0] * items.shape[1], items.shape[2]
        if count < 4096:
            return f"left out: {count:,} tokens are too few"
        return f"left out: 4 does not divide a width of {width}" if kind == "pq" and width % 4 else None

    beside = ""
    if kind == "pq":
        beside = " (made with IVF-Flat's); the items of the rows fetched are scored again by all of their tokens"
    name = "FAISS IVF-PQ, re-scored" if kind == "pq" else "FAISS IVF-Flat"
    if per_root != 2:
        name += f", {per_root} cells a root"
    return Contender(name, f"tokens in cells, about {per_root} for each root of their number{beside}.", build, "faiss", obstacle)


def hnsw(*, pooled: bool = False, k: int = 10, most_rows: int | None = None, folder: Path | None = None) -> Contender:
    """A graph of tokens; or of items by the mean of their tokens, those found scored again. `folder`: where large graphs are kept, since
    making them takes minutes; `most_rows`: a larger one is not made."""

    def build(items: F32) -> Built:
        faiss = _faiss()
        rows, tokens = _rows(items, pooled), items.shape[1]
        path = None if folder is None or len(rows) < _LARGE else _file(folder, rows)
        if path is not None and path.is_file():
            index = faiss.read_index(str(path))
        else:
            index = faiss.IndexHNSWFlat(rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = EF_CONSTRUCTION
            index.add(rows)
            if path is not None:
                _keep(index, path)

        def answers(threads: int) -> list[Any]:
            def searching(values: dict[str, int]) -> Search:
                found = searched(index, threads, faiss.SearchParametersHNSW(efSearch=values["efSearch"]))
                return by_rows(found, 1 if pooled else tokens, values["fetch"], items if pooled else None)

            if pooled:  # one number for both, as FAISS raises efSearch to what is fetched
                return ladders([[{"efSearch": ef, "fetch": ef} for ef in (*EFS, 2 * EFS[-1]) if ef >= k]], searching)
            return ladders(([{"efSearch": ef, "fetch": fetch} for ef in EFS if ef >= fetch] for fetch in fetches(tokens, k)), searching)

        return Built(rows.nbytes + len(rows) * 4 * 2 * LINKS + (items.nbytes if pooled else 0), answers)

    def obstacle(items: F32) -> str | None:
        count = items.shape[0] * (1 if pooled else items.shape[1])
        if most_rows is None or count <= most_rows or (folder is not None and _file(folder, _rows(items, pooled)).is_file()):
            return None
        return f"left out: a graph of {count:,} rows takes minutes to make"

    of = "items, by the mean of their tokens; those found are scored again by all of their tokens" if pooled else "tokens"
    how = f"a graph of {of}; {LINKS} links a row, efConstruction {EF_CONSTRUCTION}."
    return Contender("FAISS HNSW, pooled, re-scored" if pooled else "FAISS HNSW", how, build, "faiss", obstacle)


def _rows(items: F32, pooled: bool) -> F32:
    if not pooled:
        return items.reshape(-1, items.shape[2])
    means: F32 = items.mean(axis=1)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return means


def searched(index: Any, threads: int, parameters: Any = None, *, mode: int | None = None) -> RowSearch:
    """`mode`: FAISS's parallel_mode of cells, 1 where the cells of a query are shared out among the threads."""

    def search(queries: F32, fetch: int) -> Found:
        faiss = _faiss()
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = 1 if len(queries) >= BLAS_FROM else _NEVER  # one for the whole process
        if mode is not None:
            index.parallel_mode = mode
        found: Found = index.search(queries, fetch, params=parameters)
        return found

    return search


_cells_of: dict[tuple[int, int], tuple[F32, Any, Any]] = {}
"""Of the last gallery, so that two indexes over the same cells assign their tokens once."""


def _cells(items: F32, per_root: int) -> tuple[Any, Any]:
    """Centroids, as a flat index, and the cell of each token."""
    faiss = _faiss()
    if (id(items), per_root) in _cells_of:
        return _cells_of[id(items), per_root][1:]
    rows = items.reshape(-1, items.shape[2])
    cells = 1 << round(math.log2(0.8 * per_root * math.sqrt(len(rows))))
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    clustering = faiss.Clustering(rows.shape[1], cells)
    clustering.niter, clustering.spherical, clustering.seed = _TRAINING_ROUNDS, True, 1
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, _TRAINING_ROWS
    clustering.train(_sampled(rows, _TRAINING_ROWS * cells), quantizer)
    assigned = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), 1 << 18):
        assigned[start : start + (1 << 18)] = quantizer.search(rows[start : start + (1 << 18)], 1)[1][:, 0]
    _cells_of.clear()
    _cells_of[id(items), per_root] = (items, quantizer, assigned)
    return quantizer, assigned


def _add(index: Any, rows: F32, assigned: Any) -> None:
    faiss = _faiss()
    for start in range(0, len(rows), 1 << 20):
        some, cells = np.ascontiguousarray(rows[start : start + (1 << 20)]), np.ascontiguousarray(assigned[start : start + (1 << 20)])
        index.add_core(len(some), faiss.swig_ptr(some), None, faiss.swig_ptr(cells))


def _faiss() -> Any:
    import faiss

    return faiss


def _code(width: int) -> int:
    return width // 4


def _sampled(rows: F32, most: int) -> F32:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


@cache
def _digest(size: int, sample: bytes) -> str:
    return hashlib.sha256(size.to_bytes(8, "little") + sample).hexdigest()[:12]


def _file(folder: Path, rows: F32) -> Path:
    return folder / f"hnsw-{LINKS}-{EF_CONSTRUCTION}-{_digest(len(rows), rows[:: max(1, len(rows) // 997)].tobytes())}.faiss"


def _keep(index: Any, path: Path) -> None:
    faiss = _faiss()
    with scratch_directory(path) as scratch:
        faiss.write_index(index, str(scratch / path.name))
        (scratch / path.name).rename(path)


def contenders(
    *, k: int = 10, cells: Sequence[int] = (2,), most_rows: int | None = None, folder: Path | None = None
) -> Sequence[Contender]:
    """All of FAISS's, for the k best of a gallery of tokens. `cells`: so many for each root of the number of tokens, an index for each."""
    graphs = [hnsw(pooled=pooled, k=k, most_rows=most_rows, folder=folder) for pooled in (False, True)]
    kinds: tuple[Literal["flat", "pq"], ...] = ("flat", "pq")
    return *(inverted_lists(kind, k=k, per_root=per_root) for per_root in cells for kind in kinds), *graphs
