"""The `tinted` dataset: 900 real product photos of Fashion-MNIST's overview picture, each shown in several colours.

Triplets ask for the same product in another colour, or for another kind of product in the same colour. Products of the gallery are never
trained on, and some pairs of colour and category are seen in the gallery alone. The picture (Xiao, Rasul, Vollgraf 2017, MIT licence) is
doc/img/fashion-mnist-sprite.png of the dataset's repository.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dqe_engine.contracts.parsing import Contract, to_json
from dqe_engine.contracts.preprocessing import PreprocessingSpec
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_directory
from dqe_engine.preprocessing import open_image

from .records import ImageRecord, TripletRecord, write_jsonl

CELL, CELLS_PER_ROW, ROWS_PER_CATEGORY = 28, 30, 3
PER_CATEGORY = CELLS_PER_ROW * ROWS_PER_CATEGORY
# In the sprite's order, three rows each.
CATEGORIES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COLOURS = {
    "red": (205, 40, 45), "orange": (240, 140, 40), "yellow": (240, 215, 70), "green": (50, 150, 70),
    "blue": (50, 90, 205), "purple": (130, 65, 175), "pink": (245, 150, 190), "brown": (120, 75, 45),
}  # fmt: skip
COLOUR_TEXTS = ("in {}", "is {}", "make it {}", "the same in {}", "i want it in {}", "change the colour to {}", "a {} one", "is {} instead")
CATEGORY_TEXTS = ("make it {}", "is {}", "{} instead", "turn it into {}", "i want {}", "the same colour but {}", "as {}", "{}")
VOCABULARY = AttributeVocabulary(
    attributes=(
        Attribute(name="colour", values=tuple(COLOURS), words=(*COLOURS, "colour")),
        Attribute(name="category", values=CATEGORIES, words=CATEGORIES),
    )
)


class TintedSpec(Contract, frozen=True):
    """`gallery_products` of each category's 90 are kept for the gallery, its `val_queries` and as many others to test with."""

    train_triplets: int = 4000
    val_queries: int = 300
    gallery_products: int = 20
    colours_each: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_triplets, self.val_queries, self.seed) < 0:
            raise ValueError("counts and the seed must not be negative")
        if not 0 < self.gallery_products < PER_CATEGORY:
            raise ValueError(f"gallery_products must lie between 1 and {PER_CATEGORY - 1}, got {self.gallery_products}")
        if not 2 <= self.colours_each <= len(COLOURS) - 3:  # for every category, as many colours may be held out
            raise ValueError(f"colours_each must lie between 2 and {len(COLOURS) - 3}, got {self.colours_each}")


class Shown(NamedTuple):
    """One image: a product, `cell` of its category, in a colour."""

    name: str
    category: int
    cell: int
    colour: str


def is_held_out(category: int, colour: str) -> bool:
    """Whether the pair occurs in no training image: 9 of the 80, decided by a fixed hash."""
    return zlib.crc32(f"{CATEGORIES[category]}|{colour}".encode()) % 1000 < 150


def read_cells(sprite: Path) -> NDArray[np.uint8]:
    """(10, 90, 28, 28) grey photos, by category. Raises InputError for another picture."""
    side = CELL * CELLS_PER_ROW
    grey = np.asarray(open_image(sprite, PreprocessingSpec(image_size=side)).convert("L"))
    if grey.shape != (side, side):
        raise InputError(f"{sprite}: {grey.shape[1]} x {grey.shape[0]} px, expected the {side} x {side} px of fashion-mnist-sprite.png")
    grid = grey.reshape(CELLS_PER_ROW, CELL, CELLS_PER_ROW, CELL)
    return grid.transpose(0, 2, 1, 3).reshape(len(CATEGORIES), PER_CATEGORY, CELL, CELL)


def tint(cell: NDArray[np.uint8], colour: tuple[int, int, int], *, size: int = 64) -> Image.Image:
    """A grey photo on black becomes a coloured one on off-white."""
    grey = np.asarray(Image.fromarray(cell).resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    cover = np.clip(grey * 5, 0, 1)
    shaded = np.asarray(colour, np.float32) * (0.35 + 0.75 * grey)
    return Image.fromarray(np.clip(244 * (1 - cover) + shaded * cover, 0, 255).astype(np.uint8))


def texts_for(attribute: str, value: str) -> tuple[str, ...]:
    """Every text that asks for `value` of the colour or the category."""
    said, forms = (value, COLOUR_TEXTS) if attribute == "colour" else (with_article(value), CATEGORY_TEXTS)
    return tuple(form.format(said) for form in forms)


def with_article(category: str) -> str:
    """`a coat`, `an ankle boot`, `trousers`."""
    return category if category == "trousers" else f"an {category}" if category[0] in "aeiou" else f"a {category}"


def _triplets(
    shown: Sequence[Shown], count: int, rng: np.random.Generator, *, other_than: Sequence[TripletRecord] = ()
) -> list[TripletRecord]:
    """Half change the colour of a product, half the category, the colour kept. None asks what one of `other_than` does: the same value
    of the same reference, in whatever words."""
    taken = {(record.reference, value) for record in other_than for value in (record.attributes or {}).values()}
    by_product: dict[tuple[int, int], list[Shown]] = {}
    by_kind: dict[tuple[int, str], list[Shown]] = {}
    for image in shown:
        by_product.setdefault((image.category, image.cell), []).append(image)
        by_kind.setdefault((image.category, image.colour), []).append(image)
    records: list[TripletRecord] = []
    attempts = 0
    while len(records) < count:
        attempts += 1
        if attempts > 200 * (len(records) + 50):
            raise InputError(f"{len(shown)} images are too few to find {count} queries among; keep more products, or ask for fewer queries")
        reference = shown[int(rng.integers(len(shown)))]
        if rng.random() < 0.5:
            options = [other for other in by_product[reference.category, reference.cell] if other.colour != reference.colour]
            attribute = "colour"
        else:
            category = int((reference.category + rng.integers(1, len(CATEGORIES))) % len(CATEGORIES))
            options = by_kind.get((category, reference.colour), [])
            attribute = "category"
        if not options:
            continue
        target = options[int(rng.integers(len(options)))]
        value = target.colour if attribute == "colour" else CATEGORIES[target.category]
        if (reference.name, value) in taken:
            continue
        texts = texts_for(attribute, value)
        records.append(
            TripletRecord(
                reference=reference.name,
                target=target.name,
                text=texts[int(rng.integers(len(texts)))],
                attributes={attribute: value},
                allowed={attribute: [value]},
                held_out=is_held_out(target.category, target.colour),
            )
        )
    return records


def write_tinted(directory: Path, sprite: Path, spec: TintedSpec) -> Path:
    """Write the dataset, in the layout of `dqe-data garments`, to `directory`, which must not exist: all of it or nothing.

    Raises InputError for a picture that is not Fashion-MNIST's, or a `directory` that exists.
    """
    cells = read_cells(sprite)
    if directory.exists():
        raise InputError(f"{directory}: exists; remove it or choose another folder")
    rng = np.random.default_rng(spec.seed)
    shown: dict[str, list[Shown]] = {"train": [], "gallery": []}
    with atomic_directory(directory) as temporary:
        for split in shown:
            (temporary / "images" / split).mkdir(parents=True)
        for category, products in enumerate(cells):
            for rank, cell in enumerate(rng.permutation(len(products)).tolist()):
                split = "gallery" if rank < spec.gallery_products else "train"
                colours = [colour for colour in COLOURS if split == "gallery" or not is_held_out(category, colour)]
                for colour in rng.choice(colours, spec.colours_each, replace=False).tolist():
                    name = f"{split}/{category}-{cell:02d}-{colour}.png"
                    tint(products[cell], COLOURS[colour]).save(temporary / "images" / name)
                    shown[split].append(Shown(name, category, cell, colour))
        write_jsonl(temporary / "images.jsonl", (
            ImageRecord(image=image.name, attributes={"colour": image.colour, "category": CATEGORIES[image.category]})
            for images in shown.values() for image in images
        ))  # fmt: skip
        write_jsonl(temporary / "train.jsonl", _triplets(shown["train"], spec.train_triplets, rng))
        val = _triplets(shown["gallery"], spec.val_queries, rng)
        write_jsonl(temporary / "val.jsonl", val)
        write_jsonl(temporary / "test.jsonl", _triplets(shown["gallery"], spec.val_queries, rng, other_than=val))
        (temporary / "vocabulary.json").write_bytes(to_json(VOCABULARY))
        (temporary / "dataset.json").write_bytes(to_json(spec))
    return directory
