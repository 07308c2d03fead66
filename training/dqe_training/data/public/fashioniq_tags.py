"""FashionIQ's attribute labels, `asin2attr.{category}.{split}.json`: words of the products' descriptions, by image id.

Source: the authors' repository `hongwang600/image_tag_dataset`, folder `tags/` (FashionIQ, Wu et al., CVPR 2021, section 3.1:
DeepFashion's attribute words found in the title and description of the product). The paper's text names five groups (texture,
fabric, shape, part, style); in the files a product has six lists, the garment's category before these:
`{"B00014NGF6": [["dress"], [], ["chiffon", …], ["asymmetrical"], ["lace-up", …], ["elegant", …]]}`.

Nobody looked at the images for them. Where captions say a value too, the two agree in 94 % of the cases for sleeves and in 78 to
92 % for the other attributes (docs/attributes.md), and the captions are the better source: so they come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dqe_engine.contracts.vocabulary import AttributeVocabulary, tokens_of

from ..records import ImageRecord
from .base import read_annotations

FOLDERS = ("image_attributes", "tags", "image_tag_dataset/tags")
"""Where copies of the dataset have them."""

Tags = Mapping[str, tuple[str, ...]]


def read_tags(directory: Path, categories: Iterable[str], split: str) -> dict[str, tuple[str, ...]]:
    """The tags of each image id, from the files that are there: none is no error. Raises InputError for a damaged file.

    The last list, style, is left out: it holds "red" and "pink" of brands and idioms, and no other colours.
    """
    tags: dict[str, tuple[str, ...]] = {}
    for category in categories:
        for folder in FOLDERS:
            path = directory / folder / f"asin2attr.{category}.{split}.json"
            if path.is_file():
                for image, groups in read_annotations(path, dict[str, list[list[str]]]).items():
                    tags[image] = (*tags.get(image, ()), *(tag for group in groups[:-1] for tag in group))
                break
    return tags


def tag_labels(tags: Tags, vocabulary: AttributeVocabulary) -> list[ImageRecord]:
    """Labels in the vocabulary's values: an attribute of which an image's tags name exactly one value."""
    records = []
    for image, words in tags.items():
        found: dict[int, set[int]] = {}
        for word in words:
            for mention in vocabulary.mentions(tokens_of(word)):
                for attribute, value in mention.meanings:
                    if value >= 0:
                        found.setdefault(attribute, set()).add(value)
        labels = {
            vocabulary.names[a]: vocabulary.attributes[a].values[next(iter(values))] for a, values in found.items() if len(values) == 1
        }
        if labels:
            records.append(ImageRecord(image=image, attributes=labels))
    return records
