"""The public datasets by name, for messages and `--help`: imports nothing."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "fashioniq": "FashionIQ",
    "cirr": "CIRR",
    "circo": "CIRCO",
    "hp-fashioniq": "HP-FashionIQ",
    "pinpoint": "PinPoint",
}
"""What `--dataset` takes, and what people call it. `detect.FINDERS` and `evaluation.benchmarks` have an entry for each."""


def titles(last: str = "or") -> str:
    """`FashionIQ, CIRR or CIRCO`, say: all of them, in words."""
    *first, final = TITLES.values()
    return f"{', '.join(first)} {last} {final}"
