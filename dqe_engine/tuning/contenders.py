"""Ways to find the k items whose best token is closest to a query, with the settings that trade time for answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.early import SHARES
from dqe_engine.zones.lists import LEAST_TOKENS

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Found = tuple[F32, I64]
"""Scores and gallery positions (B, k), score descending, then position ascending; padded with -inf and -1."""
Search = Callable[[F32, I64, int], Found]
"""Queries (B, D), each one's reference (B,), which is left out of its answer (-1: none), and k."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to ask a built index. `exact`: the answer is that of a full search."""

    values: dict[str, int]
    search: Search
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """An index of one gallery. `size`: bytes of all that a search reads. `ladders`: lists of settings for so many threads, each in the
    order of their cost; None where it cannot be held to this many."""

    size: int
    ladders: Callable[[int], Sequence[Sequence[Setting]] | None]


@dataclass(frozen=True, slots=True)
class Contender:
    """`build` takes items (N, M, D) float32, and may raise LeftOutError. `how`: what is stored and searched, for a report. `obstacle`: why
    it is left out, if it is."""

    name: str
    how: str
    build: Callable[[F32], Built]
    package: str | None = None
    obstacle: Callable[[F32], str | None] = lambda items: None


class LeftOutError(Exception):
    """A contender that cannot be built for these items, as only the attempt shows. The message is what `obstacle` would have said."""


def exact(
    name: str, how: str, *, screened: bool, lists: bool, prefix: bool = True, made: Callable[[F32], Screen] | None = None, threads: int = 0
) -> Contender:
    """This engine's exact search, by an 8-bit copy with lists and prefixes or without. `made`: makes the screen instead, with what it has.

    threads: to build, 0 for one per processor.
    """

    def build(items: F32) -> Built:
        screen = None
        if screened:
            screen = Screen.build(items, threads=threads, lists=lists, prefix=prefix) if made is None else made(items)

        def searching(threads: int) -> Search:
            def search(queries: F32, references: I64, k: int) -> Found:
                exclude: Any = references[:, None] if (references >= 0).any() else None
                found = select_zones(queries, items, k=k, exclude=exclude, screen=screen, threads=threads, backend="cpu")
                return found.scores, found.ids

            return search

        return Built(items.nbytes + (screen.nbytes if screen else 0), lambda threads: [[Setting({}, searching(threads), exact=True)]])

    return Contender(name, how, build)


def early(name: str, made: Callable[[F32], Screen] = Screen.build) -> Contender:
    """This engine's search by lists that stop early: the cheapest setting first. `made`: a screen that is there already; lists that it
    left out, as exact searches gain nothing by them, are made."""

    def build(items: F32) -> Built:
        screen = made(items)
        if screen.lists is None and screen.left is not None:
            screen = Screen.build(items, lists="always")
        lists = screen.lists
        if lists is None:
            raise LeftOutError("left out: most tokens have no direction (their norm is 0), so no lists are made")

        def searching(values: dict[str, int]) -> Search:
            shrunk = Screen(screen.shards, lists.shrunk(values["angle %"] / 100, always=True), screen.prefix)

            def search(queries: F32, references: I64, k: int) -> Found:
                found = [
                    _one(query, items, reference, k, shrunk, values["threads"])
                    for query, reference in zip(queries, references, strict=True)
                ]
                return np.concatenate([scores for scores, _ in found]), np.concatenate([ids for _, ids in found])

            return search

        return Built(
            items.nbytes + screen.nbytes,
            lambda threads: ladders([[{"angle %": round(100 * share), "threads": threads} for share in SHARES]], searching),
        )

    def obstacle(items: F32) -> str | None:
        count = items.shape[0] * items.shape[1]
        return f"left out: no lists are made for {count:,} tokens" if count < LEAST_TOKENS else None

    how = "lists are skipped by a share of their angle, which is likely and not certain to lose nothing."
    return Contender(name, how, build, obstacle=obstacle)


def _one(query: F32, items: F32, reference: int, k: int, screen: Screen, threads: int) -> Found:
    """One query alone: a batch is swept where that is faster, and then finds everything."""
    exclude = [[int(reference)]] if reference >= 0 else None
    found = select_zones(query[None], items, k=k, exclude=exclude, screen=screen, threads=threads, backend="cpu")
    return found.scores, found.ids


def by_rows(search_rows: Callable[[F32, int], Found], rows_per_item: int, fetch: int, rescore: NDArray[Any] | None) -> Search:
    """MaxSim by a library that ranks single vectors.

    The `fetch` best rows are taken, the row's item is row // `rows_per_item`, and an item's score is that of its best row. With
    `rescore` (N, M, D), the items found are scored again by all of their tokens. Where every token is a row and the library is exact,
    M (k + 1) rows hold the k best items and the reference, so the answer is exact.
    """

    def search(queries: F32, references: I64, k: int) -> Found:
        scores, rows = search_rows(queries, fetch)
        best, positions = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for b, query in enumerate(queries):
            items, first = np.unique(rows[b] // rows_per_item, return_index=True)  # rows come best first
            kept = (items >= 0) & (items != references[b])
            items = items[kept]
            mine = scores[b][first[kept]] if rescore is None else (rescore[items].astype(np.float32, copy=False) @ query).max(axis=1)
            order = np.lexsort((items, -mine))[:k]
            best[b, : len(order)], positions[b, : len(order)] = mine[order], items[order]
        return best, positions

    return search


def ladders(values: Iterable[Sequence[dict[str, int]]], search: Callable[[dict[str, int]], Search]) -> list[list[Setting]]:
    """Settings of each list of values."""
    return [[Setting(one, search(one)) for one in ladder] for ladder in values]
