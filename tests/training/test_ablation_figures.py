"""What an ablation figures: scores, differences and their intervals."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.tiny_benchmarks import WRITERS

from dqe_training.ablation.scores import benchmark_scores, folder_scores, near_confusion
from dqe_training.ablation.statistics import compare, student_t, summarise
from dqe_training.data.answers import Answers
from dqe_training.data.garments.catalog import vocabulary
from dqe_training.data.public.base import Options
from dqe_training.data.public.detect import open_benchmark
from dqe_training.data.public.placing import open_images, place_queries
from dqe_training.data.queries import Query, QuerySet
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.data.triplets import TripletData
from dqe_training.evaluation.benchmarks import RankedSet
from dqe_training.evaluation.metrics import PerQuery
from dqe_training.evaluation.protocol import evaluation_set, load_evaluation_set
from dqe_training.evaluation.protocol import summarise as summarise_report


def test_a_ratio_and_its_influence() -> None:
    rng = np.random.default_rng(0)
    below = rng.integers(0, 5, 400).astype(float)
    ratio = PerQuery(rng.binomial(below.astype(int), 0.3).astype(float), below)
    assert ratio.value == pytest.approx(sum(ratio.numerator) / below.sum())
    # Leaving one query out moves the figure by its influence over Q (the delta method and the jackknife agree).
    whole, above = ratio.value, np.asarray(ratio.numerator)
    left_out = (above.sum() - above) / (below.sum() - below)
    assert (whole - left_out) * len(below) == pytest.approx(ratio.influence, abs=0.02)
    assert ratio.influence.mean() == pytest.approx(0, abs=1e-9)
    assert math.isnan(PerQuery.of([0.0, 0.0], [0.0, 0.0]).value)
    assert PerQuery.of([True, False, True]).value == pytest.approx(2 / 3)


def test_scores_are_the_reports_figures(garments: Path) -> None:
    evaluation = load_evaluation_set(garments)
    images = [r for r in read_jsonl(garments / "images.jsonl", ImageRecord) if r.image.startswith("gallery/")]
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(len(evaluation.gallery))[:50] for _ in evaluation.records])
    ranked[::3, 4] = evaluation.target[::3]
    scores, report = folder_scores(evaluation, ranked, images), summarise_report(evaluation, ranked)
    for name in (
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
        "recall_at_50",
        "heldout_recall_at_10",
        "map_at_10",
        "attribute_precision_at_10",
    ):
        assert scores[name].value == pytest.approx(getattr(report, name), abs=1e-5), name


def test_near_confusion_counts_one_named_attribute_above_the_target() -> None:
    shown = {
        "ref": ("red", "coat"), "target": ("blue", "coat"), "same": ("blue", "coat"), "unchanged": ("red", "coat"),
        "green": ("green", "coat"), "kept": ("blue", "dress"), "both": ("green", "dress"),
    }  # fmt: skip
    images = [ImageRecord(image=name, attributes={"colour": c, "shape": s}) for name, (c, s) in shown.items()]
    record = TripletRecord(reference="ref", target="target", text="in blue", attributes={"colour": "blue"}, allowed={"colour": ["blue"]})
    evaluation = evaluation_set([record], images)
    at = {image.image: i for i, image in enumerate(images)}

    def confusion(*ranking: str) -> tuple[float, float]:
        ratio = near_confusion(evaluation, np.asarray([[at[name] for name in ranking] + [-1]]), images)
        return ratio.numerator[0], ratio.denominator[0]

    assert confusion("green", "unchanged", "target", "both") == (2, 2)  # both wrong in the colour alone
    assert confusion("kept", "both", "green", "target") == (1, 3)  # a wrong shape was not named; two wrong are not near
    assert confusion("same", "target") == (0, 0)  # a valid answer is no wrong hit
    assert confusion("same", "green", "both") == (1, 2)  # the target is not in the ranking: all of it counts


def test_wrong_attributes_by_exact_labels(tiny_data: tuple[TripletData, np.ndarray]) -> None:
    data, _ = tiny_data
    words = vocabulary()
    rows = np.asarray([0, 3, 7, 20])
    images = np.stack([np.append(np.random.default_rng(row).integers(len(data.images), size=9), data.target[row]) for row in rows])
    answers = Answers.of(data, words)
    assert answers is not None
    found = answers.wrong(rows, images)

    def values(image: int) -> dict[str, str]:
        return {a.name: a.values[data.labels[image, i]] for i, a in enumerate(words.attributes)}

    for at, row in enumerate(rows.tolist()):
        record = data.records[row]
        asked = {name: [value] for name, value in values(int(data.reference[row])).items()} | (record.allowed or {})
        expected = [sum(values(int(image))[name] not in allowed for name, allowed in asked.items()) for image in images[at]]
        assert found[at].tolist() == expected
    np.testing.assert_array_equal(answers.among(rows, images[1]), answers.wrong(rows, np.tile(images[1], (4, 1))) == 0)
    assert (found[:, -1] == 0).all(), "a target satisfies its own text"
    assert found.max() > 1
    unlabelled = msgspec.structs.replace(data.records[3], allowed=None)
    assert Answers.of(replace_record(data, 3, unlabelled), words) is None


def replace_record(data: TripletData, row: int, record: TripletRecord) -> TripletData:
    records = (*data.records[:row], record, *data.records[row + 1 :])
    return TripletData(data.images, data.texts, data.reference, data.target, data.named, data.labels, records)


def test_recall_over_sets_is_the_mean_of_their_means() -> None:
    sets = []
    for name, count, hits in (("a", 2, 1), ("b", 8, 8)):
        gallery = tuple(f"{name}{i}" for i in range(12))
        queries = QuerySet(name, tuple(Query(str(i), gallery[0], "x", (gallery[i + 1],)) for i in range(count)), gallery)
        ranked = np.full((count, 12), 11)
        ranked[:hits, 0] = queries.target[:hits]
        sets.append(RankedSet(queries, ranked))
    assert benchmark_scores("fashioniq", sets)["recall_at_1"].value == pytest.approx((1 / 2 + 8 / 8) / 2)


@pytest.mark.parametrize(
    ("name", "own"),
    [("fashioniq", ()), ("cirr", ("subset_recall_at_1", "subset_recall_at_2", "subset_recall_at_3")), ("circo", ("map_at_10",))],
)
def test_a_public_dataset_is_compared_by_what_its_protocol_has(name: str, own: tuple[str, ...], tmp_path: Path) -> None:
    benchmark = open_benchmark(WRITERS[name](tmp_path))
    assert benchmark is not None
    folder = open_images(benchmark, None)
    sets = []
    for asked in benchmark.query_sets("val", Options(), folder):
        queries, _ = place_queries(asked, folder, allow_missing=False)
        sets.append(RankedSet(queries, np.tile(np.arange(len(queries.gallery)), (len(queries), 1))[:, :50]))
    assert benchmark_scores(name, sets).keys() == {"recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50", *own}


def test_students_t() -> None:
    scipy_values = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 30: 2.04227, 31: 2.03951, 60: 2.0003, 120: 1.97993}
    for freedom, value in scipy_values.items():
        assert student_t(freedom) == pytest.approx(value, abs=2e-3)


def test_a_paired_difference_by_hand() -> None:
    ours = [PerQuery.of([1, 1, 1, 0]), PerQuery.of([1, 1, 0, 0])]
    other = [PerQuery.of([1, 0, 0, 0]), PerQuery.of([1, 0, 0, 0])]
    found = compare(ours, other)
    assert found is not None
    assert found.values == (0.5, 0.25)
    assert found.value == pytest.approx(0.375)
    assert found.half_seeds == pytest.approx(12.706 * np.std([0.5, 0.25], ddof=1) / math.sqrt(2))
    per_query = np.asarray([0, 1, 0.5, 0])
    assert found.half_queries == pytest.approx(1.959964 * per_query.std(ddof=1) / 2)
    assert found.half == pytest.approx(math.hypot(found.half_seeds, found.half_queries))
    assert found.verdict == "unclear"
    single = compare(ours[:1], other[:1])
    assert single is not None
    assert (single.half, single.verdict) == (None, "one seed")
    assert compare(ours, [PerQuery.of([0], [0])] * 2) is None
    assert summarise([float("nan")]) is None


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.0, 0.07), (0.12, 0.8, 1.0)])
def test_intervals_hold_what_they_promise(effect: float, least: float, most: float) -> None:
    """Trainings that scatter, over queries that are a sample: no effect is called one in 1 of 20 cases at most, a large one is seen."""
    rng = np.random.default_rng(1)
    called = []
    for _ in range(150):
        difficulty = rng.normal(size=300)  # the same queries for all trainings

        def training(shift: float, difficulty: np.ndarray = difficulty) -> PerQuery:
            return PerQuery.of(difficulty + rng.normal(scale=0.5, size=300) < shift + rng.normal(scale=0.05))

        found = compare([training(2.5 * effect) for _ in range(4)], [training(0.0) for _ in range(4)])
        assert found is not None
        called.append(found.verdict != "unclear")
    assert least <= np.mean(called) <= most
