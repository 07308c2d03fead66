"""Records on disk to arrays: what is understood, and one clear line for what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, Attribute, AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_training.data.records import ImageRecord, TripletRecord, allowed_values, check_texts, named_values, read_jsonl, write_jsonl
from dqe_training.data.triplets import build_triplets, label_images, load_triplets, read_vocabulary

VOCABULARY = AttributeVocabulary(
    attributes=(
        Attribute(name="colour", values=("red", "blue"), words=("red", "blue", "colour")),
        Attribute(name="shape", values=("round", "square"), words=("round", "square")),
    )
)
GOOD = '{"reference": "a.png", "target": "b.png", "text": "in red"}'


def triplet(reference: str = "a.png", target: str = "b.png", text: str = "in red", **rest: object) -> TripletRecord:
    return TripletRecord(reference=reference, target=target, text=text, **rest)


def test_what_a_text_leaves_valid() -> None:
    shown = {"colour": "red", "shape": "round"}
    assert named_values(triplet()) is None
    assert allowed_values(triplet(), shown) == {"colour": {"red"}, "shape": {"round"}}
    target_alone = triplet(attributes={"colour": "blue"})
    assert allowed_values(target_alone, shown) == {"colour": {"blue"}, "shape": {"round"}}
    several = triplet(attributes={"colour": "blue"}, allowed={"colour": ["blue", "green"], "size": ["big"]})
    assert named_values(several) == {"colour": {"blue", "green"}, "size": {"big"}}
    assert allowed_values(several, shown) == {"colour": {"blue", "green"}, "shape": {"round"}, "size": {"big"}}


def test_round_trip(tmp_path: Path) -> None:
    records = [triplet(), triplet(text='größer "🙂"\n', attributes={"colour": "red"}, allowed={"colour": ["red"]}, held_out=True)]
    write_jsonl(tmp_path / "t.jsonl", records)
    assert read_jsonl(tmp_path / "t.jsonl", TripletRecord) == records
    assert (tmp_path / "t.jsonl").read_text().splitlines()[0] == '{"reference":"a.png","target":"b.png","text":"in red"}'


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f"\n{GOOD}\n  \n{GOOD}")
    assert len(read_jsonl(tmp_path / "t.jsonl", TripletRecord)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"reference": "a.png", "tar', "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "object"),
        (b"null", "object"),
        (b'{"reference": "a.png", "target": "b.png"}', "text"),
        (b'{"reference": "a.png", "target": "b.png", "text": 7}', "text"),
        (b'{"reference": "a.png", "target": "b.png", "text": "x", "extra": 1}', "extra"),
        (b'{"reference": "a.png", "target": "b.png", "text": "x", "attributes": ["red"]}', "attributes"),
        (b'{"reference": "a.png", "target": "b.png", "text": "\\ud800"}', "JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + line + b"\n")
    with pytest.raises(InputError) as caught:
        read_jsonl(path, TripletRecord)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no records"):
        read_jsonl(tmp_path / "t.jsonl", TripletRecord)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(tmp_path / "t.jsonl", TripletRecord)
    with pytest.raises(InputError, match="no such vocabulary"):
        read_vocabulary(tmp_path / "v.json")


@pytest.mark.parametrize("text", ["", "   ", "\t\n"])
def test_an_empty_text_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match=r"mine, record 2: empty text"):
        check_texts([triplet(), triplet(text=text)], where="mine")
    with pytest.raises(InputError, match="empty text"):
        build_triplets([triplet(text=text)], VOCABULARY)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"color": "red"}, "unknown attribute 'color'; the vocabulary has colour, shape"),
        ({"colour": "mauve"}, "colour is 'mauve'; the vocabulary has red, blue"),
    ],
)
def test_unknown_attributes_and_values_are_named(attributes: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match="mine") as caught:
        build_triplets([triplet(attributes=attributes)], VOCABULARY, where="mine")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        ({"color": ["red"]}, "unknown attribute 'color'; the vocabulary has colour, shape"),
        ({"colour": ["red", "mauve"]}, "target b.png: `allowed` of colour has 'mauve'; the vocabulary has red, blue"),
    ],
)
def test_unknown_allowed_values_are_named(allowed: dict[str, list[str]], said: str) -> None:
    """Whether or not the triplet has `attributes`."""
    for attributes in (None, {"colour": "red"}):
        with pytest.raises(InputError, match="mine") as caught:
            build_triplets([triplet(attributes=attributes, allowed=allowed)], VOCABULARY, where="mine")
        assert said in str(caught.value)


def test_an_attribute_without_listed_values_allows_any() -> None:
    free = AttributeVocabulary(attributes=(Attribute(name="colour", words=("colour",)),))
    build_triplets([triplet(attributes={"colour": "red"}, allowed={"colour": ["mauve"]})], free)


def test_an_unknown_value_of_an_image_is_named() -> None:
    with pytest.raises(InputError, match=r"image x\.png: shape is 'flat'"):
        label_images([ImageRecord(image="x.png", attributes={"shape": "flat"})], VOCABULARY)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ('{"attributes": [{"name": "a"}, {"name": "a"}]}', "repeat"),
        ('{"attributes": [{"nam": "a"}]}', "nam"),
        ('{"heads": []}', "valid keys of AttributeVocabulary: attributes"),
    ],
)
def test_a_bad_vocabulary_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=r"v\.json") as caught:
        read_vocabulary(tmp_path / "v.json")
    assert said in str(caught.value)


def test_arrays_of_a_small_set() -> None:
    records = [
        triplet("a", "b", "in red"),
        triplet("b", "c", "something else", attributes={"shape": "round"}),
        triplet("c", "a", "red and round", attributes={}),
    ]
    images = [
        ImageRecord(image="z", attributes={"colour": "blue"}),
        ImageRecord(image="a", attributes={"colour": "red", "shape": "square"}),
    ]
    data = build_triplets(records, VOCABULARY, image_records=images)
    assert data.images == ("a", "b", "c", "z")
    assert data.reference.tolist() == [0, 1, 2]
    assert data.target.tolist() == [1, 2, 0]
    assert data.named.tolist() == [[True, False], [False, True], [False, False]]  # lexicon; stated; stated to be none
    assert data.labels.tolist() == [[0, 1], [0, -1], [-1, 0], [1, -1]]  # b: its text says red
    assert data.texts == ("in red", "something else", "red and round")
    assert len(data) == 3


def test_image_labels_do_not_erase_what_triplets_state() -> None:
    records = [triplet("a", "b", attributes={"shape": "round", "colour": "red"})]
    data = build_triplets(records, VOCABULARY, image_records=[ImageRecord(image="b", attributes={"colour": "blue"})])
    assert data.labels[1].tolist() == [1, 0]


def test_values_are_free_where_the_vocabulary_lists_none() -> None:
    colours = {"b.png": "mauve", "c.png": "ecru", "d.png": "mauve"}
    records = [triplet(target=name, attributes={"colour": colour}) for name, colour in colours.items()]
    data = build_triplets(records, PAPER_VOCABULARY)
    b, c, d = (data.labels[data.images.index(name)].tolist() for name in colours)
    assert b == d != c  # comparable: what the attribute margin needs
    assert b[1] == -1
    assert data.named.tolist() == [[True, False]] * 3


def test_the_paper_vocabulary_hears_its_words() -> None:
    heard = [
        PAPER_VOCABULARY.named_in(text)
        for text in ("is darker", "has SHORT sleeves", "blue, with a v-neck", "more fun", "bluegrass shorts")
    ]
    assert heard == [(True, False), (False, True), (True, True), (False, False), (False, False)]


def test_a_prefix_keeps_one_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "t.jsonl", [triplet("train/a", "train/b")])
    write_jsonl(tmp_path / "i.jsonl", [ImageRecord(image=n, attributes={}) for n in ("train/a", "train/c", "gallery/d")])
    data = load_triplets(tmp_path / "t.jsonl", VOCABULARY, image_labels=tmp_path / "i.jsonl", prefix="train/")
    assert data.images == ("train/a", "train/b", "train/c")
    assert data.labels.dtype == np.int64
