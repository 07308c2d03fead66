"""Queries of every kind, alone and in batches: what each option does, and what is remembered."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.queries import IDS, MIXED, RED, ids, numbered_engine, png, same
from support.samples import noise_image

from dqe_engine import encoder
from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.query import MOST_RESULTS, Query

ARRAYS = (np.zeros(8, np.float32), np.zeros((2, 8), np.float32), np.zeros(2, np.float32))


@pytest.fixture
def engine(bundle_path: Path, image_folder: Path) -> RetrievalEngine:
    return numbered_engine(bundle_path, image_folder)


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
        ({"text": "a", "zones": ZoneSpec(lo=0.1, hi=0.5, bounds="pooled")}, "zones with pooled bounds.*give absolute bounds"),
        ({"text": "a", "zones": ZoneSpec(lo=0.1, hi=0.5, bounds="rank")}, "zones with rank bounds.*give absolute bounds"),
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
