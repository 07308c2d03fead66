"""The attribute vocabulary: phrases, values and synonyms that name an attribute, and files written before synonyms existed."""

from __future__ import annotations

import msgspec
import pytest

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.contracts.vocabulary import PAPER_VOCABULARY, Attribute, AttributeVocabulary, Meaning, tokens_of
from dqe_engine.errors import InputError

VOCABULARY = AttributeVocabulary(
    attributes=(
        Attribute(name="colour", values=("red", "blue"), words=("colour", "more red"), synonyms={"crimson": "red", "Navy-Blue": "blue"}),
        Attribute(name="sleeve", values=("long-sleeved",), words=("sleeves",), synonyms={"long sleeves": "long-sleeved"}),
        Attribute(name="length", values=("long",), words=("longer",)),
    )
)


def test_tokens_are_words_and_punctuation() -> None:
    assert tokens_of("Red/blue T-shirt, 3/4 sleeves & it's GRÖSSER!") == [
        *("red", "/", "blue", "t", "shirt", ",", "3", "4", "sleeves", "&", "it", "s", "grösser", "!")
    ]
    assert tokens_of(" \n-'") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("in red", (True, False, False)),  # a value names its attribute without being repeated in `words`
        ("in CRIMSON", (True, False, False)),
        ("navy blue", (True, False, False)),
        ("navy", (False, False, False)),
        ("with long sleeves", (False, True, False)),  # the longer phrase hides "long"
        ("long-sleeved", (False, True, False)),
        ("long, sleeves", (False, True, True)),  # no phrase goes over a comma
        ("longer sleeves", (False, True, True)),
        ("reddish bluegrass", (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_what_names_an_attribute(text: str, named: tuple[bool, ...]) -> None:
    assert VOCABULARY.named_in(text) == named


def test_a_longer_word_hides_a_value() -> None:
    (found,) = VOCABULARY.mentions(tokens_of("is more red"))
    assert (found.start, found.stop, found.meanings) == (1, 3, (Meaning(0, -1),))
    (found,) = VOCABULARY.mentions(tokens_of("is red"))
    assert found.meanings == (Meaning(0, 0),)


def test_a_phrase_may_name_two_attributes() -> None:
    both = AttributeVocabulary(
        attributes=(Attribute(name="sleeve", values=("none",), synonyms={"halter": "none"}), Attribute(name="neck", values=("halter",)))
    )
    assert both.named_in("a halter dress") == (True, True)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ({"name": "a", "values": ["red"], "synonyms": {"navy": "blue"}}, "synonyms of a stand for 'blue', which is not among its values"),
        ({"name": "a", "values": ["red", "blue"], "synonyms": {"Red": "blue"}}, "'Red' of a stands for 'red' and for 'blue'"),
        ({"name": "a", "values": ["off white", "off-white"]}, "stands for 'off white' and for 'off-white'"),
    ],
)
def test_a_contradiction_is_named(attribute: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=r"v\.json") as caught:
        parse_json(AttributeVocabulary, msgspec.json.encode({"attributes": [attribute]}), where="v.json")
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["evening gown", "T-shirt", "Dress", "", "a,b"])
def test_subjects_and_parts_are_single_words(word: str) -> None:
    for key in ("subjects", "parts"):
        with pytest.raises(InputError, match="single words in lower case, not"):
            parse_json(AttributeVocabulary, msgspec.json.encode({"attributes": [], key: [word]}), where="v.json")


def test_files_and_hashes_from_before_synonyms_hold() -> None:
    """The hash is what version 0.1 computed: a bundle's heads, exported then, are still recognised."""
    old = parse_json(AttributeVocabulary, b'{"attributes": [{"name": "a", "values": [], "words": []}]}', where="v.json")
    assert old.hash == "7a8ba32ad0a1a9b1100bc4a7d40c556725c189d8486891d48912a417cf29b0e9"
    assert parse_json(AttributeVocabulary, to_json(VOCABULARY), where="v.json") == VOCABULARY


def test_whatever_matters_changes_the_hash() -> None:
    first = VOCABULARY.attributes[0]
    others = [
        msgspec.structs.replace(VOCABULARY, attributes=VOCABULARY.attributes[::-1]),
        msgspec.structs.replace(VOCABULARY, subjects=("dress",)),
        msgspec.structs.replace(VOCABULARY, parts=("dress",)),
        *(
            msgspec.structs.replace(VOCABULARY, attributes=(msgspec.structs.replace(first, **change), *VOCABULARY.attributes[1:]))
            for change in ({"synonyms": {"crimson": "red"}}, {"synonyms": {}}, {"words": ()})
        ),
    ]
    assert len({VOCABULARY.hash, *(other.hash for other in others)}) == 1 + len(others)


def test_what_is_empty_is_not_written() -> None:
    """So that vocabularies without synonyms are read by versions that do not know these."""
    assert set(msgspec.json.decode(to_json(PAPER_VOCABULARY))) == {"attributes"}
    assert all(set(attribute) == {"name", "words"} for attribute in msgspec.json.decode(to_json(PAPER_VOCABULARY))["attributes"])


@pytest.mark.parametrize("text", ["is more colorful", "has different colors", "multicoloured", "in many colours"])
def test_the_papers_colour_hears_that_there_are_many(text: str) -> None:
    assert PAPER_VOCABULARY.named_in(text) == (True, False)
