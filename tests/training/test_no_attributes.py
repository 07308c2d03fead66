"""Models without attributes (A = 0): trained, exported, evaluated; and attributes that they get later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_training import OVERRIDES, make_model, model_config, query_inputs, train_config, write_checkpoint

from dqe_engine import Query, RetrievalEngine
from dqe_engine.bundle import Bundle
from dqe_engine.contracts.graphs import ATTRIBUTE_HEADS, GRAPHS
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import CheckpointError, InputError
from dqe_export.cli.export import main as export
from dqe_training.checkpointing.checkpoint import load_checkpoint, load_start
from dqe_training.cli.evaluate import main as evaluate
from dqe_training.cli.train import main as train
from dqe_training.losses.total import BatchLabels, total_loss
from dqe_training.model import DQEModel, score
from dqe_training.run.configuration import load_config

NONE = AttributeVocabulary(attributes=())
CONFIG = model_config(base_query="two_pass", attribute_weights=False)
EMPTY = '{"attributes": []}'


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without attributes, as an importer writes it."""
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model", CONFIG, vocab=NONE)


def test_there_is_nothing_of_the_heads(plain: Path) -> None:
    assert not [name for name in load_file(plain / "model.safetensors") if name.startswith("attribute_heads.")]
    model = load_checkpoint(plain).model
    with torch.inference_mode():
        output = model.encode_query(*query_inputs(model, 3, 5))
    assert output.sub_queries.shape == (3, 0, 8)
    assert output.attribute_weights.shape == output.presence.shape == (3, 0)
    assert torch.equal(output.query, output.base_query)


def test_attribute_weights_need_attributes() -> None:
    with pytest.raises(InputError, match=r"names no attribute, so set model\.attribute_weights=false, or give a vocabulary"):
        make_model(model_config(), vocab=NONE)


def test_no_loss_reads_what_is_not_there() -> None:
    model = make_model(CONFIG, vocab=NONE).train()
    output = model.encode_query(*query_inputs(model, 4, 5))
    targets = model.encode_targets(query_inputs(model, 4, 5, seed=1)[0])
    labels = BatchLabels(torch.arange(4), torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0, dtype=torch.bool))
    total, parts = total_loss(output, targets, labels, train_config().loss, relevance_share=0.1)  # whose default weights are above 0
    assert torch.isfinite(total)
    assert not {"attribute", "presence"} & set(parts)


@pytest.mark.parametrize("chunk", [0, 3])
def test_it_trains_on_data_that_has_labels(chunk: int, garments: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text(EMPTY)
    options = [*OVERRIDES, "optim.epochs=1", "model.base_query=two_pass", f"optim.cached_chunk={chunk}", "trns.warmup_epochs=0"]
    given = ["--data", str(garments), "--vocabulary", str(tmp_path / "none.json"), "--out", str(tmp_path / "run")]
    assert train([*given, *options]) == 2  # the preset weighs attributes
    assert train([*given, *options, "model.attribute_weights=false"]) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "model")
    assert checkpoint.vocabulary == NONE
    assert checkpoint.meta.progress.finished


@pytest.mark.usefixtures("graphs_traced_once")
def test_exported_searched_evaluated_and_given_attributes(
    plain: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    assert export([str(plain), str(bundle), "--data", str(garments)]) == 0
    manifest = Bundle.load(bundle).manifest
    assert [graph.name for graph in manifest.graphs] == [graph.name for graph in GRAPHS if graph is not ATTRIBUTE_HEADS]
    assert not (bundle / ATTRIBUTE_HEADS.file).exists()
    assert [parity.graph for parity in manifest.parity][-1] == "composed_query"
    assert (manifest.sizes.attributes, manifest.model["base_query"]) == (0, "two_pass")
    with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
        photos = sorted((garments / "images" / "gallery").iterdir())[:8]
        engine.index_images({photo.name: photo for photo in photos})
        engine.save_index(tmp_path / "index")
        result = engine.search(Query(reference_id=photos[0].name, text="is red", explain=True))
    assert (result.weights, len(result.hits)) == ({}, 7)
    capsys.readouterr()
    recalls = []
    for model in (plain, bundle):
        assert evaluate([str(model), "--data", str(garments), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert not report.get("weight_auc")
        recalls.append(report["recall_at_10"])
    assert recalls[0] == recalls[1]
    assert export([str(plain), str(tmp_path / "heads"), "--heads-only"]) == 2
    assert f"has no attribute heads; train some with start={plain} finetune=attributes" in capsys.readouterr().err

    run = tmp_path / "run"
    options = [f"start={plain}", "finetune=attributes", "optim.epochs=1", "optim.batch_size=8"]
    assert train(["--data", str(garments), "--out", str(run), *options]) == 0
    trained = load_checkpoint(run / "model")
    assert trained.vocabulary.names == ("colour", "shape", "pattern", "length")
    before = load_file(plain / "model.safetensors")
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert export([str(run / "model"), "--heads-only", "--bundle", str(bundle)]) == 0
    with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
        engine.load_index(tmp_path / "index")  # made before there were attributes
        weighed = engine.search(Query(reference_id=photos[0].name, text="is red", weights={"colour": 2.0}))
    assert set(weighed.weights) == set(trained.vocabulary.names)


@pytest.mark.parametrize("precision", ["f32", pytest.param("int8", marks=pytest.mark.slow), pytest.param("f16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["two_pass", "two_encoders", "zero_shot"])
def test_every_kind_of_search_is_pytorchs(kind: str, precision: str, garments: Path, tmp_path: Path) -> None:
    """Without attributes: with a text and without, a text alone, unlike another item, in zones."""
    config = msgspec.structs.replace(CONFIG, base_query=kind)  # type: ignore[arg-type]
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "model", config, vocab=NONE))
    assert export([str(checkpoint.directory), str(tmp_path / "bundle"), "--precision", precision]) == 0
    photos = sorted((garments / "images" / "gallery").iterdir())[:8]
    allowed = {"f32": 1e-3, "f16": 2e-2, "int8": 0.15}[precision]  # an index keeps image tokens in float16
    with RetrievalEngine.load(tmp_path / "bundle", provider="cpu", threads=1) as engine:
        engine.index_images({photo.name: photo for photo in photos})
        names, reference = [photo.name for photo in photos], photos[0].name
        tokens = torch.from_numpy(np.stack([engine.index.image_tokens(name) for name in names]).astype(np.float32))
        with torch.inference_mode():
            targets = checkpoint.model.encode_targets(tokens)
            for query in (
                Query(reference_id=reference, text="is red"),
                Query(text="is red"),
                Query(reference_id=reference, text="is red", zones=True),
            ):
                text = engine.bundle.text_encoder().encode(["is red"])
                ids, mask = torch.from_numpy(text.input_ids), torch.from_numpy(text.attention_mask)
                seen = tokens[:1] if query.reference_id else torch.zeros_like(tokens[:1])
                scores = score(checkpoint.model.encode_query(seen, ids, mask).query, targets)[0]
                hits = engine.search(replace(query, k=8)).hits
                assert {hit.id for hit in hits} == set(names) - {query.reference_id}
                for hit in hits:
                    assert abs(hit.score - float(scores[names.index(hit.id)])) < allowed, query
            assert len(engine.search(Query(reference_id=reference, k=8)).hits) == 7
            plain = engine.search(Query(reference_id=reference, text="is red", k=8))
            apart = engine.search(Query(reference_id=reference, text="is red", k=8, unlike=[plain.hits[0].id]))
            assert plain.hits[0].id not in {hit.id for hit in apart.hits}
            assert len(apart.hits) == 6


def test_triplets_of_ones_own_get_the_papers_attributes(plain: Path, garments: Path, tmp_path: Path) -> None:
    """Where data brings no vocabulary, the start's is taken, unless it has no attributes and some are to be trained."""
    given = ["--triplets", str(garments / "train.jsonl"), "--images", str(garments / "images"), "--no-derived-labels"]
    options = [f"start={plain}", "optim.epochs=1", "optim.batch_size=8"]
    (tmp_path / "lines.jsonl").write_text(
        "".join(
            json.dumps({key: value for key, value in json.loads(line).items() if key in ("reference", "target", "text")}) + "\n"
            for line in (garments / "train.jsonl").read_text().splitlines()
        )
    )
    given[1] = str(tmp_path / "lines.jsonl")
    for extra, names in (([], ()), (["finetune=attributes"], ("colour", "shape"))):
        run = tmp_path / f"run-{len(names)}"
        assert train([*given, "--out", str(run), *options, *extra]) == 0
        assert load_checkpoint(run / "model").vocabulary.names == names


def test_a_start_that_has_heads_may_lose_them(tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "model", model_config(weights_from="text+image"))
    config = load_config("start", [f"start={start}", "model.attribute_weights=false"])
    model = DQEModel(config.model, NONE, load_checkpoint(start).tokenizer.get_vocab_size())
    assert load_start(model, config) == "no attribute heads, since the vocabulary names no attribute"
    assert torch.equal(model.query_tokens, load_checkpoint(start).model.query_tokens)


@pytest.mark.parametrize(("made", "wanted", "finetune", "allowed"), [
    ("zero_shot", "two_pass", "full", True),
    ("zero_shot", "mean", "lora", True),
    ("zero_shot", "pool", "full", False),
    ("zero_shot", "two_encoders", "full", False),
    ("two_pass", "two_encoders", "full", False),
    ("zero_shot", "mean", "attributes", False),
    ("mean", "two_pass", "full", False),
])  # fmt: skip
def test_which_base_query_a_start_may_train_on_to(made: str, wanted: str, finetune: str, allowed: bool, tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "model", msgspec.structs.replace(CONFIG, base_query=made), vocab=NONE)  # type: ignore[arg-type]
    overrides = [f"start={start}", f"model.base_query={wanted}", f"finetune={finetune}"]
    if allowed:
        config = load_config("start", overrides)
        model = DQEModel(config.model, NONE, load_checkpoint(start).tokenizer.get_vocab_size())
        load_start(model, config)
        assert model.config.base_query == wanted
        return
    with pytest.raises(CheckpointError, match=f"trained with model.base_query {made}, the configuration sets {wanted}"):
        load_config("start", overrides)
