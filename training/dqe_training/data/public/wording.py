"""The text that a model's authors make of a dataset's annotations, if their public code makes another than the dataset's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How annotations become the text that a model reads.

    blanks_joined: FashionIQ's two captions are joined by "and" even if one has no words: "" and "is red" make " and is red".
    circo: CIRCO's text, with the annotated caption at `{}`.
    unknown: datasets on which the authors publish figures without the code that makes the text.
    """

    name: str
    blanks_joined: bool = False
    circo: str = "{}"
    unknown: tuple[str, ...] = ()

    def describe(self, dataset: str) -> str:
        """In words, what this wording does to a dataset's texts; "" where it does nothing."""
        if dataset == "fashioniq" and self.blanks_joined:
            return 'captions without words are joined by "and", too'
        if dataset == "circo" and self.circo != "{}":
            return f'the caption is read as "{self.circo}"'
        return ""


WORDED = ("fashioniq", "circo")
"""Datasets whose texts a wording may change. The others have one caption a query, which every model reads as it is."""
PLAIN = Wording("plain")
WORDINGS: Mapping[str, Wording] = {
    wording.name: wording
    for wording in (
        PLAIN,
        Wording("sprc", blanks_joined=True, unknown=("circo",)),
        Wording("spn4cir", blanks_joined=True),
        Wording("qure", blanks_joined=True, circo="a photo of $ that {}"),
    )
}
"""By name, which is that of the layout of the authors' files (`importing`). Read from their public code."""


def wording_of(layout: str | None) -> Wording:
    """That of the layout of imported weights; plain for all others."""
    return WORDINGS.get(layout or "", PLAIN)
