"""The engine end to end on the tiny bundle: indexing, searching, overrides, zones, and what it refuses."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.samples import noise_image
from support.tiny_bundle import SIZES, build_tiny_bundle, build_tiny_heads

import dqe_engine
from dqe_engine.bundle import Bundle
from dqe_engine.compose import compose_query
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER, GraphSpec
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import STAGES, RetrievalEngine
from dqe_engine.errors import BackendError, BundleError, IndexFormatError, InputError
from dqe_engine.heads import replace_heads
from dqe_engine.image_policy import ImagePolicy
from dqe_engine.index import GalleryIndex
from dqe_engine.query import Query

IDS = tuple(sorted(f"{'sub/' if n % 2 else ''}{n:02}.png" for n in range(12)))


@pytest.fixture
def indexed(engine: RetrievalEngine, image_folder: Path) -> RetrievalEngine:
    engine.new_index(image_storage="f32")
    engine.index_images(image_folder, batch_size=5)
    return engine


def test_the_public_names_are_lazy_and_right() -> None:
    assert dqe_engine.RetrievalEngine is RetrievalEngine
    assert dqe_engine.GalleryIndex is GalleryIndex


def test_encoding_does_not_depend_on_batches(engine: RetrievalEngine) -> None:
    images = [noise_image(seed) for seed in range(5)]
    whole, split = engine.encode_images(images), engine.encode_images(images, batch_size=2)
    assert whole.target_tokens.shape == (5, SIZES.target_tokens, SIZES.embedding_dim)
    assert whole.image_tokens.shape == (5, SIZES.image_tokens, SIZES.vision_width)
    np.testing.assert_allclose(split.target_tokens, whole.target_tokens, rtol=0, atol=1e-6)
    np.testing.assert_allclose(split.image_tokens, whole.image_tokens, rtol=0, atol=1e-6)
    assert engine.encode_images([]).target_tokens.shape == (0, SIZES.target_tokens, SIZES.embedding_dim)


def test_a_folder_is_indexed(engine: RetrievalEngine, image_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = engine.index_images(image_folder, batch_size=5, progress=lambda done, total: seen.append((done, total)))
    assert report.added == engine.index.ids == IDS
    assert report.skipped == ()
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_mappings_and_paths(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images({"memory": noise_image(1), "bytes": (image_folder / "00.png").read_bytes()}, metadata={"memory": {"n": 1}})
    engine.index_images([image_folder / "02.png", str(image_folder / "04.png")])
    assert engine.index.ids == ("memory", "bytes", (image_folder / "02.png").as_posix(), (image_folder / "04.png").as_posix())
    assert engine.index_images({}).added == ()


def test_bad_images_stop_or_are_reported(engine: RetrievalEngine, image_folder: Path) -> None:
    (image_folder / "03.png").write_bytes((image_folder / "02.png").read_bytes()[:70])
    (image_folder / "zz.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"03\.png: damaged or truncated"):
        engine.index_images(image_folder, batch_size=2)
    assert engine.index.ids == ("00.png", "02.png"), "whole batches before the bad image stay"
    engine.new_index()
    report = engine.index_images(image_folder, batch_size=2, on_error="skip")
    assert [skip.id for skip in report.skipped] == ["03.png", "zz.jpg"]
    assert "damaged" in report.skipped[0].reason
    assert "not an image" in report.skipped[1].reason
    assert engine.index.ids == report.added == IDS


def test_indexing_that_is_refused_before_any_work(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images({"a": noise_image(0)})
    before = engine.index.search(np.ones((1, SIZES.embedding_dim), np.float32), 1)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ({"a": noise_image(1), "b": noise_image(2)}, {"add_only": True}, "1 images differ from those .* under the same ids.*'a'"),
        ([image_folder / "00.png"] * 2, {}, "given more than once"),
        ([noise_image(1)], {}, "pass a mapping from id to image"),
        (image_folder / "absent", {}, "not a folder of images"),
        (image_folder / "00.png", {}, "not a folder of images"),
        ({"b": noise_image(1)}, {"on_error": "ignore"}, "on_error is"),
        ({"b": noise_image(1)}, {"batch_size": 0}, "batch_size must be"),
        ({"b": noise_image(1)}, {"metadata": {"c": {}}}, "metadata for 1 ids that neither the images nor the index have: 'c'"),
        ({"": noise_image(1)}, {}, "non-empty strings"),
    ]
    for images, options, message in cases:
        with pytest.raises(InputError, match=message):
            engine.index_images(images, **options)
    assert engine.index.ids == ("a",)
    engine.index_images({"a": noise_image(1)})
    assert engine.index.search(np.ones((1, SIZES.embedding_dim), np.float32), 1) != before


def test_file_names_that_are_not_unicode(engine: RetrievalEngine, image_folder: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    noise_image(3).save(image_folder / "03.png")
    (image_folder / "03.png").rename(image_folder / name)
    with pytest.raises(InputError, match="not valid Unicode"):
        engine.index_images(image_folder)
    report = engine.index_images(image_folder, on_error="skip")
    assert [skip.id for skip in report.skipped] == [name]
    assert report.added == IDS


def test_an_interrupt_keeps_whole_batches(engine: RetrievalEngine, image_folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.index_images(image_folder, batch_size=5, progress=stop)
    assert engine.index.ids == IDS[:10]


def test_search_is_the_composed_query_against_the_gallery(indexed: RetrievalEngine, image_folder: Path) -> None:
    """Everything by hand, from the graphs' own outputs."""
    result = indexed.search(Query(image=image_folder / "00.png", text="in red", k=12))
    encoded = indexed.encode_images([image_folder / id for id in IDS])
    text = indexed.bundle.text_encoder().encode(["in red"])
    session = indexed.bundle.session(QUERY_ENCODER, provider="cpu", threads=1)
    image_tokens = encoded.image_tokens[:1]
    fused = session.run(image_tokens=image_tokens, input_ids=text.input_ids, attention_mask=text.attention_mask)
    base = fused.pop("base_query")
    parts = indexed.bundle.session(ATTRIBUTE_HEADS, provider="cpu", threads=1).run(**fused, attention_mask=text.attention_mask)
    query = compose_query(base, parts["sub_queries"], parts["attribute_weights"])[0]
    scores = (encoded.target_tokens @ query).max(axis=1)
    order = np.argsort(-scores, kind="stable")
    assert [hit.id for hit in result.hits] == [IDS[n] for n in order]
    np.testing.assert_allclose([hit.score for hit in result.hits], scores[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose([hit.delta for hit in result.hits], scores[order[0]] - scores[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(list(result.weights.values()), parts["attribute_weights"][0], rtol=0, atol=1e-6)
    assert set(result.timings_ms) == set(STAGES)
    assert result.timings_ms["vision"] > 0


def test_a_reference_by_id_equals_its_image_and_needs_no_vision(indexed: RetrievalEngine, image_folder: Path) -> None:
    by_id = indexed.search(Query(reference_id="00.png", text="in red", exclude_reference=False))
    by_path = indexed.search(Query(image=image_folder / "00.png", text="in red"))
    assert [hit.id for hit in by_id.hits] == [hit.id for hit in by_path.hits]
    np.testing.assert_allclose([hit.score for hit in by_id.hits], [hit.score for hit in by_path.hits], rtol=0, atol=1e-6)
    assert by_id.timings_ms["vision"] == by_id.timings_ms["preprocess"] == 0


def test_float16_image_tokens_move_the_scores_little(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.new_index(image_storage="f16")
    engine.index_images(image_folder)
    cached = {hit.id: hit.score for hit in engine.search(Query(reference_id="00.png", text="in red", k=12, exclude_reference=False)).hits}
    exact = {hit.id: hit.score for hit in engine.search(Query(image=image_folder / "00.png", text="in red", k=12)).hits}
    differences = [abs(cached[id] - exact[id]) for id in IDS]
    assert 0 < max(differences) < 2e-3


def test_an_id_is_no_file(indexed: RetrievalEngine, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a file looked at for an id, nor an item for a path; the id of an item that was removed is not answered from a folder."""
    monkeypatch.chdir(image_folder)
    Image.new("RGB", (9, 9), "white").save("00.png")
    other = indexed.search(Query(image=Path("00.png"), text="in red", k=1)).hits[0].score
    assert indexed.search(Query(reference_id="00.png", text="in red", k=1, exclude_reference=False)).hits[0].score != pytest.approx(
        other, abs=1e-4
    )
    indexed.index.remove(["00.png"])

    def looked_at(*args: object, **options: object) -> None:
        raise AssertionError(f"a file was looked at: {args}")

    for name in ("open", "stat", "lstat"):
        monkeypatch.setattr(os, name, looked_at)
    for id in ("00.png", "./00.png", str(image_folder / "02.png"), "/etc/passwd", "a\0b", ""):
        with pytest.raises(InputError) as caught:
            indexed.search(Query(reference_id=id, text="in red"))
        assert str(caught.value) == f"{id!r} is not an id of the index; pass the image of what is not in it"


def test_the_reference_is_left_out_unless_wanted(indexed: RetrievalEngine) -> None:
    assert {hit.id for hit in indexed.search(Query(reference_id="00.png", text="in red", k=99)).hits} == set(IDS) - {"00.png"}
    assert {hit.id for hit in indexed.search(Query(reference_id="00.png", text="in red", k=99, exclude_reference=False)).hits} == set(IDS)


def test_batches_equal_single_searches(indexed: RetrievalEngine, image_folder: Path) -> None:
    references: list[dict[str, Any]] = [
        {"reference_id": "00.png"}, {"image": image_folder / "02.png"}, {"reference_id": "sub/01.png"}, {"image": noise_image(7)}
    ]  # fmt: skip
    texts = ["in red", "the same but round with long sleeves", "🙂", "less " * 100]
    excluded = [["02.png"], [], ["02.png", "04.png"], []]
    queries = [
        Query(text=text, k=4, exclude=left_out, weights={"shape": 0.5}, **reference)
        for text, left_out, reference in zip(texts, excluded, references, strict=True)
    ]
    batch = indexed.search_batch(queries)
    assert [result.truncated for result in batch] == [False, False, False, True]
    fresh = RetrievalEngine.load(indexed.bundle.path, provider="cpu", threads=1, kept_bytes=0)
    fresh.attach(indexed.index)
    for result, query, left_out in zip(batch, queries, excluded, strict=True):
        alone = fresh.search(query)
        assert [hit.id for hit in result.hits] == [hit.id for hit in alone.hits]
        np.testing.assert_allclose([hit.score for hit in result.hits], [hit.score for hit in alone.hits], rtol=0, atol=1e-6)
        np.testing.assert_allclose(list(result.weights.values()), list(alone.weights.values()), rtol=0, atol=1e-6)
        assert not {hit.id for hit in result.hits} & set(left_out)
    assert indexed.search_batch([]) == ()


def test_overrides_are_applied_and_told(indexed: RetrievalEngine) -> None:
    plain = indexed.search(Query(reference_id="00.png", text="in red"))
    off = indexed.search(Query(reference_id="00.png", text="in red", weights={"colour": 0, "shape": 3.0}))
    assert plain.overrides == {}
    assert plain.weights == plain.predicted_weights == off.predicted_weights
    assert off.overrides == {"colour": 0.0, "shape": 3.0}
    assert off.weights["colour"] == 0
    assert off.weights["shape"] == pytest.approx(3 * plain.weights["shape"], rel=1e-6)
    assert [hit.score for hit in off.hits] != [hit.score for hit in plain.hits]
    with pytest.raises(InputError, match="this model has colour, shape"):
        indexed.search(Query(reference_id="00.png", text="in red", weights={"color": 2}))


def test_zones(indexed: RetrievalEngine) -> None:
    spec = ZoneSpec(lo=0.15, hi=0.4, policy="uniform")
    result = indexed.search(Query(reference_id="00.png", text="in red", k=11, zones=spec))
    assert result.zones is not None
    deltas = {hit.id: hit.delta for hit in result.hits}
    near, mid = [id for id, d in deltas.items() if d < 0.15], [id for id, d in deltas.items() if 0.15 <= d <= 0.4]
    assert near
    assert mid
    assert [hit.id for hit in result.zones.near] == near
    assert [hit.id for hit in result.zones.mid] == mid
    assert (result.zones.counts.near, result.zones.counts.mid, result.zones.counts.easy) == (len(near), len(mid), 11 - len(near) - len(mid))
    short = indexed.search(Query(reference_id="00.png", text="in red", k=1, zones=spec))
    assert short.zones is not None
    assert short.zones.counts == result.zones.counts
    assert [hit.id for hit in short.zones.mid] == mid[:1]
    assert indexed.search(Query(reference_id="00.png", text="in red")).zones is None
    assert indexed.search(Query(reference_id="00.png", text="in red", zones=True)).zones is not None


def test_filters(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.index_images(image_folder, metadata={id: {"n": n} for n, id in enumerate(IDS)})
    hits = engine.search(Query(reference_id="00.png", text="in red", filter={"n": {">=": 3, "<": 6}})).hits
    assert {hit.id for hit in hits} == set(IDS[3:6])
    assert all(hit.metadata == {"n": IDS.index(hit.id)} for hit in hits)
    assert engine.search(Query(reference_id="00.png", text="in red", filter={"n": -1})).hits == ()


def test_an_empty_gallery(engine: RetrievalEngine) -> None:
    result = engine.search(Query(image=noise_image(0), text="in red", zones=True))
    assert result.hits == ()
    assert result.zones is not None
    assert result.zones.counts.near == 0


@pytest.mark.parametrize("text", ["", "   ", b"red", ["red"]])
def test_texts_without_words_are_refused(indexed: RetrievalEngine, text: Any) -> None:
    with pytest.raises(InputError, match=r"no words|text is a str"):
        indexed.search(Query(reference_id="00.png", text=text))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"image": b"", "reference_id": "00.png"}, "got both"),
        ({"image": np.zeros((4, 4, 3), np.uint8)}, "got ndarray"),
        ({"image": "00.png"}, r"'00.png' is a str, not an image; pass Path\(...\) for a file; .* reference_id=..."),
        ({"image": Path("absent.png")}, "absent.png: no such image file"),
        ({"image": b""}, "not an image"),
        ({"image": Path("a\0b")}, "embedded null (byte|character)"),
        ({"reference_id": 7}, "reference_id is a str, got int"),
    ],
)
def test_references_that_are_refused(indexed: RetrievalEngine, reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        indexed.search(Query(**reference, text="in red"))


def test_the_engine_owns_what_an_image_may_be(bundle_path: Path, image_folder: Path) -> None:
    engine = RetrievalEngine.load(bundle_path, provider="cpu", images=ImagePolicy(formats=("JPEG",)))
    for use in (
        lambda: engine.search(Query(image=image_folder / "00.png", text="in red")),
        lambda: engine.encode_images([image_folder / "00.png"]),
    ):
        with pytest.raises(InputError, match=r"00\.png: not an image of an accepted format; save it as JPEG"):
            use()
    assert {skipped.id for skipped in engine.index_images(image_folder, on_error="skip").skipped} == set(IDS)


def test_an_index_that_keeps_no_image_tokens(engine: RetrievalEngine, image_folder: Path) -> None:
    engine.new_index(image_storage="none")
    engine.index_images(image_folder)
    assert engine.search(Query(image=image_folder / "00.png", text="in red", k=3)).hits
    with pytest.raises(InputError, match="pass its image instead"):
        engine.search(Query(reference_id="00.png", text="in red"))


def test_an_index_of_another_model(indexed: RetrievalEngine, tmp_path: Path) -> None:
    other = RetrievalEngine.load(build_tiny_bundle(tmp_path / "other", seed=1), provider="cpu")
    indexed.save_index(tmp_path / "index")
    with pytest.raises(IndexFormatError, match="this bundle is"):
        other.load_index(tmp_path / "index")
    with pytest.raises(IndexFormatError, match="this bundle is"):
        other.attach(indexed.index)
    other_engine = RetrievalEngine.load(indexed.bundle.path, provider="cpu")
    other_engine.load_index(tmp_path / "index", verify=True)
    assert (
        other_engine.search(Query(reference_id="00.png", text="in red")).hits
        == indexed.search(Query(reference_id="00.png", text="in red")).hits
    )


def test_bundles_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        RetrievalEngine.load(tmp_path)


def test_a_query_encoder_that_gives_nan(indexed: RetrievalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = indexed._encoder._query
    run = encoder.run
    monkeypatch.setattr(encoder, "run", lambda **inputs: {k: np.full_like(v, np.nan) for k, v in run(**inputs).items()})
    with pytest.raises(BackendError, match="not finite"):
        indexed.search(Query(reference_id="00.png", text="in red"))


def test_concurrent_searches_do_not_disturb_each_other(indexed: RetrievalEngine, image_folder: Path) -> None:
    cases = [(IDS[n], text, {"colour": float(n)}) for n, text in enumerate(["in red", "in blue", "round", "more square", "less"])]
    expected = [indexed.search(Query(reference_id=id, text=text, weights=weights)).hits for id, text, weights in cases]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for (id, text, weights), hits in zip(cases, expected, strict=True):
                if indexed.search(Query(reference_id=id, text=text, weights=weights)).hits != hits:
                    wrong.append(id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_bundle_that_takes_other_heads_while_it_is_opened_is_opened_again(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Between the check of the files and the last session: old graphs under a new manifest, or the reverse, would answer wrongly."""
    bundle, heads = tmp_path / "bundle", build_tiny_heads(tmp_path / "heads")
    shutil.copytree(bundle_path, bundle)
    session, opened = Bundle.session, list[str]()

    def interrupted(self: Bundle, graph: GraphSpec, **options: Any) -> Any:
        opened.append(graph.name)
        if len(opened) == 2:
            replace_heads(bundle, heads)
            if fails:
                raise BundleError("of another size")
        return session(self, graph, **options)

    monkeypatch.setattr(Bundle, "session", interrupted)
    engine = RetrievalEngine.load(bundle, provider="cpu", threads=1)
    assert engine.bundle.manifest == Bundle.load(bundle).manifest
    assert opened[-len(GRAPHS) :] == [spec.name for spec in GRAPHS]
    assert len(opened) == len(GRAPHS) + (2 if fails else len(GRAPHS))
