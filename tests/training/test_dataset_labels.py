"""Public datasets: the vocabulary that each brings, and FashionIQ's own attribute files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_benchmarks import write_cirr, write_fashioniq, write_json

from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY
from dqe_engine.errors import InputError
from dqe_training.data.label_coverage import label_coverage
from dqe_training.data.public.cirr import CIRR
from dqe_training.data.public.fashioniq import FashionIQ
from dqe_training.data.public.fashioniq_tags import FOLDERS, read_tags, tag_labels
from dqe_training.data.public.placing import BenchmarkSource
from dqe_training.data.vocabularies import dataset_vocabulary
from dqe_training.run.workflow import DataSource

FASHION = dataset_vocabulary("fashioniq")
GROUPS = [["dress"], ["floral print"], ["chiffon"], ["maxi"], ["sleeveless", "neckline"], ["red"]]
"""As in the authors' files: category, pattern, fabric, shape, part, style."""


def test_each_dataset_brings_its_vocabulary() -> None:
    assert FASHION.names == ("colour", "pattern", "sleeve", "length", "neckline", "shape")
    assert dataset_vocabulary("cirr").names == ("object", "quantity", "pose", "viewpoint", "background", "colour")
    assert dataset_vocabulary("circo") == PAPER_VOCABULARY


def test_a_source_uses_it_unless_told_otherwise(tmp_path: Path) -> None:
    fashioniq = FashionIQ(write_fashioniq(tmp_path / "fashioniq"))
    source = BenchmarkSource.open(fashioniq)
    assert source.read_vocabulary() == FASHION
    assert BenchmarkSource.open(CIRR(write_cirr(tmp_path / "cirr"))).read_vocabulary() == dataset_vocabulary("cirr")
    (tmp_path / "own.json").write_text('{"attributes": [{"name": "hue", "values": ["red"]}]}')
    assert BenchmarkSource.open(fashioniq, vocabulary=tmp_path / "own.json").read_vocabulary().names == ("hue",)


def test_fashioniq_has_labels_and_cirr_says_that_it_has_none(tmp_path: Path) -> None:
    """Both were read without a single label, and nothing said so."""
    source = BenchmarkSource.open(FashionIQ(write_fashioniq(tmp_path / "fashioniq")))
    found = label_coverage(source.read(FASHION), FASHION, batch=64)
    assert found.margin_active
    source = BenchmarkSource.open(CIRR(write_cirr(tmp_path / "cirr")))
    vocabulary = source.read_vocabulary()
    assert "inactive: no target has a value label" in label_coverage(source.read(vocabulary), vocabulary, batch=64).message()


def test_tags_become_values() -> None:
    (record,) = tag_labels({"x": ("dress", "floral print", "maxi", "sleeveless", "neckline")}, FASHION)
    assert record.attributes == {"pattern": "floral", "length": "long", "sleeve": "sleeveless"}
    assert tag_labels({"x": ("striped", "floral"), "y": ("wash",)}, FASHION) == []  # two patterns: unknown; no value at all


@pytest.mark.parametrize("folder", FOLDERS)
def test_tags_are_read_where_they_are(tmp_path: Path, folder: str) -> None:
    write_json(tmp_path / folder / "asin2attr.dress.train.json", {"x": GROUPS})
    assert read_tags(tmp_path, ("dress", "shirt"), "train") == {"x": ("dress", "floral print", "chiffon", "maxi", "sleeveless", "neckline")}
    assert read_tags(tmp_path, ("dress",), "val") == {}


def test_tags_fill_in_what_the_texts_leave_open(tmp_path: Path) -> None:
    directory = write_fashioniq(tmp_path)
    path = directory / "captions" / "cap.dress.train.json"
    pairs = json.loads(path.read_text())
    for pair in pairs:
        pair["captions"] = ["is red", "is striped"]
    path.write_text(json.dumps(pairs))
    target = pairs[0]["target"]
    without = BenchmarkSource.open(FashionIQ(directory)).read(FASHION)
    write_json(directory / "tags" / "asin2attr.dress.train.json", {target: GROUPS, "of no triplet": GROUPS})
    data = BenchmarkSource.open(FashionIQ(directory)).read(FASHION)
    assert data.images == without.images

    def labels(of: object) -> dict[str, str]:
        (at,) = [i for i, name in enumerate(data.images) if Path(name).stem == target]
        return {a.name: a.values[v] for a, v in zip(FASHION.attributes, of.labels[at], strict=True) if v >= 0}  # type: ignore[attr-defined]

    assert labels(without) == {"colour": "red", "pattern": "striped"}
    assert labels(data) == {"colour": "red", "pattern": "striped", "sleeve": "sleeveless", "length": "long"}


def test_deriving_is_an_option_of_the_source(tmp_path: Path) -> None:
    source = BenchmarkSource.open(FashionIQ(write_fashioniq(tmp_path / "fashioniq")))
    assert (replace(source, derive=False).read(FASHION).labels < 0).all()
    (tmp_path / "own.jsonl").write_text('{"reference": "a", "target": "b", "text": "is red"}')
    own = DataSource(tmp_path / "own.jsonl", tmp_path)
    assert (own.read(FASHION).labels >= 0).sum() == 1
    assert (replace(own, derive=False).read(FASHION).labels < 0).all()


def test_a_damaged_tag_file_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "tags" / "asin2attr.dress.train.json", {"x": "dress"})
    with pytest.raises(InputError, match=r"asin2attr\.dress\.train\.json: not in the official format"):
        read_tags(tmp_path, ("dress",), "train")
