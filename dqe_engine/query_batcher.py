"""`QueryBatcher`: queries of many threads and tasks, read where each comes from and answered together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from .answering import Answerer
from .batching import Batcher
from .encoder import STAGES, Clock, Prepared, QueryEncoder
from .index.filters import is_small
from .index.searched import SearchedIndex
from .index.validation import check_count
from .processors import available_cpus, give_way
from .query import Query
from .results import SearchResult

_SMALL = 500
"""Characters of a text, and values and characters of a filter, that an event loop's thread reads itself."""


class Searched(Protocol):
    """A `RetrievalEngine`, as far as a batcher needs it: the index may be replaced while queries wait."""

    @property
    def searched(self) -> SearchedIndex: ...


class QueryBatcher:
    """An engine behind a `Batcher`. Uploads, texts and filters are read before they queue up, so that what is wrong with one is told at
    once, and big photographs hold up nobody's batch: in the caller's own thread, or for tasks in one of `readers` threads (None: as many
    as there are processors). What a task asks is read in the event loop's thread only where that takes less than a change of threads, as it
    never does where another process is asked for items; item tokens, which may be on the disk, are read by the batch. Answers are those of
    `RetrievalEngine.search`; their timings have "wait", for a reader, in the queue and for what a batch's others had still to do, too."""

    def __init__(
        self,
        engine: Searched,
        encoder: QueryEncoder,
        answerer: Answerer,
        *,
        most: int,
        patience: float,
        room: int,
        readers: int | None,
        niceness: int = 0,
        counts: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Raises InputError for bounds that are not positive (`patience`: negative)."""
        readers = available_cpus() if readers is None else readers
        check_count("readers", readers, 1)
        self._engine, self._encoder, self._answerer, self._counts = engine, encoder, answerer, counts
        self._batcher: Batcher[tuple[Prepared, Clock], SearchResult] = Batcher(
            self._answer, most=most, patience=patience, room=room, niceness=niceness
        )
        self._readers = ThreadPoolExecutor(readers, "dqe-reader", give_way, (niceness,))

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def search(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """Raises InputError, OverloadError where too many wait, and DeadlineError after `timeout` seconds in the queue and the batch."""
        return self._batcher.ask(self._prepared(query), timeout=timeout)

    async def search_async(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """The same for a task. Uploads that wait for a reader count as waiting, and `timeout` covers them, too. A task that is cancelled
        leaves the queue, and what it uploaded is not decoded any more."""
        if not (_is_small(query) and self._engine.searched.at_hand):
            return await self._batcher.ask_later_async(partial(self._read, query), self._readers, timeout=timeout)
        return await self._batcher.ask_async(self._prepared(query), timeout=timeout)

    def close(self) -> None:
        """Answer what waits and take no more."""
        self._batcher.close()
        if self._batcher.is_at_home:
            self._readers.shutdown(wait=False)

    def __enter__(self) -> QueryBatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, query: Query) -> tuple[Prepared, Clock]:
        """`_prepared` in a reader's thread, which also makes the bitmap of a large filter."""
        prepared, clock = self._prepared(query)
        if prepared.filter is not None:
            prepared.snapshot.prepare(prepared.filter)  # kept, so the batch finds it
        return prepared, clock

    def _prepared(self, query: Query) -> tuple[Prepared, Clock]:
        clock = Clock((*STAGES, "wait"))
        prepared = self._encoder.prepare(query, self._engine.searched.snapshot(), clock)
        clock.lap("decode")
        return prepared, clock

    def _answer(self, questions: Sequence[tuple[Prepared, Clock]]) -> list[SearchResult]:
        self._counts(len(questions))
        for _, clock in questions:
            clock.lap("wait")
        shared = Clock(STAGES)
        results = self._answerer.answer([prepared for prepared, _ in questions], shared)
        return [
            replace(result, timings_ms={stage: own.timings_ms[stage] + shared.timings_ms.get(stage, 0.0) for stage in own.timings_ms})
            for result, (_, own) in zip(results, questions, strict=True)
        ]


def _is_small(query: Query) -> bool:
    """Whether it is checked within some ten microseconds, or is no query at all, which is told as fast."""
    if not isinstance(query, Query):
        return True
    sizes = len(query.text or ""), len(query.unlike), len(query.weights), len(query.absolute_weights)
    return query.image is None and max(sizes) <= _SMALL and (query.filter is None or is_small(query.filter, _SMALL))
