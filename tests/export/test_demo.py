"""The demo's pipeline end to end at toy size, vision tower from scratch: files, figures, resuming."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqe_engine.contracts.parsing import to_json
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError
from dqe_engine.index.metadata_file import read_metadata
from dqe_engine.query import Query
from dqe_export.demo.collect import collect, metrics, pick_examples
from dqe_export.demo.equal_time import Costs, baseline_steps
from dqe_export.demo.pipeline import DemoOptions, DemoRun, run_demo
from dqe_export.demo.report import render_report
from dqe_export.demo.sample import choose_photos, write_sample
from dqe_training.data.garments.catalog import ALL_GARMENTS, vocabulary
from dqe_training.data.garments.dataset import GarmentsSpec
from dqe_training.data.records import ImageRecord
from dqe_training.evaluation.runtime import evaluate_engine, index_gallery
from dqe_training.pretrain import PretrainConfig
from dqe_training.run.configuration import load_config

pytestmark = pytest.mark.slow  # the demo is run once for all of them

OPTIONS = DemoOptions(
    dataset=GarmentsSpec(train_images=300, train_triplets=400, gallery_images=220, val_queries=40, image_size=40),
    pretraining_dataset=GarmentsSpec(train_images=200, train_triplets=0, gallery_images=50, val_queries=0, image_size=40, seed=9),
    pretraining=PretrainConfig(epochs=1),
    from_scratch=True,
    overrides=(
        "model.preprocessing.image_size=32", "model.vision.hidden_size=32", "model.vision.layers=1", "model.qformer.hidden_size=32",
        "model.qformer.layers=1", "model.qformer.query_tokens=2", "model.qformer.embedding_dim=16", "optim.batch_size=50",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoRun, list[str]]:
    announced: list[str] = []
    run = run_demo(tmp_path_factory.mktemp("demo") / "out", OPTIONS, listener=lambda label: lambda event: None, announce=announced.append)
    return run, announced


@pytest.fixture(scope="module")
def figures(finished: tuple[DemoRun, list[str]]) -> dict[str, Any]:
    data = collect(finished[0], command="dqe-demo")
    render_report(data, finished[0].directory / "report.html")
    return json.loads(to_json(metrics(data)))


def test_every_stage_is_announced_and_timed(finished: tuple[DemoRun, list[str]]) -> None:
    run, announced = finished
    assert list(run.seconds) == announced
    assert "pretraining the vision tower" in announced


def test_metrics_have_the_plain_keys(figures: dict[str, Any]) -> None:
    for part in (figures, figures["baseline"]):
        for key in ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50", "attribute_precision_at_10", "heldout_recall_at_10"):
            assert 0 <= part[key] <= 1
    assert set(figures["weight_auc"]) == {"colour", "shape", "pattern", "length"}
    assert figures["recall_at_1"] <= figures["recall_at_5"] <= figures["recall_at_10"] <= figures["recall_at_50"]
    assert figures["attainable"]["recall_at_50"] == pytest.approx(1.0, abs=0.05)


def test_differences_are_paired_by_query(finished: tuple[DemoRun, list[str]], figures: dict[str, Any]) -> None:
    """By hand for R@10: a query that both models find, or neither, adds nothing to the margin."""
    run, _ = finished
    target = run.evaluation.target[:, None]
    ours, theirs = ((m.evaluations[0][1].ranked[:, :10] == target).any(axis=1).astype(float) for m in (run.dqe, run.baseline))
    found = figures["differences"]["R@10"]
    assert found["value"] == pytest.approx(np.mean(ours - theirs), abs=1e-12)
    assert found["margin"] == pytest.approx(1.959964 * np.std(ours - theirs, ddof=1) / math.sqrt(len(ours)), abs=1e-9)
    own = collect(run, command="").models[0]
    assert own.halves["recall_at_10"] == pytest.approx(1.959964 * np.std(ours, ddof=1) / math.sqrt(len(ours)), abs=1e-9)
    assert set(figures["differences"]) == {"R@1", "R@5", "R@10", "R@50", "held-out R@10", "attribute precision@10", "mAP@10", "mAP@50"}


def test_runtime_agrees_with_pytorch(figures: dict[str, Any]) -> None:
    assert figures["runtime_top10_agreement"] >= 0.975  # of 40 queries
    assert figures["embedding_max_abs_diff"] <= 1e-4


def test_baseline_has_neither_weights_nor_negatives_and_the_same_time(finished: tuple[DemoRun, list[str]]) -> None:
    run, _ = finished
    from dqe_training.checkpointing.checkpoint import load_checkpoint

    config = load_checkpoint(run.baseline.checkpoints[0]).meta.config
    assert config.loss.objective == "infonce"
    assert not config.model.attribute_weights
    assert not config.trns.enabled
    ours = load_checkpoint(run.dqe.checkpoints[0]).meta.config
    assert config.optim.seconds == 0
    assert run.baseline.steps == [baseline_steps(ours, run.options.dataset.train_triplets)]
    assert run.baseline.evaluations[0][0].weight_auc is None


def test_the_baseline_gets_the_time_of_steps_and_mining() -> None:
    costs = Costs(plain=1.1, with_negative=1.5, refresh=3.0)

    def steps(*overrides: str) -> int:
        return baseline_steps(load_config("garments", ["optim.batch_size=100", *overrides]), 1000, costs)

    assert steps() == 10 * 1.1 + 10 * 1.5 + 3  # two epochs, mined for the second
    assert steps("optim.epochs=4") == 10 * 1.1 + 30 * 1.5 + 3 * 3
    assert steps("optim.epochs=4", "trns.interval=2") == 10 * 1.1 + 30 * 1.5 + 2 * 3
    assert steps("trns.warmup=random") == 20 * 1.5 + 3
    assert steps("optim.steps=14") == 10 * 1.1 + 4 * 1.5 + 3
    assert steps("optim.steps=8") == round(8 * 1.1)
    assert steps("trns.enabled=false") == 20 * 1.1


def test_costs_are_those_that_were_measured() -> None:
    measured = json.loads((Path(__file__).parents[2] / "benchmarks/results/amd-epyc-2-cores/equal-time.json").read_text(encoding="utf-8"))
    assert measured["costs"] == pytest.approx(vars(Costs()), rel=0.01)


def test_page_and_bundle_are_there(finished: tuple[DemoRun, list[str]], figures: dict[str, Any]) -> None:
    run, _ = finished
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert f"{figures['recall_at_10'] * 100:.1f}" in page
    engine = RetrievalEngine.load(run.directory / "bundle")
    engine.load_index(run.directory / "index")
    record = run.evaluation.records[0]
    assert len(engine.search(Query(reference_id=record.reference, text=record.text, k=5)).hits) == 5


def test_the_index_can_be_filtered_and_its_items_have_a_content(finished: tuple[DemoRun, list[str]]) -> None:
    run, _ = finished
    engine = RetrievalEngine.load(run.directory / "bundle")
    engine.load_index(run.directory / "index")
    snapshot = engine.index.snapshot()
    items = [snapshot.item(snapshot.existing(id)) for id in snapshot.ids()]
    assert all(item.metadata is not None and set(item.metadata) == {"colour", "kind", "pattern", "length", "price"} for item in items)
    assert all(item.content for item in items)
    hits = engine.search(Query(text="is red", k=10, filter={"kind": "dress", "price": {"<": 80}})).hits
    assert hits
    assert all(hit.metadata is not None and hit.metadata["kind"] == "dress" and hit.metadata["price"] < 80 for hit in hits)


def test_evaluation_reads_no_metadata(finished: tuple[DemoRun, list[str]]) -> None:
    """The same figures where every item is described as one and the same."""
    run, _ = finished
    engine = RetrievalEngine.load(run.directory / "bundle")
    wrong = {"colour": "red", "kind": "dress", "pattern": "plain", "length": "long", "price": 1.0}
    index_gallery(engine, run.directory / "garments" / "images", run.evaluation, metadata=dict.fromkeys(run.evaluation.gallery, wrong))
    report, found = evaluate_engine(engine, run.evaluation)
    assert report == run.runtime[0]
    assert (found.ranked == run.runtime[1].ranked).all()


def test_the_sample_is_made_of_the_demo(finished: tuple[DemoRun, list[str]], tmp_path: Path) -> None:
    run, _ = finished
    write_sample(run.directory, tmp_path, precision="float32")
    first = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    items = read_metadata(tmp_path / "photos" / "metadata.jsonl")
    assert {entry and entry["colour"] for entry in items.values()} == {r["colour"] for r in run.evaluation.attributes}
    assert {entry and (entry["colour"], entry["kind"], entry["pattern"]) for entry in items.values()} == {
        (r["colour"], r["shape"], r["pattern"]) for r in run.evaluation.attributes
    }
    engine = RetrievalEngine.load(tmp_path / "bundle")
    engine.index_images(tmp_path / "photos", metadata=items)
    assert len(engine.index) == len(items)
    write_sample(run.directory, tmp_path, precision="float32")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == first


def test_photos_of_every_length_take_turns() -> None:
    names = [(g, n) for n, g in enumerate(ALL_GARMENTS)]
    images = [ImageRecord(image=f"gallery/{n:06}.jpg", attributes=g._asdict()) for g, n in names]
    chosen = choose_photos(images, vocabulary())
    assert len(chosen) == 600
    assert set(Counter(r.attributes["length"] for r in chosen).values()) == {200}
    with pytest.raises(InputError, match="make demo"):
        write_sample(Path("nowhere"), Path("nowhere-either"))


def test_a_second_run_trains_nothing(finished: tuple[DemoRun, list[str]]) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (run.directory / "runs").glob("*/step-*")}
    again = run_demo(run.directory, OPTIONS, listener=lambda label: lambda event: None, announce=lambda stage: None)
    assert {path: path.stat().st_mtime_ns for path in (run.directory / "runs").glob("*/step-*")} == before
    assert again.dqe.evaluations[0][0] == run.dqe.evaluations[0][0]


def test_examples_are_chosen_before_the_search(finished: tuple[DemoRun, list[str]]) -> None:
    records = finished[0].evaluation.records
    chosen = pick_examples(records, count=5)
    assert len(chosen) == len({chosen_key(r) for r in chosen}) == 5
    assert chosen[0] == records[0]
    assert not math.isnan(finished[0].dqe.seconds[0])


def chosen_key(record: Any) -> tuple[str, ...]:
    return tuple(sorted(record.attributes))
