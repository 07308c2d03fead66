"""The attribute vocabulary: which attributes have sub-queries, and the words by which a text names them."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property

from .parsing import Contract, to_json

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


class Attribute(Contract, frozen=True):
    """One attribute. `values` are its labels, where a dataset has labels; `words` name it in a text (lower case;
    several words make a phrase)."""

    name: str
    values: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


class AttributeVocabulary(Contract, frozen=True, dict=True):
    """Attributes in the order of the model's heads; axis A of `sub_queries` and `attribute_weights`."""

    attributes: tuple[Attribute, ...]

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"attribute names repeat: {', '.join(names)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    @property
    def hash(self) -> str:
        """SHA-256 of the whole: names, their order, values and words."""
        return hashlib.sha256(to_json(self)).hexdigest()

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str] | None, ...]:
        return tuple(
            re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, sorted(a.words, key=len, reverse=True))) + r")(?![\w-])")
            if a.words
            else None
            for a in self.attributes
        )

    def named_in(self, text: str) -> tuple[bool, ...]:
        """For each attribute, whether `text` contains one of its words: the presence signal where labels are missing."""
        lowered = " ".join(_WORD.findall(text.lower()))
        return tuple(pattern is not None and pattern.search(lowered) is not None for pattern in self._patterns)


PAPER_VOCABULARY = AttributeVocabulary(
    attributes=(
        Attribute(
            name="colour",
            words=("color", "colour", "colored", "coloured", "darker", "lighter", "brighter", "black", "white", "grey", "gray", "red",
                   "orange", "yellow", "green", "teal", "blue", "navy", "purple", "pink", "brown", "beige", "tan", "gold", "silver",
                   "maroon", "burgundy", "turquoise", "aqua", "cream", "shade", "hue", "multicolored"),
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
