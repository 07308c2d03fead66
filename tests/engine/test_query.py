"""Queries of every kind, alone, in batches and through the batcher: what each option does, and what is remembered."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.samples import noise_image

from dqe_engine import encoder
from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import DeadlineError, InputError, OverloadError
from dqe_engine.index.filters import is_small
from dqe_engine.query import MOST_RESULTS, Query
from dqe_engine.results import SearchResult

IDS = tuple(sorted(f"{'sub/' if n % 2 else ''}{n:02}.png" for n in range(12)))
ARRAYS = (np.zeros(8, np.float32), np.zeros((2, 8), np.float32), np.zeros(2, np.float32))
RED = Query(reference_id="00.png", text="in red", k=11)


@pytest.fixture
def engine(bundle_path: Path, image_folder: Path) -> RetrievalEngine:
    made = RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    made.new_index(image_storage="f32")
    made.index_images(image_folder, metadata={id: {"n": n} for n, id in enumerate(IDS)})
    return made


def png(seed: int) -> bytes:
    import io

    stream = io.BytesIO()
    noise_image(seed).save(stream, "PNG")
    return stream.getvalue()


def ids(result: SearchResult) -> list[str]:
    return [hit.id for hit in result.hits]


def same(found: SearchResult, expected: SearchResult) -> None:
    assert ids(found) == ids(expected)
    np.testing.assert_allclose([h.score for h in found.hits], [h.score for h in expected.hits], rtol=0, atol=1e-6)
    assert (found.mode, found.overrides, found.truncated) == (expected.mode, expected.overrides, expected.truncated)
    assert [h.zone for h in found.hits] == [h.zone for h in expected.hits]


# -- options --------------------------------------------------------------------------------------------------------------


def test_pages_are_pieces_of_the_whole(engine: RetrievalEngine) -> None:
    whole = engine.search(replace(RED, zones=ZoneSpec(lo=0.15, hi=0.4)))
    pages = [engine.search(replace(RED, k=4, offset=offset, zones=ZoneSpec(lo=0.15, hi=0.4))) for offset in (0, 4, 8, 12)]
    assert sum(map(ids, pages), []) == ids(whole)  # noqa: RUF017
    assert [hit for page in pages for hit in page.hits] == list(whole.hits), "Δ is to the best hit of all, and zones are of the ranking"
    zones = [hit.zone for hit in whole.hits]
    assert zones == sorted(zones, key=["near", "mid", "easy"].index)
    assert {hit.zone: hit.delta < 0.15 for hit in whole.hits}["near"]
    assert whole.zones is not None
    assert zones.count("mid") == whole.zones.counts.mid > 0


def test_a_minimum_score(engine: RetrievalEngine) -> None:
    scores = [hit.score for hit in engine.search(RED).hits]
    assert [hit.score for hit in engine.search(replace(RED, minimum_score=scores[4])).hits] == scores[:5]
    assert engine.search(replace(RED, minimum_score=2.0)).hits == ()
    assert len(engine.search(replace(RED, minimum_score=scores[4], offset=3)).hits) == 2
    zones = engine.search(replace(RED, zones=ZoneSpec(lo=0.0, hi=2.0), minimum_score=scores[4])).zones
    assert zones is not None
    assert zones.counts.mid == len(scores)
    assert [hit.score for hit in zones.mid] == scores[:5]


def test_numbers_of_numpy(engine: RetrievalEngine) -> None:
    query = replace(RED, k=np.int8(5), offset=np.uint64(2))  # type: ignore[arg-type]
    assert ids(engine.search(query)) == ids(engine.search(RED))[2:7]


def test_what_is_no_query(engine: RetrievalEngine) -> None:
    with pytest.raises(InputError, match="expected a Query, got str; such as Query"):
        engine.search("in red")  # type: ignore[arg-type]


def test_weights_that_take_the_place_of_the_predicted(engine: RetrievalEngine) -> None:
    predicted = engine.search(RED).weights
    absolute = engine.search(replace(RED, absolute_weights={name: 2 * value for name, value in predicted.items()}))
    multiplied = engine.search(replace(RED, weights=dict.fromkeys(predicted, 2.0)))
    assert ids(absolute) == ids(multiplied)
    np.testing.assert_allclose(list(absolute.weights.values()), list(multiplied.weights.values()), rtol=1e-6)
    assert absolute.predicted_weights == pytest.approx(predicted)


def test_examples_of_what_is_not_wanted(engine: RetrievalEngine) -> None:
    before = engine.search(RED)
    worst = before.hits[0].id
    after = engine.search(replace(RED, unlike=[worst]))
    assert worst not in ids(after)
    tokens = engine.index.target_tokens(worst)

    def likeness(id: str) -> float:
        return float((engine.index.target_tokens(id) @ tokens.T).max())

    moved = {hit.id: hit.score for hit in after.hits}
    fell = sorted(moved, key=lambda id: moved[id] - {hit.id: hit.score for hit in before.hits}[id])
    assert np.mean([likeness(id) for id in fell[:3]]) > np.mean([likeness(id) for id in fell[-3:]]), "its like falls most"
    with pytest.raises(InputError, match="'absent' is not in the index"):
        engine.search(replace(RED, unlike=["absent"]))


def test_an_image_alone_asks_for_what_is_like_it(engine: RetrievalEngine, image_folder: Path) -> None:
    found = engine.search(Query(reference_id="00.png", k=12, exclude_reference=False))
    tokens = {id: engine.index.target_tokens(id) for id in IDS}
    query = compose_query(
        tokens["00.png"].mean(axis=0)[None], np.zeros((1, 2, tokens["00.png"].shape[1]), np.float32), np.zeros((1, 2), np.float32)
    )
    expected = {id: float((rows @ query[0]).max()) for id, rows in tokens.items()}
    assert ids(found) == sorted(expected, key=lambda id: -expected[id])
    assert (found.mode, found.weights, found.predicted_weights) == ("image", {}, {})
    same(engine.search(Query(image=image_folder / "00.png", k=12)), found)
    assert engine.search(Query(reference_id="00.png", k=12)).timings_ms["query"] == 0, "its tokens are in the index"


def test_a_text_alone_asks_the_encoder_without_an_image(engine: RetrievalEngine) -> None:
    found = engine.search(Query(text="in red", k=12))
    text, sizes = engine.bundle.text_encoder().encode(["in red"]), engine.bundle.sizes
    nothing = np.zeros((1, sizes.image_tokens, sizes.vision_width), np.float32)
    fused = engine.bundle.session(QUERY_ENCODER, provider="cpu").run(
        image_tokens=nothing, input_ids=text.input_ids, attention_mask=text.attention_mask
    )
    base = fused.pop("base_query")
    read = engine.bundle.session(ATTRIBUTE_HEADS, provider="cpu").run(**fused, attention_mask=text.attention_mask)
    (query,) = compose_query(base, read["sub_queries"], read["attribute_weights"])
    expected = {id: float((engine.index.target_tokens(id) @ query).max()) for id in IDS}
    assert ids(found) == sorted(expected, key=lambda id: -expected[id])
    assert found.mode == "text"
    assert set(found.weights) == {"colour", "shape"}


@pytest.mark.parametrize("query", [RED, Query(text="in red"), Query(reference_id="02.png"), replace(RED, unlike=["04.png", "02.png"])])
def test_an_explanation_adds_up_to_the_score(engine: RetrievalEngine, query: Query) -> None:
    found = engine.search(replace(query, explain=True, weights={"colour": 3.0} if query.text else {}))
    assert len(found.hits) > 5
    for hit in found.hits:
        assert hit.explanation is not None
        parts = hit.explanation
        assert parts.base + sum(parts.attributes.values()) + parts.unlike == pytest.approx(hit.score, abs=1e-5)
        assert all(-1.00001 <= value <= 1.00001 for value in (parts.base_similarity, *parts.similarities.values()))
        assert set(parts.attributes) == set(parts.similarities) == ({"colour", "shape"} if query.text else set())
        assert (parts.unlike != 0) == bool(query.unlike)
    assert engine.search(query).hits[0].explanation is None


def test_words_that_the_model_does_not_know_are_told(engine: RetrievalEngine) -> None:
    assert engine.search(replace(RED, text="in red")).unknown_words == ()
    found = engine.search(replace(RED, text="in red 語 🙂 語"))
    assert found.unknown_words == ("語", "🙂")
    assert ids(found) == ids(engine.search(replace(RED, text="in red 字 🙂 字")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a query needs an image, a text, or both: .*, got neither"),
        ({"image": b"x", "reference_id": "a"}, "got both"),
        ({"text": 7}, "text is a str, got int"),
        ({"reference_id": b"a"}, "reference_id is a str, got bytes"),
        ({"text": "a", "exclude": "sku-2"}, "exclude: expected a collection of ids, got str; wrap it in a list"),
        ({"text": "a", "unlike": b"sku-2"}, "unlike: expected a collection of ids, got bytes"),
        ({"text": "a", "exclude": (id for id in "ab")}, "exclude: expected a collection of ids, got generator"),
        ({"text": "a", "k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"text": "a", "exclude": [2]}, "exclude: ids are str, got int"),
        ({"text": "a", "exclude": [["a"]]}, "exclude: ids are str, got list"),
        ({"text": "a", "unlike": (b"a",)}, "unlike: ids are str, got bytes"),
        ({"text": "a", "explain": "no"}, "explain is True or False, got 'no'"),
        ({"text": "a", "exclude_reference": 0}, "exclude_reference is True or False, got 0"),
        ({"text": "a", "k": np.int16(MOST_RESULTS), "offset": np.int16(30000)}, f"come to 40000, at most {MOST_RESULTS}"),
        ({"text": "a", "zones": ZoneSpec(lo=0.1, hi=0.5, bounds="pooled")}, "zones with pooled bounds: .*give absolute bounds"),
        ({"text": "a", "zones": ZoneSpec(lo=0.1, hi=0.5, bounds="rank")}, "zones with rank bounds: .*give absolute bounds"),
        ({"text": "a", "weights": {"colour": 10**400}}, "weight of 'colour': expected a number .* got an integer of 1,329 bits"),
        ({"text": "a", "absolute_weights": {"colour": 1e39}}, "weight of 'colour': expected a number .* got 1e.39"),
        ({"image": b"x", "weights": {"colour": 1}}, "weights: attributes are read from the text, and there is none"),
        ({"text": "a", "minimum_score": 10**400}, "minimum_score is a finite number"),
        ({"text": "a", "k": -(10**5000)}, "k must be a whole number of at least 1, got an integer of 16,610 bits"),
        ({"text": "a", "k": 10**5000}, "k and offset come to an integer of 16,610 bits"),
        ({"text": "a", "k": True}, "k must be a whole number"),
        ({"text": "a", "k": 2.0}, "k must be a whole number"),
        ({"text": "a", "offset": -1}, "offset must be a whole number of at least 0"),
        ({"text": "a", "k": MOST_RESULTS, "offset": 1}, f"at most {MOST_RESULTS} can be asked for"),
        ({"text": "a", "zones": None}, "zones is True, False or a ZoneSpec, got NoneType"),
        ({"text": "a", "zones": "near"}, "zones is True, False or a ZoneSpec, got str"),
        ({"text": "a", "minimum_score": float("nan")}, "minimum_score is a finite number"),
        ({"text": "a", "minimum_score": "0.5"}, "minimum_score is a finite number"),
        ({"text": "a", "weights": [("colour", 1)]}, "weights: expected a mapping from attribute to number, got list"),
        ({"text": "a", "weights": {"colour": "2"}}, "weight of 'colour': expected a number from 0 to 3.4e.38, got '2'"),
        ({"text": "a", "weights": {"colour": None}}, "weight of 'colour'"),
        ({"text": "a", "absolute_weights": {"colour": -1}}, "weight of 'colour': expected a number from 0 to 3.4e.38, got -1"),
        ({"text": "a", "weights": {"colour": 1}, "absolute_weights": {"colour": 1}}, "not both"),
    ],
)  # fmt: skip
def test_queries_that_say_nothing_sensible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Query(**options)
    assert "\n" not in str(caught.value)


# -- batches --------------------------------------------------------------------------------------------------------------

MIXED: list[Callable[[Path], Query]] = [
    lambda folder: RED,
    lambda folder: Query(image=folder / "02.png", text="the same but round with long sleeves", k=3, filter={"n": {"<": 9}}),
    lambda folder: Query(text="less", k=2, zones=True),
    lambda folder: Query(reference_id="04.png", k=5, offset=2),
    lambda folder: Query(image=png(3), k=5, exclude=["02.png"]),
    lambda folder: Query(image=noise_image(7), text="in blue", weights={"colour": 0}, zones=ZoneSpec(lo=0.1, hi=0.3), explain=True),
    lambda folder: Query(reference_id="00.png", text="in red", filter={"n": {"<": 9}}, minimum_score=0.0, unlike=["02.png"]),
    lambda folder: Query(text="less " * 100, filter={"n": 99}),
]


def test_each_query_of_a_batch_has_its_own_options(engine: RetrievalEngine, image_folder: Path) -> None:
    queries = [make(image_folder) for make in MIXED]
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1, kept_bytes=0)
    fresh.attach(engine.index)
    for order in (queries, queries[::-1]):
        for found, query in zip(engine.search_batch(order), order, strict=True):
            same(found, fresh.search(query))
            assert len(found.hits) <= query.k


def test_what_is_remembered_gives_the_same_and_asks_no_graph(engine: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Query(image=png(1), text="in red")
    first = [engine.search(RED), engine.search(upload)]
    for session in engine._encoder.sessions:
        monkeypatch.setattr(session, "run", lambda **inputs: pytest.fail("a graph was asked again"))
    for query, expected in zip((RED, upload), first, strict=True):
        same(engine.search(query), expected)
        turned = engine.search(replace(query, weights={"colour": 5.0}, filter={"n": {"<": 6}}, k=3))
        assert turned.weights["colour"] == pytest.approx(5 * expected.weights["colour"])
        assert turned.timings_ms["vision"] == turned.timings_ms["query"] == 0
    assert engine.remembered["queries"].hits == 4
    assert engine.remembered["uploads"].hits == 2


def test_a_replaced_item_is_not_answered_from_memory(engine: RetrievalEngine) -> None:
    before = engine.search(RED)
    other = engine.encode_images([noise_image(99)])
    engine.index.add(["00.png"], other.target_tokens, other.image_tokens, replace=True)
    after = engine.search(RED)
    fresh = RetrievalEngine.load(engine.bundle.path, provider="cpu", threads=1, kept_bytes=0)
    fresh.attach(engine.index)
    same(after, fresh.search(RED))
    assert [hit.score for hit in after.hits] != [hit.score for hit in before.hits]


def test_what_is_remembered_takes_what_it_says(engine: RetrievalEngine) -> None:
    """Keys of long texts included, which take more than the arrays of a small model."""
    engine.search(replace(RED, text="less " * 100))
    before, gc_was = engine.remembered["queries"].bytes, gc.isenabled()
    gc.disable()
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        for n in range(300):
            engine._encoder.fused.put((engine.index.snapshot().table.identity, encoder._digest((*range(400, 500), n))), ARRAYS)
        taken = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
        if gc_was:
            gc.enable()
    assert taken <= 1.1 * (engine.remembered["queries"].bytes - before)


def test_memory_is_bounded(bundle_path: Path) -> None:
    engine = RetrievalEngine.load(bundle_path, provider="cpu", threads=1, kept_bytes=4000)
    for n in range(12):
        engine.search(Query(image=png(n), text="in red"))
    for kept in engine.remembered.values():
        assert 0 < kept.bytes <= 4000
        assert 0 < kept.entries < 12
    none = RetrievalEngine.load(bundle_path, provider="cpu", threads=1, kept_bytes=0)
    none.search(Query(image=png(0), text="in red"))
    assert {kept.entries for kept in none.remembered.values()} == {0}


def test_an_image_that_threads_share_before_it_was_read(engine: RetrievalEngine, image_folder: Path) -> None:
    expected = ids(engine.search(Query(image=image_folder / "02.png", text="in red")))
    for _ in range(10):
        with Image.open(image_folder / "02.png") as shared, ThreadPoolExecutor(8) as pool:
            query = Query(image=shared, text="in red")
            assert [ids(found) for found in pool.map(engine.search, [query] * 8)] == [expected] * 8


def test_warming_up(engine: RetrievalEngine) -> None:
    engine.warm_up()
    assert engine.index.stats().screen_bytes > 0
    assert engine.remembered["queries"].entries == 0
    RetrievalEngine.load(engine.bundle.path, provider="cpu").warm_up()  # an empty index too


# -- the batcher ----------------------------------------------------------------------------------------------------------


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
    answer = engine._answer
    monkeypatch.setattr(engine, "_answer", lambda *arguments: (began.set(), gate.wait(30), answer(*arguments))[-1])
    with engine.batcher(room=1) as batcher, ThreadPoolExecutor(4) as pool:
        leader = pool.submit(batcher.search, RED)
        assert began.wait(30)
        with pytest.raises(DeadlineError):
            batcher.search(RED, timeout=0.01)
        waiting = pool.submit(batcher.search, RED)
        while batcher.waiting == 0:
            threading.Event().wait(0.001)
        with pytest.raises(OverloadError, match="1 questions wait already"):
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
            with pytest.raises(OverloadError, match="3 questions wait already"):
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


# -- dialogues ------------------------------------------------------------------------------------------------------------


def test_a_dialogue_goes_on_from_its_hits(engine: RetrievalEngine) -> None:
    dialogue = engine.dialogue(replace(RED, filter={"n": {"<": 10}}, weights={"colour": 2.0}))
    first = dialogue.result
    second = dialogue.refine("more square")
    same(second, engine.search(Query(reference_id=first.hits[0].id, text="more square", k=11, filter={"n": {"<": 10}})))
    chosen = second.hits[3].id
    same(dialogue.refine("round", chosen=chosen), engine.search(Query(reference_id=chosen, text="round", k=11, filter={"n": {"<": 10}})))
    unwanted = dialogue.result.hits[0].id
    assert unwanted not in ids(dialogue.unlike(unwanted))
    assert dialogue.weigh({"shape": 0.0}).weights["shape"] == 0
    assert dialogue.query.unlike == (unwanted,)
    assert len(dialogue.steps) == 5
    for _ in range(4):
        dialogue.back()
    assert dialogue.result is first
    with pytest.raises(InputError, match="this is the first step"):
        dialogue.back()
    empty = engine.dialogue(replace(RED, filter={"n": 99}))
    with pytest.raises(InputError, match="no hits to go on from"):
        empty.refine("in blue")
