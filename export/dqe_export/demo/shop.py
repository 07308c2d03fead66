"""What a shop would know of the garments: metadata of the demo's index and of the sample, for filters. Prices are made up."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from dqe_training.data.records import ImageRecord

PRICES = {
    "t-shirt": 15, "tank top": 12, "hoodie": 40, "coat": 110, "kimono": 70, "poncho": 50, "dress": 60, "skirt": 35, "trousers": 45,
    "dungarees": 55,
}  # fmt: skip
"""The middle of a kind's prices."""

Entry = dict[str, str | float]


def shop_metadata(images: Iterable[ImageRecord]) -> dict[str, Entry]:
    """By image name: colour, kind (the dataset's `shape`), pattern, length and a price within 40 % of its kind's, by a hash of the name."""
    return {
        record.image: {
            "colour": record.attributes["colour"],
            "kind": record.attributes["shape"],
            "pattern": record.attributes["pattern"],
            "length": record.attributes["length"],
            "price": _price(record),
        }
        for record in images
    }


def _price(record: ImageRecord) -> float:
    factor = 0.6 + 0.8 * (zlib.crc32(record.image.encode()) % 1000) / 999
    return round(PRICES[record.attributes["shape"]] * factor) + 0.9
