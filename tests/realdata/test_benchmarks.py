"""The official annotation files and submission examples: counts, texts, galleries, and the servers' formats."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_training.cli import data
from dqe_training.data.image_folder import ImageFolder
from dqe_training.data.public.base import Options
from dqe_training.data.public.circo import CIRCO
from dqe_training.data.public.cirr import CIRR
from dqe_training.data.public.fashioniq import FashionIQ
from dqe_training.data.queries import QuerySet
from dqe_training.data.triplets import build_triplets
from dqe_training.evaluation.benchmarks import cirr_figures
from dqe_training.evaluation.submission import MAX_BYTES, check_file, encode, submission

pytestmark = pytest.mark.realdata

FASHIONIQ = {
    "train": {"dress": (5985, 11452, 0), "shirt": (5988, 19036, 0), "toptee": (6027, 16121, 12)},
    "val": {"dress": (2017, 3817, 0), "shirt": (2038, 6346, 1), "toptee": (1961, 5373, 2)},
    "test": {"dress": (2024, 3818, 0), "shirt": (2038, 6346, 1), "toptee": (2056, 5374, 0)},
}
VAL_GALLERY = {"dress": 2628, "shirt": 3089, "toptee": 2902}


def test_the_check_counts_all_three(realdata: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["check", str(realdata)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for split, categories in FASHIONIQ.items():
        for category, (triplets, gallery, empty) in categories.items():
            val = str(VAL_GALLERY[category]) if split == "val" else "-"
            assert [split, category, str(triplets), str(gallery), val, str(empty)] in lines
    for row in (
        ["train", "-", "-", "16939", "-"],  # cap.rc2.train.json is not here
        ["val", "-", "4181", "2297", "0"],
        ["test1", "-", "4148", "2315", "1"],
        ["val", "-", "220", "0"],
        ["test", "-", "800", "0"],
    ):
        assert row in lines, row
    assert "val: 4.16 ground truths a query, 1 to 14" in out
    assert "train dress: captions of punctuation alone (1): dress-train-1039 '.'" in out
    assert "test1: queries without any word, for which models read '.' (1): 27098" in out
    assert out.count("images: none given") == 3


def test_missing_images_of_a_copy_are_listed(realdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of CIRR's val images but three, as empty files in its folders."""
    shutil.copytree(realdata / "cirr" / "captions", tmp_path / "captions")
    shutil.copytree(realdata / "cirr" / "image_splits", tmp_path / "image_splits")
    for split in ("val", "test1", "train"):
        files = json.loads((realdata / "cirr" / "image_splits" / f"split.rc2.{split}.json").read_text())
        for name in list(files.values())[3 if split == "val" else 0 :]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert data.main(["check", str(tmp_path), "--missing-list", str(tmp_path / "missing.txt")]) == 1
    there = len(list(tmp_path.rglob("*.png")))
    assert f"images: {there} under {tmp_path}, 3 missing, {there} damaged" in capsys.readouterr().out
    files = json.loads((realdata / "cirr" / "image_splits" / "split.rc2.val.json").read_text())
    assert (tmp_path / "missing.txt").read_text().split() == sorted(list(files)[:3])


def test_fashioniq_texts_and_galleries(realdata: Path) -> None:
    benchmark = FashionIQ(realdata / "fashioniq")
    records = benchmark.training_records()
    assert len(records) == 18_000
    assert Counter(len(r.wordings) for r in records) == {3: 18_000 - 13, 0: 13}  # 12 empty captions and one "."
    assert all(r.text and r.text == r.text.strip(".?, ") for r in records)
    triplets = build_triplets(records, PAPER_VOCABULARY)
    assert len(triplets.training_texts) == 18_000 + 3 * (18_000 - 13)
    rows, _ = triplets.draw_texts(0, 0)
    own = float((rows < 18_000).mean())
    assert own == pytest.approx(0.25 + 0.75 * 13 / 18_000, rel=0, abs=4 * 0.5 / 18_000**0.5)
    for wide, narrow in zip(benchmark.query_sets("val", Options()), benchmark.query_sets("val", Options(gallery="val")), strict=True):
        assert set(narrow.gallery) < set(wide.gallery)
        assert not any(query.wordless for query in wide.queries)


def test_shirts_and_tops_share_images(realdata: Path) -> None:
    """Why identical copies of an image count as one: with a folder per category they lie in two."""
    shown = {
        category: {id for part in FashionIQ(realdata / "fashioniq").parts() if part.category == category for id in part.images}
        for category in ("dress", "shirt", "toptee")
    }
    assert len(shown["shirt"] & shown["toptee"]) == 3302
    assert not shown["dress"] & (shown["shirt"] | shown["toptee"])


def test_every_cirr_pair_is_a_set_of_six(realdata: Path) -> None:
    for split, count in (("val", 4181), ("test1", 4148)):
        (queries,) = CIRR(realdata / "cirr").query_sets(split, Options())
        assert len(queries) == count
        assert all(len(query.subset) == 5 and query.reference not in query.subset for query in queries.queries)
    assert queries.target.max() == -1


def test_circos_target_is_its_first_ground_truth(realdata: Path) -> None:
    images = ImageFolder(Path("unused"), {f"{id:012d}": "" for id in range(60)})
    (queries,) = CIRCO(realdata / "circo").query_sets("val", Options(), images)
    annotations = json.loads((realdata / "circo" / "annotations" / "val.json").read_text())
    assert [[int(id) for id in q.targets] for q in queries.queries] == [entry["gt_img_ids"] for entry in annotations]
    assert [int(queries.gallery[at]) for at in queries.target] == [entry["target_img_id"] for entry in annotations]


# -- submissions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "dataset", "split"),
    [
        ("cirr/demo_files/test1_pred_ranks_recall.json", "cirr", "test1"),
        ("cirr/demo_files/test1_pred_ranks_recall_subset.json", "cirr", "test1"),
        ("circo/submission_examples/submission_val.json", "circo", "val"),
        ("circo/submission_examples/submission_test.json", "circo", "test"),
    ],
)
def test_the_official_examples_pass(realdata: Path, file: str, dataset: str, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check-submission", str(realdata / file), "--data", str(realdata / dataset), "--split", split]
    assert data.main(arguments) == 0
    assert capsys.readouterr().out.endswith("in order\n")
    assert encode(json.loads((realdata / file).read_text())) == (realdata / file).read_bytes()  # our form is theirs, to the byte


def random_ranking(queries: QuerySet, depth: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = [rng.permutation(len(queries.gallery)) for _ in queries.queries]
    left = [[at for at in row if queries.gallery[at] not in q.exclude] for row, q in zip(rows, queries.queries, strict=True)]
    return np.asarray([row[:depth] for row in left])


def test_ours_have_the_form_of_cirrs_examples(realdata: Path, tmp_path: Path) -> None:
    benchmark = CIRR(realdata / "cirr")
    (queries,) = benchmark.query_sets("test1", Options())
    files = submission("cirr", "test1", queries, random_ranking(queries, len(queries.gallery) - 1))
    for (name, content), metric in zip(files.items(), ("recall", "recall_subset"), strict=True):
        official = json.loads((realdata / "cirr" / "demo_files" / f"test1_pred_ranks_{metric}.json").read_text())
        assert list(content) == list(official)
        assert {id: type(value) for id, value in content.items()} == {id: type(value) for id, value in official.items()}
        assert all(len(content[id]) == len(official[id]) for id in content if id not in ("version", "metric"))
        assert (content["version"], content["metric"]) == (official["version"], official["metric"])
        (tmp_path / name).write_bytes(encode(content))
        assert len(encode(content)) <= MAX_BYTES
        assert "in order" in check_file(tmp_path / name, benchmark)


@pytest.mark.parametrize("split", ["val", "test"])
def test_ours_have_the_form_of_circos_examples(realdata: Path, split: str) -> None:
    official = json.loads((realdata / "circo" / "submission_examples" / f"submission_{split}.json").read_text())
    images = ImageFolder(Path("unused"), {f"{id:012d}": "" for ids in official.values() for id in ids})
    (queries,) = CIRCO(realdata / "circo").query_sets(split, Options(), images)
    (content,) = submission("circo", split, queries, random_ranking(queries, 50)).values()
    assert list(content) == list(official)
    assert all(len(content[id]) == len(official[id]) and {type(i) for i in content[id]} == {int} for id in content)


def test_chance_on_cirr(realdata: Path) -> None:
    """A random ranking of the real val split: K / 2296 in the gallery, K / 5 in the image set; four standard errors."""
    (queries,) = CIRR(realdata / "cirr").query_sets("val", Options())
    figures = cirr_figures(queries, random_ranking(queries, len(queries.gallery) - 1))
    for name, chance in [(f"recall_at_{k}", k / 2296) for k in (1, 5, 10, 50)] + [(f"subset_recall_at_{k}", k / 5) for k in (1, 2, 3)]:
        assert figures[name].value == pytest.approx(chance, rel=0, abs=4 * (chance * (1 - chance) / 4181) ** 0.5), name


def test_circos_val_queries_say_their_aspects_and_test_queries_none(realdata: Path) -> None:
    benchmark = CIRCO(realdata / "circo")
    gallery = ImageFolder(Path("unused"), {f"{id:012d}": "" for id in range(1)})
    (val,), (test,) = (benchmark.query_sets(split, Options(), gallery) for split in ("val", "test"))
    counts = Counter(aspect for query in val.queries for aspect in query.aspects)
    assert (len(counts), counts["statement_with_conjunction"], counts["negation"]) == (9, 164, 21)
    assert all(query.aspects for query in val.queries)
    assert not any(query.aspects for query in test.queries)
