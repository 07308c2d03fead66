"""The tinted dataset, from a made-up picture of Fashion-MNIST's size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_training.cli import data as data_cli
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.data.tinted import CATEGORIES, COLOURS, TintedSpec, is_held_out, read_cells, write_tinted
from dqe_training.evaluation.protocol import load_evaluation_set
from dqe_training.run.workflow import DataSource

SPEC = TintedSpec(train_triplets=300, val_queries=100, gallery_products=4, colours_each=3)
VAL_DIGEST = "c53e84ea2517f986d33680d19592152cafc4606e2fb9e8b537e12b87f3b5b36e"


@pytest.fixture(scope="module")
def sprite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sprite") / "sprite.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (840, 840), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def tinted(sprite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tinted(tmp_path_factory.mktemp("tinted") / "data", sprite, SPEC)


def test_cells_are_cut_by_category(sprite: Path) -> None:
    grey = np.asarray(Image.open(sprite))
    cells = read_cells(sprite)
    assert cells.shape == (10, 90, 28, 28)
    np.testing.assert_array_equal(cells[2, 31], grey[7 * 28 : 8 * 28, 28:56])  # third category: rows 6 to 8


def test_products_and_pairs_of_the_gallery_are_not_trained_on(tinted: Path) -> None:
    images = read_jsonl(tinted / "images.jsonl", ImageRecord)
    assert len(images) == 900 * 3 == sum(1 for _ in (tinted / "images").rglob("*.png"))
    products = {
        split: {image.image.split("/")[1].rsplit("-", 1)[0] for image in images if image.image.startswith(split)}
        for split in ("train", "gallery")
    }
    assert len(products["gallery"]) == 40
    assert not products["train"] & products["gallery"]
    pairs = {(image.attributes["category"], image.attributes["colour"]) for image in images if image.image.startswith("train")}
    held_out = {(CATEGORIES[c], colour) for c in range(10) for colour in COLOURS if is_held_out(c, colour)}
    assert len(held_out) == 9
    assert not pairs & held_out
    assert len(pairs) == 80 - 9


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_targets_differ_as_the_text_says(tinted: Path, split: str) -> None:
    labels = {image.image: image.attributes for image in read_jsonl(tinted / "images.jsonl", ImageRecord)}
    records = read_jsonl(tinted / f"{split}.jsonl", TripletRecord)
    assert len(records) == {"train": 300, "val": 100, "test": 100}[split]
    changed: dict[str, int] = {}
    for record in records:
        ((attribute, value),) = (record.attributes or {}).items()
        reference, target = labels[record.reference], labels[record.target]
        assert target == reference | {attribute: value}
        assert reference[attribute] != value
        assert value in record.text
        assert record.allowed == {attribute: [value]}
        assert record.held_out == is_held_out(CATEGORIES.index(target["category"]), target["colour"])
        changed[attribute] = changed.get(attribute, 0) + 1
    assert min(changed.values()) > len(records) / 4
    assert any(record.held_out for record in records) == (split != "train")


def test_it_is_trained_and_evaluated_on_like_any_folder(tinted: Path) -> None:
    source = DataSource.from_directory(tinted)
    vocabulary: AttributeVocabulary = source.read_vocabulary()
    data = source.read(vocabulary)
    assert len(data) == 300
    assert (data.labels >= 0).all()
    assert len(load_evaluation_set(tinted).gallery) == 120


def test_the_seed_decides(sprite: Path, tinted: Path, tmp_path: Path) -> None:
    same = write_tinted(tmp_path / "same", sprite, SPEC)
    assert (same / "train.jsonl").read_bytes() == (tinted / "train.jsonl").read_bytes()
    other = write_tinted(tmp_path / "other", sprite, TintedSpec(train_triplets=300, val_queries=100, gallery_products=4, seed=1))
    assert (other / "train.jsonl").read_bytes() != (tinted / "train.jsonl").read_bytes()


def test_what_is_no_sprite_is_refused(tmp_path: Path, tinted: Path, sprite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, text = tmp_path / "small.png", tmp_path / "text.png"
    Image.new("L", (28, 56)).save(small)
    text.write_text("no picture")
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "out"), "--sprite", str(small)], "28 x 56 px, expected the 840 x 840 px"),
        ([str(tmp_path / "out"), "--sprite", str(text)], "not an image of an accepted format; save it as JPEG, PNG"),
        ([str(tmp_path / "out"), "--sprite", str(tmp_path / "none.png")], "no such image file"),
        ([str(tinted), "--sprite", str(sprite)], "exists; remove it or choose another folder"),
        ([str(tmp_path / "out"), "--sprite", str(sprite), "--gallery-products", "90"], "gallery_products must lie between 1 and 89"),
        ([str(tmp_path / "out"), "--sprite", str(sprite), "--colours-each", "6"], "colours_each must lie between 2 and 5"),
    ]
    for arguments, message in cases:
        assert data_cli.main(["tinted", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_test_queries_are_others_over_the_same_gallery(tinted: Path) -> None:
    val, test = (read_jsonl(tinted / f"{split}.jsonl", TripletRecord) for split in ("val", "test"))
    assert len(val) == len(test) == SPEC.val_queries

    def asked(records: list[TripletRecord]) -> set[tuple[str, str]]:
        return {(r.reference, value) for r in records for value in (r.attributes or {}).values()}

    assert not asked(val) & asked(test)
    assert load_evaluation_set(tinted, triplets="test.jsonl").gallery == load_evaluation_set(tinted).gallery


def test_val_queries_are_what_they_were_before_there_was_a_test_split(tinted: Path) -> None:
    """Recorded figures stay comparable."""
    assert hashlib.sha256((tinted / "val.jsonl").read_bytes()).hexdigest() == VAL_DIGEST


def test_too_small_a_gallery_is_an_error(sprite: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few to find 900 queries"):
        write_tinted(tmp_path / "out", sprite, TintedSpec(train_triplets=10, val_queries=900, gallery_products=1, colours_each=2))
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_dataset_that_could_not_be_written(sprite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dqe_training.data.tinted.write_jsonl", full)
    with pytest.raises(OSError, match="No space"):
        write_tinted(tmp_path / "out", sprite, SPEC)
    assert list(tmp_path.iterdir()) == []


def test_the_command(sprite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert data_cli.main(["tinted", str(out), "--sprite", str(sprite), "--train-triplets", "20", "--val-queries", "10"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
