"""A bundle without attribute heads (A = 0): everything but weights works, and what asks for weights says that there are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.samples import noise_image
from support.tiny_bundle import VOCABULARY, build_tiny_bundle, build_tiny_heads, write_manifest

from dqe_engine import Query, RetrievalEngine
from dqe_engine.bundle import Bundle
from dqe_engine.cli.heads import main as heads_command
from dqe_engine.cli.search import main as search_command
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS, QUERY_ENCODER
from dqe_engine.contracts.manifest import MANIFEST_FILE, BundleManifest
from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import BundleError, InputError
from dqe_engine.heads import replace_heads

ITEM = "03.png"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle` without heads and `index` of it; tests only read them."""
    folder = tmp_path_factory.mktemp("plain")
    build_tiny_bundle(folder / "bundle", attributes=False)
    with RetrievalEngine.load(folder / "bundle", provider="cpu", threads=1) as engine:
        for n in range(12):
            noise_image(n).save(folder / f"{n:02}.png")
        engine.index_images(folder)
        engine.save_index(folder / "index")
    return folder


@pytest.fixture
def engine(plain: Path) -> Iterator[RetrievalEngine]:
    with RetrievalEngine.load(plain / "bundle", provider="cpu", threads=1) as engine:
        engine.load_index(plain / "index")
        yield engine


def test_a_query_is_its_base_query(engine: RetrievalEngine) -> None:
    assert set(engine.providers) == {spec.name for spec in GRAPHS} - {ATTRIBUTE_HEADS.name}
    engine.warm_up()
    result = engine.search(Query(reference_id=ITEM, text="the same but red", k=5, zones=True, explain=True))
    assert (result.weights, result.predicted_weights, result.overrides) == ({}, {}, {})
    assert len(result.hits) == 5
    tokens = engine.index.image_tokens(ITEM)[None].astype(np.float32)
    text = engine.bundle.text_encoder().encode(["the same but red"])
    session = engine.bundle.session(QUERY_ENCODER, provider="cpu", threads=1)
    base = session.run(image_tokens=tokens, input_ids=text.input_ids, attention_mask=text.attention_mask)["base_query"]
    encoded = engine.encode_queries([Query(reference_id=ITEM, text="the same but red"), Query(reference_id=ITEM), Query(text="red")])
    np.testing.assert_allclose(encoded.queries[0], base[0], rtol=0, atol=1e-6)
    assert encoded.weights.shape == encoded.predicted_weights.shape == (3, 0)
    for hit in result.hits:
        assert hit.explanation is not None
        assert (hit.explanation.attributes, hit.explanation.similarities) == ({}, {})
        assert hit.explanation.base == pytest.approx(hit.score, abs=1e-5)


@pytest.mark.parametrize("query", [Query(reference_id=ITEM), Query(text="red"), Query(reference_id=ITEM, text="red", unlike=["05.png"])])
def test_every_kind_of_query_and_the_same_again(query: Query, engine: RetrievalEngine) -> None:
    first, again = engine.search(query), engine.search(query)  # what is remembered has no weights either
    assert [hit.id for hit in first.hits] == [hit.id for hit in again.hits]
    assert first.mode == query.mode
    explained = engine.search(replace(query, explain=True))
    for hit in explained.hits:
        assert hit.explanation is not None
        assert hit.explanation.base + hit.explanation.unlike == pytest.approx(hit.score, abs=1e-5)


@pytest.mark.parametrize("given", [{"weights": {"colour": 2.0}}, {"absolute_weights": {"colour": 2.0}}])
def test_weights_are_one_line(given: dict[str, dict[str, float]], engine: RetrievalEngine) -> None:
    with pytest.raises(InputError, match="unknown attribute 'colour'; this model has no attributes; leave the weights out"):
        engine.search(Query(reference_id=ITEM, text="red", **given))  # type: ignore[arg-type]


def test_the_command_line(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(plain / "bundle"), str(plain / "index"), "--reference", ITEM, "--text", "red", "--provider", "cpu"]
    assert search_command([*given, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "attribute weights" not in out
    assert "this model has no attributes to weigh" in out
    assert search_command([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == {}
    assert search_command([*given, "--weight", "colour=2"]) == 2
    assert capsys.readouterr().err == "error: unknown attribute 'colour'; this model has no attributes; leave the weights out\n"


def test_a_model_that_adds_embeddings_is_told_so(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(plain / "bundle", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / MANIFEST_FILE).read_text())
    manifest["model"] = {"base_query": "zero_shot"}
    (tmp_path / "bundle" / MANIFEST_FILE).write_text(json.dumps(manifest))
    said = "not trained to change an image by a text"
    alone = "was not trained for"
    given = [str(tmp_path / "bundle"), str(plain / "index"), "--provider", "cpu"]
    for asks, expected in ((["--reference", ITEM, "--text", "red"], said), (["--reference", ITEM], None), (["--text", "red"], None)):
        assert search_command([*given, *asks]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ((said in out), (alone in out)) == (expected is not None, False)
    assert search_command([str(plain / "bundle"), *given[1:], "--reference", ITEM, "--text", "red"]) == 0
    assert said not in capsys.readouterr().out


def test_it_can_take_heads_under_an_index(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(plain / "bundle", tmp_path / "bundle")
    heads = build_tiny_heads(tmp_path / "heads")
    assert heads_command([str(tmp_path / "bundle"), str(heads)]) == 0  # no --new-vocabulary: nobody knows another one
    assert capsys.readouterr().out.endswith("bundle  colour, shape\n")
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest.graphs == GRAPHS
    assert bundle.model_hash == Bundle.load(plain / "bundle").model_hash
    with RetrievalEngine.load(tmp_path / "bundle", provider="cpu", threads=1) as engine:
        engine.load_index(plain / "index")
        assert set(engine.search(Query(reference_id=ITEM, text="red", weights={"colour": 2.0})).weights) == {"colour", "shape"}


def test_heads_without_attributes_are_none(plain: Path, tmp_path: Path) -> None:
    heads = build_tiny_heads(tmp_path / "heads", vocabulary=VOCABULARY)
    record = json.loads((heads / "heads.json").read_text())
    record["vocabulary"]["attributes"], record["sizes"]["attributes"] = [], 0
    record["vocabulary_hash"] = AttributeVocabulary(attributes=()).hash
    (heads / "heads.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="names no attributes, so there is nothing to give to a bundle"):
        replace_heads(plain / "bundle", heads)


def test_graphs_and_attributes_that_contradict_each_other(tmp_path: Path) -> None:
    bundle = build_tiny_bundle(tmp_path / "bundle")
    write_manifest(bundle, vocabulary=AttributeVocabulary(attributes=()))
    manifest = bundle / MANIFEST_FILE
    plain = msgspec.json.decode(manifest.read_bytes(), type=BundleManifest)
    manifest.write_bytes(to_json(msgspec.structs.replace(plain, graphs=GRAPHS)))
    with pytest.raises(BundleError, match="lists a graph of attribute heads, but no attributes"):
        Bundle.load(bundle)
    write_manifest(bundle)
    listed = msgspec.json.decode(manifest.read_bytes(), type=BundleManifest)
    manifest.write_bytes(to_json(msgspec.structs.replace(listed, graphs=plain.graphs)))
    with pytest.raises(BundleError, match="graph attribute_heads is missing"):
        Bundle.load(bundle)
