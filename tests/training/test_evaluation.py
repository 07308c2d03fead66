"""The evaluation protocol: figures of known rankings, and of a model against brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_training import make_model

from dqe_engine.errors import InputError
from dqe_training.data.records import ImageRecord, TripletRecord, write_jsonl
from dqe_training.evaluation.protocol import Embeddings, evaluation_set, load_evaluation_set, summarise
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.evaluation.runtime import agreement
from dqe_training.tokenizer import build_tokenizer

COLOURS = ("red", "red", "blue", "blue", "green")
IMAGES = [ImageRecord(image=f"g{i}", attributes={"colour": c, "size": "big" if i % 2 else "small"}) for i, c in enumerate(COLOURS)]


def query(reference: int, target: int, **rest: object) -> TripletRecord:
    return TripletRecord(reference=f"g{reference}", target=f"g{target}", text="x", **rest)


def test_relevant_images_satisfy_text_and_reference() -> None:
    records = [query(0, 2, allowed={"colour": ["blue", "green"]}), query(1, 3, allowed={"colour": ["blue"], "size": ["small", "big"]})]
    evaluation = evaluation_set(records, IMAGES)
    assert evaluation.relevant == ((2, 4), (2, 3))
    assert evaluation.gallery == ("g0", "g1", "g2", "g3", "g4")
    assert (evaluation.reference.tolist(), evaluation.target.tolist()) == ([0, 1], [2, 3])


def test_without_allowed_values_only_the_target_is_known() -> None:
    assert evaluation_set([query(0, 2), query(0, 2, allowed={})], IMAGES).relevant is None


def test_figures_of_known_rankings() -> None:
    allowed = {"colour": ["blue", "green"]}
    records = [
        query(0, 2, allowed=allowed, attributes={"colour": "blue"}),
        query(2, 0, allowed={"colour": ["red"]}, attributes={"colour": "red"}, held_out=True),
        query(0, 4, allowed=allowed | {"size": ["small"]}, attributes={"colour": "green", "size": "small"}),
    ]
    ranked = np.array([[4, 2, 1, 3, -1], [1, 3, 4, 0, -1], [3, 1, 2, 4, -1]])
    weights = np.array([[0.9, 0.1], [0.8, 0.6], [0.9, 0.5]], np.float32)
    report = summarise(evaluation_set(records, IMAGES), ranked, weights=weights, attributes=("colour", "size"))
    assert (report.queries, report.gallery, report.heldout_queries) == (3, 5, 1)
    assert (report.recall_at_1, report.recall_at_5, report.recall_at_10, report.recall_at_50) == (0, 1, 1, 1)
    assert report.heldout_recall_at_10 == 1
    assert report.recall_at_10_interval == (1, 1)
    # Relevant: {2, 4}, {0}, {2, 4}: found 2, 1, 2 of them among the first 10.
    assert report.attainable_precision_at_10 == pytest.approx((2 + 1 + 2) / 30)
    assert report.attribute_precision_at_10 == pytest.approx(1)
    assert report.map_at_10 == pytest.approx(((1 + 1) / 2 + 1 / 4 + (1 / 3 + 2 / 4) / 2) / 3)
    assert report.attainable_recall_at_1 == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert report.weight_auc is not None
    assert math.isnan(report.weight_auc["colour"])  # every text names it
    assert report.weight_auc["size"] == 0.5  # the one that names it lies between the others


def test_nothing_relevant_is_no_crash() -> None:
    report = summarise(evaluation_set([query(0, 2, allowed={"colour": ["purple"]})], IMAGES), np.array([[1, 2, 3]]))
    assert report.recall_at_5 == 1
    assert report.map_at_10 is not None
    assert math.isnan(report.map_at_10)
    assert report.attribute_precision_at_10 is not None
    assert math.isnan(report.attribute_precision_at_10)


def test_a_query_image_outside_the_gallery_is_named() -> None:
    with pytest.raises(InputError, match=r"mine: 2 query images are not in the gallery, for example g9"):
        evaluation_set([query(9, 0), query(0, 8), query(0, 1)], IMAGES, where="mine")


def test_an_empty_text_in_val_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "val.jsonl", [TripletRecord(reference="gallery/a", target="gallery/b", text=" ")])
    write_jsonl(tmp_path / "images.jsonl", [ImageRecord(image=f"gallery/{n}", attributes={}) for n in "ab"])
    with pytest.raises(InputError, match=r"val\.jsonl, record 1: empty text"):
        load_evaluation_set(tmp_path)


def test_a_model_is_ranked_by_brute_force(garments: Path) -> None:
    evaluation = load_evaluation_set(garments)
    tokenizer = build_tokenizer(r.text for r in evaluation.records)
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    images = encode_gallery_images(model, garments / "images", evaluation)
    report, embeddings = evaluate_model(model, tokenizer, evaluation, images, batch_size=7)
    assert embeddings.queries.shape == (24, 8)
    assert embeddings.target_tokens.shape == (60, 3, 8)
    for row, record in enumerate(evaluation.records):
        encoded = tokenizer.encode(record.text).ids
        with torch.inference_mode():
            reference = images[evaluation.reference[row]][None]
            output = model.encode_query(reference, torch.tensor([encoded]), torch.ones(1, len(encoded), dtype=torch.int64))
        np.testing.assert_allclose(embeddings.queries[row], output.query[0].numpy(), rtol=0, atol=1e-5)
        scores = (embeddings.target_tokens @ embeddings.queries[row]).max(axis=1)
        scores[evaluation.reference[row]] = -np.inf
        np.testing.assert_allclose(embeddings.scores[row], np.sort(scores)[::-1][:50], rtol=0, atol=1e-5)
        assert evaluation.reference[row] not in embeddings.ranked[row]
    expected = np.mean([evaluation.target[row] in embeddings.ranked[row][:10] for row in range(24)])
    assert report.recall_at_10 == pytest.approx(expected)
    assert set(report.weight_auc or {}) == {"colour", "shape", "pattern", "length"}
    again, same = evaluate_model(model, tokenizer, evaluation, images)
    assert agreement((report, embeddings), (again, same))[0] == 1
    assert agreement((report, embeddings), (again, same))[1] < 1e-5


def test_agreement_sees_one_swapped_pair_and_one_changed_number(garments: Path) -> None:
    evaluation = load_evaluation_set(garments)
    ranked = np.argsort(np.random.default_rng(0).random((24, 60)), axis=1)[:, :50]
    arrays = Embeddings(
        np.zeros((24, 8), np.float32),
        np.zeros((60, 3, 8), np.float32),
        np.zeros((24, 4), np.float32),
        ranked,
        np.zeros((24, 50), np.float32),
    )
    ours = summarise(evaluation, ranked), arrays
    assert agreement(ours, ours) == (1, 0, True)
    swapped = ranked.copy()
    swapped[3, [8, 9]] = swapped[3, [9, 8]]
    changed = arrays.target_tokens.copy()
    changed[5, 2, 1] = 0.25
    theirs = summarise(evaluation, swapped), Embeddings(arrays.queries, changed, arrays.weights, swapped, arrays.scores)
    same, difference, _ = agreement(ours, theirs)
    assert same == pytest.approx(23 / 24)
    assert difference == 0.25
    better = ranked.copy()
    better[:, 0] = evaluation.target
    assert agreement(ours, (summarise(evaluation, better), arrays))[2] is False
