"""Other libraries' exact search and MaxSim, beside ours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from dqe_engine.tuning import Built, Contender, Setting
from dqe_engine.tuning.contenders import F32, I64, Found, Search, by_rows, ladders
from dqe_engine.tuning.token_indexes import searched

from .. import machine

LEVELS = (4, 8, 16)
_MOST_CALLS = 100_000
"""Items that are asked one by one from Python."""


def flat(k: int) -> Contender:
    """Every row read. One query is one thread's work in FAISS, so the rows are cut in parts, one for each thread."""

    def build(items: F32) -> Built:
        import faiss

        rows, shards = items.reshape(-1, items.shape[2]), _Shards(items.shape[1])
        for part in shards.parts(rows):
            index = faiss.IndexFlatIP(rows.shape[1])
            index.add(part)
            shards.add(index)
        fetch = _fetch(items, k)

        def answers(threads: int) -> list[list[Setting]]:
            search = by_rows(searched(shards.together(threads), 1), items.shape[1], fetch, None)
            return [[Setting({}, search, exact=True)]]

        return Built(rows.nbytes, answers)

    return Contender("FAISS IndexFlatIP", "every token a row, every row read; a part of them for each thread.", build, "faiss")


def panorama(k: int) -> Contender:
    """Rows turned to their principal axes and read some axes at a time, until the rest cannot bring them among the best."""

    def build(items: F32) -> Built:
        import faiss

        rows, width = items.reshape(-1, items.shape[2]), items.shape[2]
        sample = rows[:: max(1, len(rows) // 100_000)].astype(np.float64)
        axes: F32 = np.ascontiguousarray(np.linalg.eigh(sample.T @ sample).eigenvectors[:, ::-1], np.float32)  # no centring: products stay
        by_levels = {levels: _Shards(items.shape[1]) for levels in LEVELS if width % levels == 0}
        if len(rows) > 1_000_000:  # one copy in memory; the others were never far from it
            by_levels = dict(list(by_levels.items())[len(by_levels) // 2 :][:1])
        for levels, shards in by_levels.items():
            for part in shards.parts(rows):
                index = faiss.IndexFlatIPPanorama(width, levels)
                for start in range(0, len(part), 1 << 18):
                    index.add(part[start : start + (1 << 18)] @ axes)
                shards.add(index)
        fetch = _fetch(items, k)

        def answers(threads: int) -> list[list[Setting]]:
            def searching(values: dict[str, int]) -> Search:
                found = searched(by_levels[values["levels"]].together(threads), 1)
                return by_rows(lambda queries, fetch: found(queries @ axes, fetch), items.shape[1], fetch, None)

            out = ladders(([{"levels": levels}] for levels in by_levels), searching)
            return [[Setting(one.values, one.search, exact=True)] for ladder in out for one in ladder]

        return Built(rows.nbytes + 4 * len(rows) * (8 + 1), answers)

    how = "rows on their principal axes, read some axes at a time until the rest cannot matter; a part of the rows for each thread."
    return Contender("FAISS IndexFlatIPPanorama, PCA", how, build, "faiss")


class _Shards:
    """FAISS indexes over parts of the rows: searched together by as many threads, or one after the other by one."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._kept: list[Any] = []
        self._together: dict[bool, Any] = {}

    def parts(self, rows: F32) -> list[F32]:
        items = len(rows) // self._tokens
        ends = [self._tokens * (items * number // machine.cores()) for number in range(machine.cores() + 1)]
        return [rows[start:stop] for start, stop in pairwise(ends) if stop > start]

    def add(self, index: Any) -> None:
        self._kept.append(index)

    def together(self, threads: int) -> Any:
        import faiss

        threaded = threads > 1
        if threaded not in self._together:
            shards = faiss.IndexShards(threaded, True)
            for index in self._kept:
                shards.add_shard(index)
            self._together[threaded] = shards
        return self._together[threaded]


def numkong_dots() -> Contender:
    """numkong has no search of a gallery; its packed matrix product gives all scores, of which NumPy takes the best."""

    def build(items: F32) -> Built:
        import numkong

        rows, tokens = items.reshape(-1, items.shape[2]), items.shape[1]
        packed = numkong.dots_pack(rows)

        def scores(query: F32) -> F32:
            found: F32 = np.asarray(numkong.dots_packed(query[None], packed)).reshape(-1, tokens).max(axis=1)
            return found

        return Built(rows.nbytes, lambda threads: [[Setting({}, _of_all(scores), exact=True)]] if threads == 1 else None)

    how = "all products in float32, accumulated in float64, by one thread; maximum over tokens and the best by NumPy."
    return Contender("numkong dots_packed", how, build, "numkong")


def numkong_maxsim() -> Contender:
    def build(items: F32) -> Built:
        import numkong

        packed = [numkong.maxsim_pack(item) for item in items]

        def scores(query: F32) -> F32:
            asked = numkong.maxsim_pack(query[None])
            return np.array([1.0 - numkong.maxsim_packed(asked, item) for item in packed], np.float32)

        return Built(items.nbytes, lambda threads: [[Setting({}, _of_all(scores))]] if threads == 1 else None)

    def obstacle(items: F32) -> str | None:
        return f"left out: {len(items):,} calls from Python, one for each item" if len(items) > _MOST_CALLS else None

    return Contender("numkong maxsim_packed", "an item at a time, by one thread.", build, "numkong", obstacle)


def maxsim_cpu() -> Contender:
    def build(items: F32) -> Built:
        import maxsim_cpu as library

        def scores(query: F32) -> F32:
            found: F32 = library.maxsim_scores(query[None], items)
            return found

        return Built(items.nbytes, lambda threads: [[Setting({}, _of_all(scores), exact=True)]] if threads == machine.cores() else None)

    return Contender("maxsim-cpu", "all scores, by as many threads as there are processors; the best by NumPy.", build, "maxsim_cpu")


def _of_all(scores: Callable[[F32], F32]) -> Search:
    """The best of all scores, a query at a time."""

    def search(queries: F32, references: I64, k: int) -> Found:
        best, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            every = scores(query)
            if references[row] >= 0:
                every[references[row]] = -np.inf
            some = np.argpartition(-every, k)[:k]
            order = some[np.lexsort((some, -every[some]))]
            best[row], ids[row] = every[order], order
        return best, ids

    return search


def _fetch(items: F32, k: int) -> int:
    """Rows that hold the k best items for certain."""
    return int(min(k, items.shape[0]) * items.shape[1])
