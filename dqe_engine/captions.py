"""BLIP's caption processor: what LAVIS's models, and those that were trained on them, make of a text before they tokenise it."""

from __future__ import annotations

import re

MOST_WORDS = 50
_SPACES = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_RUNS = re.compile(r"\s{2,}")


def blip_caption(text: str) -> str:
    """Lower case; a space for each of `. ! " ( ) * # : ; ~`, and one for each run of two and more blanks; none at the ends; 50 words.

    Words are what single spaces separate; a lone tab or line feed inside stays. Other punctuation, `, ? - ' / & %`, stays as well.
    """
    spaced = _RUNS.sub(" ", text.lower().translate(_SPACES))
    words = spaced.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:MOST_WORDS])
