"""The procedural dataset: the same bytes for the same options, texts that are true of their targets, combinations held out."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dqe_engine.errors import InputError
from dqe_training.data.garments.catalog import ALL_GARMENTS, COLOURS, LENGTHS, LIGHTNESS, VALUES, Garment, is_held_out, vocabulary
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
from dqe_training.data.garments.render import render
from dqe_training.data.garments.texts import modify
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.evaluation.protocol import load_evaluation_set

SPEC = GarmentsSpec(train_images=300, train_triplets=400, gallery_images=300, val_queries=150, image_size=24, seed=3)
VAL_DIGEST = "d3d70f8fbb54018d2c36e7704f5dbf9126eb7535004c5427aa531b13070694e9"
TINY = GarmentsSpec(train_images=20, train_triplets=20, gallery_images=20, val_queries=20, image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_garments(tmp_path_factory.mktemp("dataset") / "garments", SPEC)


@pytest.fixture(scope="module")
def shown(folder: Path) -> dict[str, Garment]:
    return {r.image: Garment(**r.attributes) for r in read_jsonl(folder / "images.jsonl", ImageRecord)}


@pytest.fixture(scope="module")
def train(folder: Path) -> list[TripletRecord]:
    return read_jsonl(folder / "train.jsonl", TripletRecord)


@pytest.fixture(scope="module")
def val(folder: Path) -> list[TripletRecord]:
    return read_jsonl(folder / "val.jsonl", TripletRecord)


def digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_same_options_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    done: list[int] = []
    again = digests(write_garments(tmp_path / "again", SPEC, advance=done.append))
    assert again == digests(folder)
    assert sum(done) == 600
    assert len(again) == 600 + 6


def test_another_seed_gives_other_images_and_texts(folder: Path, tmp_path: Path) -> None:
    small = GarmentsSpec(train_images=20, train_triplets=20, gallery_images=20, val_queries=20, image_size=24, seed=4)
    ours, other = digests(folder), digests(write_garments(tmp_path / "other", small))
    same = {name for name in other if ours.get(name) == other[name]}
    assert same == {"vocabulary.json"}


def test_no_two_images_are_alike(folder: Path, shown: dict[str, Garment]) -> None:
    pixels = [np.asarray(Image.open(folder / "images" / name)).tobytes() for name in shown]
    assert len(set(pixels)) == len(pixels) == 600
    same = Garment("red", "dress", "striped", "long")
    drawn = {render(same, np.random.default_rng([0, i]), size=24).tobytes() for i in range(50)}
    assert len(drawn) == 50


def test_every_value_occurs_in_both_splits(shown: dict[str, Garment]) -> None:
    for split in ("train/", "gallery/"):
        garments = [g for name, g in shown.items() if name.startswith(split)]
        assert len(garments) == 300
        for attribute, values in VALUES.items():
            assert {getattr(g, attribute) for g in garments} == set(values)
    assert [len(values) for values in VALUES.values()] == [12, 10, 5, 3]


def test_the_labels_are_what_is_drawn(folder: Path, shown: dict[str, Garment]) -> None:
    """A plain garment's centre has the colour of its label, among those that differ enough to be told under any light."""
    told, right = 0, 0
    for name, garment in shown.items():
        if (
            garment.pattern == "plain"
            and garment.colour in ("red", "green", "blue", "yellow")
            and garment.shape not in ("trousers", "dungarees")
        ):
            pixels = np.asarray(Image.open(folder / "images" / name).convert("RGB"), float)[8:16, 9:15].reshape(-1, 3)
            direction = np.median(pixels, axis=0) - np.median(pixels)
            guesses = {c: np.corrcoef(direction, COLOURS[c])[0, 1] for c in ("red", "green", "blue", "yellow")}
            told += 1
            right += max(guesses, key=guesses.__getitem__) == garment.colour
    assert told > 15
    assert right / told > 0.8


def test_targets_satisfy_their_texts(shown: dict[str, Garment], train: list[TripletRecord], val: list[TripletRecord]) -> None:
    assert (len(train), len(val)) == (400, 150)
    for record in (*train, *val):
        assert record.reference != record.target
        reference, target = shown[record.reference], shown[record.target]
        assert record.allowed is not None
        assert record.attributes == {name: getattr(target, name) for name in record.allowed}
        assert 1 <= len(record.allowed) <= 2
        for name in Garment._fields:
            if name in record.allowed:
                assert getattr(target, name) in record.allowed[name]
                assert getattr(reference, name) not in record.allowed[name]  # a change
            else:
                assert getattr(target, name) == getattr(reference, name)


def test_splits_do_not_mix(train: list[TripletRecord], val: list[TripletRecord]) -> None:
    assert all(name.startswith("train/") for r in train for name in (r.reference, r.target))
    assert all(name.startswith("gallery/") for r in val for name in (r.reference, r.target))


def test_held_out_combinations_are_never_trained_on(
    shown: dict[str, Garment], train: list[TripletRecord], val: list[TripletRecord]
) -> None:
    assert not any(is_held_out(g) for name, g in shown.items() if name.startswith("train/"))
    assert any(is_held_out(g) for name, g in shown.items() if name.startswith("gallery/"))
    assert not any(r.held_out for r in train)
    assert [r.held_out for r in val] == [is_held_out(shown[r.target]) for r in val]
    assert 0 < sum(r.held_out for r in val) < len(val)
    assert 0.10 < np.mean([is_held_out(g) for g in ALL_GARMENTS]) < 0.20
    for length in LENGTHS:  # length is not part of the combination
        assert is_held_out(Garment("red", "dress", "plain", length)) == is_held_out(Garment("red", "dress", "plain", "long"))


def test_relevant_images_equal_brute_force(folder: Path, shown: dict[str, Garment], val: list[TripletRecord]) -> None:
    gallery = {name: g for name, g in shown.items() if name.startswith("gallery/")}
    evaluation = load_evaluation_set(folder)
    assert evaluation.gallery == tuple(gallery)
    assert evaluation.relevant is not None
    several = 0
    for row, record in enumerate(val):
        expected = []
        for name, garment in gallery.items():
            kept = all(getattr(garment, a) == getattr(gallery[record.reference], a) for a in Garment._fields if a not in record.allowed)
            changed = all(getattr(garment, a) in values for a, values in record.allowed.items())
            if kept and changed and name != record.reference:
                expected.append(name)
        assert [evaluation.gallery[i] for i in evaluation.relevant[row]] == expected
        assert record.target in expected
        several += len(expected) > 1
    assert several > 0


# -- texts ---------------------------------------------------------------------------------------------------------------

SYNONYMS = {
    "red": ("scarlet",), "grey": ("gray",), "teal": ("turquoise",), "purple": ("violet",), "t-shirt": ("tee",), "coat": ("overcoat",),
    "kimono": ("robe",), "poncho": ("cape",), "dress": ("gown",), "trousers": ("pants",), "dungarees": ("overalls",),
    "plain": ("no pattern", "solid", "without any pattern"), "striped": ("stripes",), "dotted": ("dots", "spots"),
    "checked": ("checks", "gingham"),
    "zigzag": ("chevron",), "cropped": ("short",), "regular": ("mid-length",), "long": ("full length", "maxi"),
}  # fmt: skip


def modifications(count: int = 2000) -> list[tuple[Garment, str, dict[str, tuple[str, ...]]]]:
    rng = np.random.default_rng(0)
    references = [ALL_GARMENTS[i] for i in rng.integers(len(ALL_GARMENTS), size=count)]
    return [(reference, *modify(reference, rng)) for reference in references]


def test_texts_have_many_wordings() -> None:
    texts = Counter(text for _, text, _ in modifications())
    assert len(texts) > 300
    assert texts.most_common(1)[0][1] < 60
    words = Counter(len(text.split()) for text in texts)
    assert min(words) == 1
    assert max(words) >= 9


def test_texts_say_the_new_value() -> None:
    for _, text, allowed in modifications():
        for attribute, values in allowed.items():
            comparison = any(word in text for word in ("darker", "lighter", "shorter", "longer"))
            if len(values) == 1 and not comparison:
                assert any(word in text for word in (values[0], *SYNONYMS.get(values[0], ()))), (text, attribute, values)


def test_the_lexicon_hears_every_named_attribute() -> None:
    words = vocabulary()
    for _, text, allowed in modifications():
        heard = dict(zip(words.names, words.named_in(text), strict=True))
        assert all(heard[attribute] for attribute in allowed), (text, allowed, heard)


def test_one_or_two_attributes_change_and_each_about_as_often() -> None:
    drawn = modifications()
    assert 0.35 < np.mean([len(allowed) == 2 for *_, allowed in drawn]) < 0.55
    named = Counter(itertools.chain.from_iterable(allowed for *_, allowed in drawn))
    assert set(named) == set(VALUES)
    assert max(named.values()) < 1.3 * min(named.values())
    for reference, text, allowed in drawn:
        for attribute, values in allowed.items():
            assert values, text
            assert set(values) <= set(VALUES[attribute]) - {getattr(reference, attribute)}


def test_comparisons_leave_several_values_and_are_true() -> None:
    rng = np.random.default_rng(1)
    several = Counter()
    for reference in ALL_GARMENTS[:: len(ALL_GARMENTS) // 300]:
        for _ in range(6):
            text, allowed = modify(reference, rng, two=0.0, relative=1.0)
            (values,) = allowed.values()
            level = LIGHTNESS[reference.colour]
            if "darker" in text:
                assert set(values) == {c for c in COLOURS if LIGHTNESS[c] < level - 40}
            elif "lighter" in text:
                assert set(values) == {c for c in COLOURS if LIGHTNESS[c] > level + 40}
            elif "shorter" in text:
                assert values == LENGTHS[: LENGTHS.index(reference.length)]
            elif "longer" in text:
                assert values == LENGTHS[LENGTHS.index(reference.length) + 1 :]
            else:
                assert set(allowed) <= {"shape", "pattern"}
                continue
            several[len(values) > 1] += 1
    assert several[True] > several[False]


# -- files ---------------------------------------------------------------------------------------------------------------


def test_what_is_there_is_kept_or_refused(folder: Path, tmp_path: Path) -> None:
    before = (folder / "train.jsonl").stat().st_mtime_ns
    write_garments(folder, SPEC)
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds another dataset"):
        write_garments(folder, GarmentsSpec(seed=99))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="other files"):
        write_garments(tmp_path / "mine", SPEC)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == b"precious"


def test_test_queries_are_others_over_the_same_gallery(folder: Path, val: list[TripletRecord]) -> None:
    test = read_jsonl(folder / "test.jsonl", TripletRecord)
    assert len(test) == len(val)
    assert load_evaluation_set(folder, triplets="test.jsonl").gallery == load_evaluation_set(folder).gallery

    def asked(records: list[TripletRecord]) -> set[str]:
        return {f"{r.reference} {sorted((r.allowed or {}).items())}" for r in records}

    assert not asked(test) & asked(val)
    assert len(asked(test)) > 0.9 * len(test)
    assert {r.held_out for r in test} == {False, True}


def test_val_queries_are_what_they_were_before_there_was_a_test_split(folder: Path) -> None:
    """Recorded figures stay comparable."""
    digest = hashlib.sha256((folder / "val.jsonl").read_bytes()).hexdigest()
    assert digest == VAL_DIGEST


def test_a_dataset_of_an_earlier_version_gets_its_test_queries(folder: Path, tmp_path: Path) -> None:
    whole = write_garments(tmp_path / "whole", TINY)
    old = shutil.copytree(whole, tmp_path / "old")
    (old / "test.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*") if path.is_file()}
    write_garments(old, TINY)
    assert digests(old) == digests(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_too_few_images_for_triplets_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few"):
        write_garments(tmp_path / "out", GarmentsSpec(train_images=1, train_triplets=5, gallery_images=2, val_queries=0, image_size=16))
    assert list(tmp_path.iterdir()) == []


def test_images_alone(tmp_path: Path) -> None:
    out = write_garments(tmp_path / "out", GarmentsSpec(train_images=3, train_triplets=0, gallery_images=2, val_queries=0, image_size=16))
    assert not (out / "train.jsonl").exists()
    assert len(read_jsonl(out / "images.jsonl", ImageRecord)) == 5
