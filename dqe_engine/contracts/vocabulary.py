"""The attribute vocabulary: which attributes have sub-queries, and the words by which a text names them and their values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from .parsing import Contract, to_json

_TOKEN = re.compile(r"(?<=\d)/(?=\d)|([^\W_]+|[.,;:!?&/])")
_ADDED_LATER = ("synonyms", "subjects", "parts")
"""Keys that vocabularies did not always have. Where they are empty, the hash is the one that older versions computed."""


def tokens_of(text: str) -> list[str]:
    """Words of `text` in lower case, and its punctuation. A hyphen separates words like a space, and so does the slash of `3/4`."""
    return [found for found in _TOKEN.findall(text.lower()) if found]


class Attribute(Contract, frozen=True, omit_defaults=True):
    """One attribute of the vocabulary.

    `values` are its labels; in a text, each also stands for itself. `synonyms`: other words for a value, as word to value.
    `words` name the attribute without a value ("darker"). Several words make a phrase; of phrases that overlap, the longer
    one counts ("more colourful" among the `words` hides the value "colourful").
    """

    name: str
    values: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    synonyms: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if foreign := set(self.synonyms.values()) - set(self.values):
            raise ValueError(f"synonyms of {self.name} stand for {sorted(foreign)[0]!r}, which is not among its values; add it to them")
        said: dict[tuple[str, ...], str] = {}
        for phrase, value in (*((value, value) for value in self.values), *self.synonyms.items()):
            if (other := said.setdefault(tuple(tokens_of(phrase)), value)) != value:
                raise ValueError(f"{phrase!r} of {self.name} stands for {other!r} and for {value!r}; keep one")

    @property
    def meanings(self) -> dict[tuple[str, ...], int]:
        """Phrases, as tokens, that name the attribute: the position of the value that each stands for, -1 for none."""
        position = {value: at for at, value in enumerate(self.values)}
        said = dict.fromkeys(self.words, -1) | position | {word: position[value] for word, value in self.synonyms.items()}
        return {tokens: at for phrase, at in said.items() if (tokens := tuple(tokens_of(phrase)))}


class Meaning(NamedTuple):
    """Positions of an attribute in the vocabulary and of a value in it, -1 where the phrase stands for none."""

    attribute: int
    value: int


class Mention(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a text are a phrase of the vocabulary; one phrase may name several attributes."""

    start: int
    stop: int
    meanings: tuple[Meaning, ...]


class AttributeVocabulary(Contract, frozen=True, dict=True, omit_defaults=True):
    """Attributes in the order of the model's heads; axis A of `sub_queries` and `attribute_weights`.

    `subjects`: nouns for the thing itself ("dress": a red dress is red). `parts`: nouns that describe or name a part of it
    ("stripes": red stripes do not make a red dress). Both are single words and name no attribute; labels derived from texts need
    them.
    """

    attributes: tuple[Attribute, ...]
    subjects: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"attribute names repeat: {', '.join(names)}; name each attribute once")
        if odd := [word for word in (*self.subjects, *self.parts) if tokens_of(word) != [word]]:
            raise ValueError(f"subjects and parts are single words in lower case, not {odd[0]!r}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    @property
    def hash(self) -> str:
        """SHA-256 of the whole: names, their order, values and words."""
        return hashlib.sha256(to_json(_without_empty({field: getattr(self, field) for field in self.__struct_fields__}))).hexdigest()

    @cached_property
    def _phrases(self) -> dict[str, list[tuple[tuple[str, ...], tuple[Meaning, ...]]]]:
        """By first token, longest first."""
        meanings: dict[tuple[str, ...], list[Meaning]] = {}
        for at, attribute in enumerate(self.attributes):
            for phrase, value in attribute.meanings.items():
                meanings.setdefault(phrase, []).append(Meaning(at, value))
        by_first: dict[str, list[tuple[tuple[str, ...], tuple[Meaning, ...]]]] = {}
        for phrase in sorted(meanings, key=len, reverse=True):
            by_first.setdefault(phrase[0], []).append((phrase, tuple(meanings[phrase])))
        return by_first

    def mentions(self, tokens: Sequence[str]) -> list[Mention]:
        """The phrases in `tokens` (of `tokens_of`), left to right; where several begin at a token, the longest."""
        found, at = [], 0
        while at < len(tokens):
            for phrase, meanings in self._phrases.get(tokens[at], ()):
                if tuple(tokens[at : at + len(phrase)]) == phrase:
                    found.append(Mention(at, at + len(phrase), meanings))
                    break
            at = found[-1].stop if found and found[-1].stop > at else at + 1
        return found

    def named_in(self, text: str) -> tuple[bool, ...]:
        """For each attribute, whether `text` contains one of its words or values: the presence signal where labels are missing."""
        named = {meaning.attribute for mention in self.mentions(tokens_of(text)) for meaning in mention.meanings}
        return tuple(at in named for at in range(len(self.attributes)))


def _without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of a vocabulary as plain data, without those added later that are empty."""
    kept = {name: value for name, value in fields.items() if value or name not in _ADDED_LATER}
    if "attributes" in kept:
        kept["attributes"] = [_without_empty({f: getattr(a, f) for f in a.__struct_fields__}) for a in kept["attributes"]]
    return kept


NO_ATTRIBUTES = AttributeVocabulary(attributes=())
"""That of a model without attribute heads."""

PAPER_VOCABULARY = AttributeVocabulary(
    attributes=(
        Attribute(
            name="colour",
            words=("color", "colour", "colored", "coloured", "darker", "lighter", "brighter", "black", "white", "grey", "gray", "red",
                   "orange", "yellow", "green", "teal", "blue", "navy", "purple", "pink", "brown", "beige", "tan", "gold", "silver",
                   "maroon", "burgundy", "turquoise", "aqua", "cream", "shade", "hue", "multicolored", "multicoloured",
                   "colorful", "colourful", "colors", "colours"),
        ),
        Attribute(
            name="shape",
            words=("shape", "shaped", "sleeve", "sleeves", "sleeved", "sleeveless", "short", "shorter", "long", "longer", "length",
                   "fitted", "fitting", "loose", "looser", "tight", "tighter", "flowing", "flowy", "flared", "neck", "neckline", "v-neck",
                   "collar", "strap", "straps", "strapless", "waist", "hem", "skirt", "dress", "shirt", "tank", "top", "round", "square",
                   "bigger", "smaller", "larger", "wider", "narrower", "shoulder", "button", "buttons"),
        ),
    )
)  # fmt: skip
"""Colour and shape, as in the paper (section on learnable attribute weights); the word lexicon is our choice."""
