"""FAISS as people use it for several vectors an item: tokens as rows, or one pooled vector as the row that finds candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dqe_engine.processors import available_cpus
from dqe_engine.tuning.contenders import by_rows
from dqe_engine.tuning.token_indexes import RowSearch, searched
from dqe_engine.zones.arrays import F32

from .galleries import Gallery
from .methods import Built, Method, Point

EF_CONSTRUCTION = 40
_TRAINING_ROWS = 64
"""Per centroid. FAISS takes up to 256; the centroids hardly change and training takes minutes."""
_TRAINING_ROUNDS = 10

Rows = Literal["tokens", "pooled"]
_HOW = {
    ("tokens", False): "every token a row; an item scores as its best row among those fetched",
    ("tokens", True): "every token a row; the items of the rows fetched are scored again by all of their tokens in float16",
    ("pooled", True): "the mean of an item's tokens is its row; the items fetched are scored again by all of their tokens in float16",
    ("pooled", False): "the mean of an item's tokens is its row, and nothing else is kept",
}


def flat(rows: Rows, k: int, fetches: tuple[int, ...] = (), *, rescored: bool = False) -> Method:
    """Float32 rows. Of tokens, so many are fetched that the answer is exact."""

    def build(gallery: Gallery) -> Built:
        faiss = _faiss()
        index = faiss.IndexFlatIP(gallery.width)
        index.add(_rows(gallery, rows))

        search = _search(index)
        points = [
            _point(gallery, rows, search, fetch, rescored, {"fetch": fetch}, exact=rows == "tokens")
            for fetch in fetches or (enough(gallery, rows, k),)
        ]
        return _built(gallery, index, rescored, points)

    return _method(f"FAISS flat, {rows}", rows, rescored, build, "float32, every row read")


def scalar_8bit(k: int) -> Method:
    def build(gallery: Gallery) -> Built:
        faiss = _faiss()
        index = faiss.IndexScalarQuantizer(gallery.width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(gallery.rows, 100_000))
        index.add(gallery.rows)
        fetch = enough(gallery, "tokens", k)
        return _built(gallery, index, False, [_point(gallery, "tokens", _search(index), fetch, False, {"fetch": fetch})])

    return _method("FAISS SQ8, tokens", "tokens", False, build, "8 bits a dimension, every row read")


def hnsw(rows: Rows, links: int, searches: tuple[tuple[int, int], ...], *, rescored: bool, most_rows: int | None = None) -> Method:
    """`searches`: (rows fetched, efSearch) of each point; FAISS raises efSearch to the rows fetched."""

    def build(gallery: Gallery) -> Built:
        faiss = _faiss()
        index = faiss.IndexHNSWFlat(gallery.width, links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCTION
        index.add(_rows(gallery, rows))

        def searching(ef: int) -> RowSearch:
            return _search(index, faiss.SearchParametersHNSW(efSearch=ef))

        points = [_point(gallery, rows, searching(ef), fetch, rescored, {"efSearch": ef, "fetch": fetch}) for fetch, ef in searches]
        return _built(gallery, index, rescored, points)

    how = f"a graph of {links} links a row over float32, efConstruction {EF_CONSTRUCTION}"

    def obstacle(gallery: Gallery) -> str | None:
        count = len(_rows(gallery, rows))
        if most_rows is None or count <= most_rows:
            return None
        return f"left out: building it over {count:,} rows takes minutes (--full)"

    return _method(f"FAISS HNSW{links}, {rows}", rows, rescored, build, how, obstacle)


def ivf_pq(rows: Rows, lists: int, code: int, searches: tuple[tuple[int, int], ...], *, rescored: bool) -> Method:
    """`lists` cells, rows as `code` bytes (8 bits a subvector). `searches`: (rows fetched, cells searched) of each point."""

    def build(gallery: Gallery) -> Built:
        faiss = _faiss()
        vectors = _rows(gallery, rows)
        quantizer = faiss.IndexFlatIP(gallery.width)
        index = faiss.IndexIVFPQ(quantizer, gallery.width, lists, code, 8, faiss.METRIC_INNER_PRODUCT)
        for clustering in (index.cp, index.pq.cp):
            clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, _TRAINING_ROWS  # it warns of fewer than 39
            clustering.niter = _TRAINING_ROUNDS
        index.train(_sample(vectors, _TRAINING_ROWS * max(lists, 256)))
        index.add(vectors)

        def searching(count: int) -> RowSearch:
            return _search(index, faiss.SearchParametersIVF(nprobe=count))

        points = [_point(gallery, rows, searching(count), fetch, rescored, {"nprobe": count, "fetch": fetch}) for fetch, count in searches]
        return _built(gallery, index, rescored, points)

    how = f"{lists} cells, {code} bytes a row"

    def obstacle(gallery: Gallery) -> str | None:
        if gallery.width % code:
            return f"left out: {code} subvectors do not divide a width of {gallery.width}"
        count = len(_rows(gallery, rows))
        return f"left out: {count:,} rows, fewer than {max(lists, 256):,} to train on" if count < max(lists, 256) else None

    return _method(f"FAISS IVF{lists},PQ{code}, {rows}", rows, rescored, build, how, obstacle)


def enough(gallery: Gallery, rows: Rows, k: int) -> int:
    """Rows that certainly hold the k best items and the reference: all tokens of k + 1 items."""
    if rows == "pooled":
        return min(k + 1, gallery.count)
    return min((k + 1) * gallery.tokens, gallery.count * gallery.tokens)


def _faiss() -> Any:
    import faiss

    return faiss


def _search(index: Any, parameters: Any = None) -> RowSearch:
    return searched(index, available_cpus(), parameters)


def _method(
    name: str, rows: Rows, rescored: bool, build: Callable[[Gallery], Built], how: str,
    obstacle: Callable[[Gallery], str | None] = lambda gallery: None,
) -> Method:  # fmt: skip
    return Method(name + (", re-scored" if rescored else ""), f"{how}; {_HOW[rows, rescored]}.", build, "faiss", obstacle)


def _rows(gallery: Gallery, rows: Rows) -> F32:
    return gallery.rows if rows == "tokens" else gallery.pooled


def _point(
    gallery: Gallery, rows: Rows, search: RowSearch, fetch: int, rescored: bool, settings: dict[str, int],
    *, exact: bool = False,
) -> Point:  # fmt: skip
    kept = gallery.items.astype(np.float16, copy=False) if rescored else None
    per_item = gallery.tokens if rows == "tokens" else 1
    known = exact or rescored
    return Point(settings, by_rows(search, per_item, fetch, kept), exact, "exact" if known else "own", "float16" if rescored else "float32")


def _built(gallery: Gallery, index: Any, rescored: bool, points: list[Point]) -> Built:
    """With what re-scoring reads: the tokens in float16."""
    size = int(_faiss().serialize_index(index).nbytes)
    return Built(size + (2 * gallery.items.size if rescored else 0), points)


def _sample(rows: F32, most: int) -> F32:
    if len(rows) <= most:
        return rows
    return rows[np.random.default_rng(0).choice(len(rows), most, replace=False)]
