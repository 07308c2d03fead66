"""The attribute space of the procedural `garments` dataset: 10 shapes x 12 colours x 5 patterns x 3 lengths."""

from __future__ import annotations

import itertools
import zlib
from typing import NamedTuple

from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary

# sRGB of the garment's base cloth. Ordered by nothing; `LIGHTNESS` below is what "darker" and "lighter" refer to.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (28, 28, 32),
    "white": (240, 240, 238),
    "grey": (132, 134, 138),
    "red": (200, 32, 40),
    "orange": (238, 128, 28),
    "yellow": (242, 212, 48),
    "green": (44, 138, 58),
    "teal": (22, 142, 142),
    "blue": (38, 78, 190),
    "purple": (116, 54, 160),
    "pink": (244, 150, 186),
    "brown": (110, 68, 38),
}
SHAPES = ("t-shirt", "tank top", "hoodie", "coat", "kimono", "poncho", "dress", "skirt", "trousers", "dungarees")
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag")
LENGTHS = ("cropped", "regular", "long")

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "length": LENGTHS,
}

# Rec. 601 luma of the base cloth, 0 to 255. "darker" means lower by more than LIGHTNESS_STEP.
LIGHTNESS = {name: 0.299 * r + 0.587 * g + 0.114 * b for name, (r, g, b) in COLOURS.items()}
LIGHTNESS_STEP = 40.0


class Garment(NamedTuple):
    """One attribute combination; field names are the attribute names."""

    colour: str
    shape: str
    pattern: str
    length: str


ALL_GARMENTS: tuple[Garment, ...] = tuple(Garment(*values) for values in itertools.product(*VALUES.values()))


def is_held_out(garment: Garment, share: float = 0.15) -> bool:
    """Whether the (colour, shape, pattern) combination is kept out of training, for about `share` of them.

    A fixed hash decides, not a seed: every dataset and every pretraining run holds out the same combinations.
    """
    key = zlib.crc32(f"{garment.colour}|{garment.shape}|{garment.pattern}".encode())
    return key % 1000 < share * 1000


def vocabulary() -> AttributeVocabulary:
    """The attribute vocabulary with its word lexicon (words whose presence says that the text names the attribute)."""
    words = {
        "colour": (*COLOURS, "color", "colour", "scarlet", "crimson", "gray", "turquoise", "violet", "rose", "darker", "lighter", "shade"),
        "shape": (*SHAPES, "tee", "top", "jumper", "overcoat", "robe", "cape", "gown", "pants", "overalls", "tank"),
        "pattern": (*PATTERNS, "stripes", "dots", "spots", "polka", "checks", "gingham", "zigzags", "chevron", "solid", "pattern"),
        "length": (*LENGTHS, "shorter", "longer", "short", "length", "maxi", "mid-length"),
    }  # fmt: skip
    return AttributeVocabulary(attributes=tuple(Attribute(name=name, values=values, words=words[name]) for name, values in VALUES.items()))
