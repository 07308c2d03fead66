"""How a labelled dataset puts its labels into words: other wordings of a triplet, and texts that rule a value out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dqe_engine.errors import InputError

from . import tinted
from .garments import catalog, texts

Values = Mapping[str, str]
Allowed = Mapping[str, tuple[str, ...]]
_DRAWS = 20  # for each wording that is wanted; what two changes can be said in is in the thousands, what "is shorter" can is not


class Grammar(Protocol):
    """Texts about the labels of one dataset."""

    @property
    def name(self) -> str:
        """What the texts come from, for reports."""
        ...

    def wordings(self, text: str, reference: Values, allowed: Allowed, count: int, seed: Sequence[int]) -> tuple[str, ...]:
        """Up to `count` distinct texts, `text` not among them, whose valid answers are those of `text`; the same for the same seed."""
        ...

    def statements(self, attribute: str, value: str) -> tuple[tuple[str, str], ...]:
        """Pairs of a text that asks for `value` and the same text negated, in the same order for all values of an attribute."""
        ...


class GarmentsGrammar:
    """`dqe-data garments`: wordings are drawn from the grammar that wrote the triplets."""

    name = "the grammar of garments"

    def wordings(self, text: str, reference: Values, allowed: Allowed, count: int, seed: Sequence[int]) -> tuple[str, ...]:
        rng = np.random.default_rng(seed)
        garment = catalog.Garment(**reference)
        try:
            drawn = dict.fromkeys(texts.reword(garment, dict(allowed), rng) for _ in range(_DRAWS * count))
        except InputError:  # a triplet of one's own in the attributes of garments, which its grammar cannot say
            return ()
        return tuple(other for other in drawn if other != text)[:count]

    def statements(self, attribute: str, value: str) -> tuple[tuple[str, str], ...]:
        return texts.statements(attribute, value)


class TintedGrammar:
    """`dqe-data tinted`: every form that a change of colour or category has there."""

    name = "the grammar of tinted"

    def wordings(self, text: str, reference: Values, allowed: Allowed, count: int, seed: Sequence[int]) -> tuple[str, ...]:
        if len(allowed) != 1 or len(values := next(iter(allowed.values()))) != 1:
            return ()
        (attribute,), (value,) = allowed, values
        said = [form for form in tinted.texts_for(attribute, value) if form != text]
        return tuple(said[at] for at in np.random.default_rng(seed).permutation(len(said))[:count])

    def statements(self, attribute: str, value: str) -> tuple[tuple[str, str], ...]:
        said = value if attribute == "colour" else tinted.with_article(value)
        return ((f"is {said}", f"is not {said}"), (said, f"not {said}"))


class LabelGrammar:
    """Labels of one's own: the values as they are spelled, underscores as spaces. It knows no other wordings."""

    name = "texts made of the labels' values"

    def wordings(self, text: str, reference: Values, allowed: Allowed, count: int, seed: Sequence[int]) -> tuple[str, ...]:
        return ()

    def statements(self, attribute: str, value: str) -> tuple[tuple[str, str], ...]:
        said = value.replace("_", " ")
        return ((f"is {said}", f"is not {said}"), (said, f"not {said}"))


def grammar_of(labels: Sequence[Values]) -> Grammar:
    """That of garments or tinted where every image is labelled with their attributes and values, else the labels' own words."""
    spaces: tuple[tuple[Mapping[str, Sequence[str]], Grammar], ...] = (
        (catalog.VALUES, GarmentsGrammar()),
        ({attribute.name: attribute.values for attribute in tinted.VOCABULARY.attributes}, TintedGrammar()),
    )
    for space, grammar in spaces:
        if all(row.keys() == space.keys() and all(value in space[name] for name, value in row.items()) for row in labels):
            return grammar
    return LabelGrammar()
