"""A small shop of real photos: Fashion-MNIST's products, tinted, with changes of colour and of category as triplets.

A product is one of the sprite's 900 cells. Products of the gallery are never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dqe_engine.contracts.parsing import to_json
from dqe_engine.contracts.vocabulary import Attribute, AttributeVocabulary
from dqe_training.data.records import ImageRecord, TripletRecord, write_jsonl

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


def read_cells(sprite: Path) -> NDArray[np.uint8]:
    """(10, 90, 28, 28) grey photos, by category."""
    grid = np.asarray(Image.open(sprite).convert("L")).reshape(CELLS_PER_ROW, CELL, CELLS_PER_ROW, CELL)
    return grid.transpose(0, 2, 1, 3).reshape(len(CATEGORIES), PER_CATEGORY, CELL, CELL)


def tint(cell: NDArray[np.uint8], colour: tuple[int, int, int], *, size: int = 64) -> Image.Image:
    """A grey photo on black becomes a coloured one on off-white."""
    grey = np.asarray(Image.fromarray(cell).resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    cover = np.clip(grey * 5, 0, 1)
    shaded = np.asarray(colour, np.float32) * (0.35 + 0.75 * grey)
    return Image.fromarray(np.clip(244 * (1 - cover) + shaded * cover, 0, 255).astype(np.uint8))


def _with_article(category: str) -> str:
    return category if category == "trousers" else f"an {category}" if category[0] in "aeiou" else f"a {category}"


def _triplets(shown: Sequence[tuple[str, int, int, str]], count: int, rng: np.random.Generator) -> list[TripletRecord]:
    """`shown` is (name, category, cell, colour). Half change the colour of a product, half the category, the colour kept."""
    by_product: dict[tuple[int, int], list[int]] = {}
    by_kind: dict[tuple[int, str], list[int]] = {}
    for i, (_, category, cell, colour) in enumerate(shown):
        by_product.setdefault((category, cell), []).append(i)
        by_kind.setdefault((category, colour), []).append(i)
    records: list[TripletRecord] = []
    while len(records) < count:
        reference = int(rng.integers(len(shown)))
        name, category, cell, colour = shown[reference]
        if rng.random() < 0.5:
            options = [i for i in by_product[category, cell] if shown[i][3] != colour]
            forms, attribute = COLOUR_TEXTS, "colour"
        else:
            other = int((category + rng.integers(1, len(CATEGORIES))) % len(CATEGORIES))
            options = by_kind.get((other, colour), [])
            forms, attribute = CATEGORY_TEXTS, "category"
        if not options:
            continue
        target = shown[options[int(rng.integers(len(options)))]]
        value = target[3] if attribute == "colour" else CATEGORIES[target[1]]
        said = value if attribute == "colour" else _with_article(value)
        text = forms[int(rng.integers(len(forms)))].format(said)
        records.append(TripletRecord(reference=name, target=target[0], text=text, attributes={attribute: value}))
    return records


def write_tinted_products(
    directory: Path,
    sprite: Path,
    *,
    gallery_cells: int = 20,
    colours_each: int = 3,
    triplets: int = 4000,
    queries: int = 300,
    seed: int = 0,
) -> Path:
    """A dataset folder like `dqe-data`'s: `gallery_cells` products of each category are held out for val and its gallery."""
    cells = read_cells(sprite)
    rng = np.random.default_rng(seed)
    images: list[ImageRecord] = []
    for split in ("train", "gallery"):
        (directory / "images" / split).mkdir(parents=True)
    shown: dict[str, list[tuple[str, int, int, str]]] = {"train": [], "gallery": []}
    for category, products in enumerate(cells):
        for rank, cell in enumerate(rng.permutation(len(products)).tolist()):
            split = "gallery" if rank < gallery_cells else "train"
            for colour in rng.choice(list(COLOURS), colours_each, replace=False).tolist():
                name = f"{split}/{category}-{cell:02d}-{colour}.png"
                tint(products[cell], COLOURS[colour]).save(directory / "images" / name)
                shown[split].append((name, category, cell, colour))
                images.append(ImageRecord(image=name, attributes={"colour": colour, "category": CATEGORIES[category]}))
    write_jsonl(directory / "images.jsonl", images)
    write_jsonl(directory / "train.jsonl", _triplets(shown["train"], triplets, rng))
    write_jsonl(directory / "val.jsonl", _triplets(shown["gallery"], queries, rng))
    (directory / "vocabulary.json").write_bytes(to_json(VOCABULARY))
    return directory
