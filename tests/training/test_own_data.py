"""Triplets of one's own: evaluated as a dataset folder is, with what its labels tell and why the rest is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.tiny_bundle import build_tiny_bundle
from support.tiny_training import write_checkpoint

from dqe_engine.errors import InputError
from dqe_training.cli import evaluate
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl, write_jsonl
from dqe_training.evaluation.own_data import load_own_data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture
def own(tmp_path: Path, garments: Path) -> Path:
    """The val queries of garments as somebody's own: triplets.jsonl, labels.jsonl, images/gallery."""
    shutil.copytree(garments / "images" / "gallery", tmp_path / "images" / "gallery")
    shutil.copy(garments / "val.jsonl", tmp_path / "triplets.jsonl")
    labels = [record for record in read_jsonl(garments / "images.jsonl", ImageRecord) if record.image.startswith("gallery/")]
    write_jsonl(tmp_path / "labels.jsonl", labels)
    return tmp_path


def arguments(own: Path, *more: str) -> list[str]:
    return ["--triplets", str(own / "triplets.jsonl"), "--images", str(own / "images"), *more]


def reported(model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert evaluate.main([str(model), *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_with_labels_the_figures_are_the_folders(
    kind: str, model: Path, own: Path, garments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = model if kind == "checkpoint" else build_tiny_bundle(tmp_path / "bundle")
    folder = reported(asked, ["--data", str(garments)], capsys)
    assert reported(asked, arguments(own, "--image-labels", str(own / "labels.jsonl")), capsys) == folder
    assert folder["map_at_10"] is not None
    assert folder["notes"] == []


def test_without_labels_recall_alone_and_why(model: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(model, arguments(own), capsys)
    records = read_jsonl(own / "triplets.jsonl", TripletRecord)
    images = {name for record in records for name in (record.reference, record.target)}
    assert (report["queries"], report["gallery"]) == (24, len(images))
    assert report["map_at_10"] is None
    assert report["notes"] == [
        f"no mAP and no attribute precision: {len(images)} of {len(images)} images lack labels of colour, length, pattern, shape"
    ]
    assert evaluate.main([str(model), *arguments(own)]) == 0
    printed = capsys.readouterr().out
    assert "no mAP and no attribute precision" in printed
    assert "map_at_10" not in printed


def test_what_is_not_known_of_all_is_not_counted_as_wrong(own: Path) -> None:
    """One triplet without `allowed`, or one image without a label, and the valid answers are not known."""
    records, labels = read_jsonl(own / "triplets.jsonl", TripletRecord), read_jsonl(own / "labels.jsonl", ImageRecord)
    whole = load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")
    assert whole.relevant is not None
    bare = TripletRecord(reference=records[0].reference, target=records[0].target, text="is red")
    write_jsonl(own / "triplets.jsonl", [bare, *records[1:]])
    partly = load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")
    assert (partly.relevant, partly.notes) == (None, ("no mAP and no attribute precision: 1 of 24 triplets have no `allowed`",))
    write_jsonl(own / "triplets.jsonl", records)
    write_jsonl(own / "labels.jsonl", [ImageRecord(image=labels[0].image, attributes={"colour": "red"}), *labels[1:]])
    partly = load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")
    assert partly.relevant is None
    assert "1 of 60 images lack labels" in partly.notes[0]


def test_a_target_that_contradicts_its_labels_is_told(own: Path) -> None:
    records = read_jsonl(own / "triplets.jsonl", TripletRecord)
    records[3] = msgspec.structs.replace(records[3], allowed={"colour": ["mauve"]})
    write_jsonl(own / "triplets.jsonl", records)
    found = load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")
    assert found.notes == ("1 targets do not satisfy their own labels, the first that of triplet 4; mend the labels",)


def test_the_gallery_is_what_is_named_and_what_is_added(own: Path) -> None:
    named = load_own_data(own / "triplets.jsonl", own / "images").gallery
    assert list(named) == sorted(named)
    assert len(named) < 60
    (own / "more.txt").write_text("\ufeffgallery/000000.jpg\r\n\n  gallery/000001.jpg \n")
    added = load_own_data(own / "triplets.jsonl", own / "images", gallery=own / "more.txt").gallery
    assert set(added) == {*named, "gallery/000000.jpg", "gallery/000001.jpg"}
    assert len(load_own_data(own / "triplets.jsonl", own / "images", gallery=own / "images").gallery) == 60
    assert len(load_own_data(own / "triplets.jsonl", own / "images", gallery=own / "images" / "gallery").gallery) == 60
    assert len(load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl").gallery) == 60


def test_probes_of_ones_own(model: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = reported(model, arguments(own, "--image-labels", str(own / "labels.jsonl"), "--probes"), capsys)["probes"]
    assert not any(probe["skipped"] for probe in labelled.values())
    records = read_jsonl(own / "triplets.jsonl", TripletRecord)
    bare = [TripletRecord(reference=r.reference, target=r.target, text=r.text, wordings=("make it red",)) for r in records]
    write_jsonl(own / "triplets.jsonl", bare)
    probes = reported(model, arguments(own, "--probes"), capsys)["probes"]
    assert probes["paraphrases"]["figures"]["overlap_at_10"]["queries"] == 24
    assert "`wordings` of the triplets" in probes["paraphrases"]["how"]
    assert probes["negation"]["skipped"] == probes["leakage"]["skipped"] == "no image has attribute labels"


def _rewritten(name: str, text: str) -> Callable[[Path], list[str]]:
    def change(own: Path) -> list[str]:
        (own / name).write_text(text)
        return arguments(own)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: arguments(own)[:2], "--triplets needs --images DIR"),
        (lambda own: arguments(own)[2:], "give either --data DIR, or --triplets FILE with --images DIR"),
        (lambda own: [*arguments(own), "--data", str(own)], "give either --data DIR, or --triplets FILE with --images DIR"),
        (lambda own: [*arguments(own)[:3], str(own / "none")], "none: no such image folder"),
        (lambda own: [*arguments(own), "--split", "val"], "--split is for public datasets, not for --triplets"),
        (lambda own: [*arguments(own), "--dataset", "cirr"], "--dataset goes with --data"),
        (lambda own: ["--data", str(own), "--gallery", "val"], "--gallery goes with --triplets or a public dataset; "),
        (lambda own: ["--data", str(own), "--images", str(own)], "--images goes with --triplets or a public dataset; "),
        (lambda own: ["--data", str(own), "--image-labels", str(own / "labels.jsonl")], "--image-labels goes with --triplets"),
        (lambda own: arguments(own, "--image-labels", str(own / "none.jsonl")), "none.jsonl: no such file"),
        (lambda own: arguments(own, "--gallery", str(own / "none")), "none: no such file or folder; expected names of images"),
        (lambda own: arguments(own, "--gallery", str(own)), "a gallery folder must be a part of the image folder"),
        (lambda own: arguments(own, "--gallery", str(own / "images" / "gallery" / "000000.jpg")), "not UTF-8 text"),
        (_rewritten("triplets.jsonl", '{"reference": "gallery/000001.jpg", "target": "gallery/none.jpg", "text": "red"}\n'),
         "1 of 2 images cannot be read: gallery/none.jpg (no such file"),
        (_rewritten("triplets.jsonl", '{"reference": "gallery/000001.jpg", "target": "gallery/000001.jpg", "text": "red"}\n'),
         "record 1: gallery/000001.jpg is its own reference"),
        (_rewritten("triplets.jsonl", '{"reference": "gallery/000001.jpg", "target": "gallery/000002.jpg", "text": " "}\n'), "empty text"),
        (_rewritten("triplets.jsonl", '{"reference": "gallery/000001.jpg", "text": "red"}\n'), "missing required field `target`"),
        (_rewritten("triplets.jsonl", "\n"), "holds no records"),
    ],
)  # fmt: skip
def test_mistakes(change: Callable[[Path], list[str]], said: str, model: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(model), *change(own)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_two_labels_of_one_image_must_agree(own: Path) -> None:
    label = {"image": "gallery/000001.jpg", "attributes": {"colour": "red"}}
    (own / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (label, label)))
    load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")
    (own / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (label, label | {"attributes": {"colour": "blue"}})))
    with pytest.raises(InputError, match=r"gallery/000001\.jpg is labelled twice, and differently"):
        load_own_data(own / "triplets.jsonl", own / "images", image_labels=own / "labels.jsonl")


def test_an_empty_gallery_is_an_error(own: Path) -> None:
    (own / "images" / "none").mkdir()
    (own / "empty.txt").write_text("\n")
    for gallery in (own / "images" / "none", own / "empty.txt"):
        with pytest.raises(InputError, match="names no image"):
            load_own_data(own / "triplets.jsonl", own / "images", gallery=gallery)
