"""Value labels from texts: what is taken, what is not, and who wins where several sources speak."""

from __future__ import annotations

import pytest

from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_training.data.derived_labels import read_triplet, statements
from dqe_training.data.public.fashioniq import join_captions
from dqe_training.data.records import ImageRecord, TripletRecord
from dqe_training.data.triplets import build_triplets
from dqe_training.data.vocabularies import dataset_vocabulary

FASHION = dataset_vocabulary("fashioniq")
SMALL = AttributeVocabulary(
    attributes=(
        Attribute(name="colour", values=("red", "blue"), synonyms={"crimson": "red"}, words=("colour",)),
        Attribute(name="size", values=("big", "small")),
    )
)


def captions(*texts: str) -> TripletRecord:
    text, wordings = join_captions(texts if len(texts) == 2 else (*texts, ""))
    return TripletRecord(reference="r", target="t", text=text, wordings=wordings)


def derived(*texts: str, vocabulary: AttributeVocabulary = FASHION) -> dict[str, str]:
    said = zip(vocabulary.attributes, read_triplet(captions(*texts), vocabulary), strict=True)
    return {attribute.name: attribute.values[one.value] for attribute, one in said if one.value >= 0}


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("is red", "red"),
        ("is more red", "red"),
        ("in a dark red", "red"),
        ("a burgundy dress", "red"),
        ("red sleeveless tank", "red"),
        ("has a red color", "red"),
        ("is a darker shade of red", "red"),
        ("red instead of blue", "red"),
        ("is red rather than blue", "red"),
        ("not blue but red", "red"),
        ("is red and has no blue logo", "red"),
        ("is red with blue text", "red"),
        ("is red with blue", "red"),
        ("the color is red", "red"),
        ("change the color from blue to red", "red"),
        ("turned from blue into red", "red"),
        ("is colorful", "multicolored"),
        ("is multi-colored", "multicolored"),
        ("is not red", None),
        ("changed from red", None),
        ("change the logo to red", None),
        ("isn't red", None),
        ("is less red", None),
        ("without red", None),
        ("instead of red", None),
        ("is lighter than red", None),
        ("is darker", None),
        ("has different colors", None),
        ("is more colorful", None),  # than the reference: it may be all red
        ("is red and blue", None),
        ("red/blue", None),
        ("has a red logo", None),
        ("red stripes", None),
        ("black and red stripes", None),
        ("a red stripe shirt", None),
        ("with red sleeves", None),
        ("the collar is red", None),
        ("red on the sides", None),
        ("red at the bottom", None),
        ("is red in the back", None),
        ("with red", None),
        ("has some red", None),
        ("the red shirt has buttons", None),  # as often the reference
        ("is neither red nor blue", None),
        ("neither red or blue but green", "green"),
        ("any colour except red", None),
        ("anything but red", None),
        ("all but red", None),
        ("any colour but red", None),
        ("nothing but red", "red"),
        ("avoid red", None),
        ("excluding red", None),
        ("any color other than red", None),
        ("non-red", None),
        ("can't be red", None),
        ("shouldn't be red", None),
        ("red is not wanted", None),
        ("red isn't right", None),
        ("dislike red", None),
        ("besides red", None),
        ("was originally red", None),
        ("exchange red for blue", "blue"),
        ("replace red with blue", "blue"),
        ("swap red for blue", "blue"),
        ("replace red by blue", "blue"),
        ("change red to blue", "blue"),
        ("replace the red dress with a blue one", "blue"),
        ("is all red is not long", "red"),
        ("red is replaced by blue", "blue"),
        ("red replaced with blue", "blue"),
        ("substitute red with blue", None),
        ("replace the logo with red", None),
        ("replace the red logo with a green one", None),
        ("remove red", None),
        ("the same as the red one", None),
        ("as red as the reference", None),
        ("is too red", None),
        ("is red, as well as shorter", "red"),
        ("as well as being shorter it is red", "red"),
    ],
)
def test_the_colour_of_the_thing_itself(text: str, colour: str | None) -> None:
    assert derived(text).get("colour") == colour


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("is a solid blue polo", {"colour": "blue", "pattern": "solid", "neckline": "collar"}),
        ("has stripes", {"pattern": "striped"}),
        ("no stripes", {}),
        ("without stripes", {}),
        ("less striped", {}),
        ("striped instead of plaid", {"pattern": "striped"}),
        ("with striped sleeves", {}),
        ("has a animal print pocket", {}),
        ("has no sleeves", {"sleeve": "sleeveless"}),
        ("does not have long sleeves", {}),
        ("has no sleeve and collar", {"sleeve": "sleeveless"}),
        ("has longer sleeves", {}),
        ("with 3/4 sleeves", {"sleeve": "three-quarter-sleeved"}),
        ("black v neck shirt with long sleeves", {"colour": "black", "sleeve": "long-sleeved", "neckline": "v-neck"}),
        ("has sleeves that are long", {}),
        ("a long black dress", {"colour": "black", "length": "long"}),
        ("is longer", {}),
        ("is long in the back", {}),
        ("is a dress", {}),  # the category is what the gallery is of
        ("", {}),
        ("?!", {}),
    ],
)
def test_the_other_attributes(text: str, labels: dict[str, str]) -> None:
    assert derived(text) == labels


def test_a_category_names_nothing() -> None:
    assert not any(FASHION.named_in("it is a dress, not a shirt or a top"))


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("is red", "has long sleeves", {"colour": "red", "sleeve": "long-sleeved"}),
        ("is red", "is crimson", {"colour": "red"}),
        ("is red", "is blue", {}),
        ("is red", "is not red", {}),
        ("is black", "is black with dots", {"colour": "black", "pattern": "dotted"}),
        ("has no stripes", "black", {"colour": "black"}),  # joined, "no stripes and black" would deny black
    ],
)
def test_two_captions_both_count_and_must_agree(first: str, second: str, labels: dict[str, str]) -> None:
    assert derived(first, second) == labels


def test_only_joins_of_other_texts_are_left_out() -> None:
    assert statements(captions("is black", "is black with dots")) == ("is black", "is black with dots")
    assert statements(TripletRecord(reference="r", target="t", text="Red", wordings=("crimson", "red"))) == ("red", "crimson")


def test_triplets_of_one_target_are_read_together() -> None:
    records = [
        TripletRecord(reference="a", target=t, text=text) for t, text in (("x", "is red"), ("x", "big"), ("y", "is red"), ("y", "blue"))
    ]
    data = build_triplets(records, SMALL)
    assert data.labels[[data.images.index(name) for name in ("x", "y", "a")]].tolist() == [[0, 0], [-1, -1], [-1, -1]]


def test_who_wins() -> None:
    """Labels of images, then of triplets, then what texts say, then guesses; without attributes of its own alone."""
    records = [
        TripletRecord(reference="a", target="stated", text="is red", attributes={"colour": "blue"}),
        TripletRecord(reference="a", target="nothing stated", text="is red", attributes={}),
        TripletRecord(reference="a", target="labelled", text="is red"),
        TripletRecord(reference="a", target="said", text="is red"),
        TripletRecord(reference="a", target="guessed", text="something else"),
    ]
    images = [ImageRecord(image="labelled", attributes={"colour": "blue"})]
    guessed = [ImageRecord(image=r.target, attributes={"colour": "blue", "size": "small"}) for r in records[2:]]
    guessed.append(ImageRecord(image="of no triplet", attributes={"colour": "blue"}))

    def labels(derive: bool) -> dict[str, list[int]]:
        data = build_triplets(records, SMALL, image_records=images, guessed=guessed, derive=derive)
        assert "of no triplet" not in data.images
        return {r.target: data.labels[data.images.index(r.target)].tolist() for r in records}

    stated = {"stated": [1, -1], "nothing stated": [-1, -1], "labelled": [1, 1], "guessed": [1, 1]}
    assert labels(derive=True) == stated | {"said": [0, 1]}
    assert labels(derive=False) == stated | {"said": [1, 1]}
