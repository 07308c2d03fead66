"""Queries of many threads and tasks through the batcher: the answers that each would get alone, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.queries import MIXED, RED, numbered_engine, png, same

from dqe_engine import encoder
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DeadlineError, InputError, OverloadError
from dqe_engine.index.filters import is_small
from dqe_engine.query import Query
from dqe_engine.results import SearchResult


@pytest.fixture
def engine(bundle_path: Path, image_folder: Path) -> RetrievalEngine:
    return numbered_engine(bundle_path, image_folder)


def test_threads_through_the_batcher_get_what_they_would_get_alone(engine: RetrievalEngine, image_folder: Path) -> None:
    queries = [make(image_folder) for make in MIXED] * 6
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1, kept_bytes=0)
    fresh.attach(engine.index)
    expected = [fresh.search(query) for query in queries]
    with engine.batcher(most=5) as batcher, ThreadPoolExecutor(16) as pool:
        for found, alone in zip(pool.map(batcher.search, queries), expected, strict=True):
            same(found, alone)
            assert found.timings_ms["wait"] >= 0


def test_a_filter_that_is_wrong_is_told_before_it_queues_up(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.batcher() as batcher:
        monkeypatch.setattr(batcher._batcher, "ask", lambda *_, **options: pytest.fail("it queued up"))
        with pytest.raises(InputError, match="unknown operator"):
            batcher.search(replace(RED, filter={"n": {"~": 1}}))


def test_tasks_through_the_batcher(engine: RetrievalEngine, image_folder: Path) -> None:
    queries = [make(image_folder) for make in MIXED]

    async def ask(batcher: Any) -> list[SearchResult | BaseException]:
        wrong = Query(image=b"no image", text="in red")
        return await asyncio.gather(*(batcher.search_async(q, timeout=60) for q in [*queries, wrong]), return_exceptions=True)

    with engine.batcher() as batcher:
        *found, failed = asyncio.run(ask(batcher))
    for result, query in zip(found, queries, strict=True):
        assert isinstance(result, SearchResult)
        same(result, engine.search(query))
    assert isinstance(failed, InputError)


def test_a_full_batcher_and_a_late_one(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, began = threading.Event(), threading.Event()
    answer = engine._answerer.answer
    monkeypatch.setattr(engine._answerer, "answer", lambda *arguments: (began.set(), gate.wait(30), answer(*arguments))[-1])
    with engine.batcher(room=1) as batcher, ThreadPoolExecutor(4) as pool:
        leader = pool.submit(batcher.search, RED)
        assert began.wait(30)
        with pytest.raises(DeadlineError):
            batcher.search(RED, timeout=0.01)
        waiting = pool.submit(batcher.search, RED)
        while batcher.waiting == 0:
            threading.Event().wait(0.001)
        with pytest.raises(OverloadError, match="1 questions are waiting"):
            batcher.search(RED)
        with pytest.raises(InputError, match="'absent' is not an id"):
            batcher.search(replace(RED, reference_id="absent"))  # told although nobody has room for it
        gate.set()
        same(leader.result(30), waiting.result(30))


def counted(monkeypatch: pytest.MonkeyPatch, engine: RetrievalEngine) -> dict[str, list[int]]:
    """Rows of each batch by graph, and under "decode" a 1 for each upload that is decoded."""
    seen: dict[str, list[int]] = {"decode": []}
    for session in engine._encoder.sessions:

        def run(session: Any = session, run: Any = session.run, **inputs: Any) -> Any:
            seen.setdefault(session.spec.name, []).append(len(next(iter(inputs.values()))))
            return run(**inputs)

        monkeypatch.setattr(session, "run", run)
    opened = encoder.open_image
    monkeypatch.setattr(encoder, "open_image", lambda *arguments: (seen["decode"].append(1), opened(*arguments))[-1])
    return seen


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_equal_questions_of_a_batch_are_encoded_once(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1, kept_bytes=kept_bytes)
    fresh.attach(engine.index)
    upload = Query(image=png(3), text="in red")
    queries = [RED, upload, replace(RED, k=3), replace(upload, weights={"colour": 2.0}), replace(RED, text="in blue"), upload]
    expected = [engine.search(query) for query in queries]
    seen = counted(monkeypatch, fresh)
    for found, alone in zip(fresh.search_batch(queries), expected, strict=True):
        same(found, alone)
    assert seen == {"decode": [1], "vision_encoder": [1], "query_encoder": [3], "attribute_heads": [3]}


def test_equal_uploads_are_decoded_once_also_where_the_first_is_cancelled(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, gate, began = Query(image=png(3), text="in red"), threading.Event(), threading.Event()
    expected = engine.search(upload)
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1)
    fresh.attach(engine.index)
    seen, opened = counted(monkeypatch, fresh), encoder.open_image
    monkeypatch.setattr(encoder, "open_image", lambda *arguments: (began.set(), gate.wait(30), opened(*arguments))[-1])

    async def ask(batcher: Any) -> list[SearchResult]:
        tasks = [asyncio.create_task(batcher.search_async(upload)) for _ in range(8)]
        while not began.is_set():
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        gate.set()
        return await asyncio.gather(*tasks[1:])

    with fresh.batcher(readers=3) as batcher:
        for found in asyncio.run(ask(batcher)):
            same(found, expected)
    assert seen["decode"] == seen["vision_encoder"] == [1]
    assert set(seen["query_encoder"]) == {1}


def test_an_upload_that_cannot_be_decoded_is_told_to_all_who_sent_it(engine: RetrievalEngine) -> None:
    async def ask(batcher: Any) -> list[Any]:
        queries = [Query(image=b"no image", text="in red")] * 8 + [RED]
        return await asyncio.gather(*map(batcher.search_async, queries), return_exceptions=True)

    with engine.batcher(readers=3) as batcher:
        *failed, found = asyncio.run(ask(batcher))
    assert [type(error) for error in failed] == [InputError] * 8
    assert len(set(map(id, failed))) == 8
    same(found, engine.search(RED))


def test_more_uploads_than_there_is_room_for(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, opened, decoded = threading.Event(), encoder.open_image, list[bytes]()
    monkeypatch.setattr(encoder, "open_image", lambda *given: (gate.wait(30), decoded.append(given[0]), opened(*given))[-1])

    async def ask(batcher: Any) -> None:
        tasks = [asyncio.create_task(batcher.search_async(Query(image=png(n), text="in red"))) for n in range(3)]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        for query in (Query(image=png(9), text="in red"), RED):
            with pytest.raises(OverloadError, match="3 questions are waiting"):
                await batcher.search_async(query)
        tasks[2].cancel()
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError):
            await batcher.search_async(Query(image=png(7), text="in red"), timeout=0.01)
        gate.set()
        for task in tasks[:2]:
            assert (await task).hits

    with engine.batcher(room=3, readers=1) as batcher:
        asyncio.run(ask(batcher))
    assert decoded == [png(0), png(1)]


def test_what_runs_in_the_event_loops_thread(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch, image_folder: Path) -> None:
    """Small queries are checked there. Nothing is decoded, read from the index or compiled at length."""
    large, long = {"n": {"in": list(range(1000))}}, "less " * 1000
    queries = [make(image_folder) for make in MIXED] + [replace(RED, filter=large), replace(RED, text=long)]
    expected, here, threads = [engine.search(query) for query in queries], threading.get_ident(), dict[int, int]()
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1)
    fresh.attach(engine.index)
    read = fresh._encoder.prepare

    def prepare(query: Query, *rest: Any) -> Any:
        threads[id(query)] = threading.get_ident()
        return read(query, *rest)

    monkeypatch.setattr(fresh._encoder, "prepare", prepare)

    async def ask(batcher: Any) -> list[SearchResult]:
        wrong = {"n": {"in": [*range(1000), object()]}}
        with pytest.raises(InputError, match="compares with a string"):
            await batcher.search_async(replace(RED, filter=wrong))
        with pytest.raises(InputError, match="'absent' is not an id"):
            await batcher.search_async(replace(RED, reference_id="absent"))
        with pytest.raises(InputError, match="expected a Query"):
            await batcher.search_async("in red")
        return await asyncio.gather(*map(batcher.search_async, queries))

    with fresh.batcher() as batcher:
        for found, alone in zip(asyncio.run(ask(batcher)), expected, strict=True):
            same(found, alone)
    for query in queries:
        small = query.image is None and query.filter is not large and query.text is not long
        assert (threads[id(query)] == here) is small


@pytest.mark.parametrize("readers", [0, -1, 1.5, True])
def test_readers_are_counted(engine: RetrievalEngine, readers: Any) -> None:
    with pytest.raises(InputError, match="readers"):
        engine.batcher(readers=readers)


@pytest.mark.parametrize(
    ("filter", "small"),
    [
        ({"brand": "x", "price": {"<": 20}, "or": [{"size": {"in": ["S", "M"]}}, {"tags": None}]}, True),
        ({}, True),
        ({"n": {"in": [1] * 600}}, False),
        ({"n": "x" * 600}, False),
        ({"x" * 600: 1}, False),
        ({"n": {"in": range(10)}}, False),
        ("wrong", True),
        (object(), False),
    ],
)
def test_which_filters_are_small(filter: Any, *, small: bool) -> None:
    assert is_small(filter, 500) is small
