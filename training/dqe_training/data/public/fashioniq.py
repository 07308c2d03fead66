"""FashionIQ (Wu et al., CVPR 2021): three categories, two captions a triplet, two galleries in use.

Files: `captions/cap.{category}.{split}.json`, `image_splits/split.{category}.{split}.json`. The reference stays in its
own ranking. The gallery is the split's image list ("original"), or the union of the validation references and targets
("val"), which is smaller and gives higher figures. Attribute labels of the images, where there are any: `fashioniq_tags`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec

from dqe_engine.errors import InputError

from ..image_folder import ImageFolder
from ..queries import Query, QuerySet
from ..records import TripletRecord
from .base import BlankCaption, Options, Part, ascending, check_asked, check_complete, first_folder, read_annotations
from .fashioniq_tags import read_tags

CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = ("train", "val", "test")
_STRIPPED = ".?, "


class CaptionedPair(msgspec.Struct, frozen=True):
    candidate: str
    captions: list[str]
    target: str | None = None


class Texts(NamedTuple):
    """What a triplet says: the text that evaluation reads, and the other wordings that training draws from."""

    text: str
    wordings: tuple[str, ...]


def join_captions(captions: Sequence[str]) -> Texts:
    """`C1 and c2`, by the peers' rule: stripped of `.?, `, the first one capitalised. Wordings: `C2 and c1`, `C1`, `C2`.

    A caption without words is left out: the other one is then the text. Both without words: the text is empty.
    """
    stripped = [caption.strip(_STRIPPED) for caption in captions]
    first, *rest = [caption for caption in stripped if caption] or [""]
    if not rest:
        return Texts(first.capitalize(), ())
    second = rest[0]
    return Texts(f"{first.capitalize()} and {second}", (f"{second.capitalize()} and {first}", first.capitalize(), second.capitalize()))


def join_blanks(captions: Sequence[str]) -> str:
    """`C1 and c2` as the peers' own code joins them, also where a caption has no words: "" and "is red" make " and is red"."""
    first, second = (caption.strip(_STRIPPED) for caption in captions)
    return f"{first.capitalize()} and {second}"


@dataclass(frozen=True)
class FashionIQ:
    directory: Path
    name: ClassVar[str] = "fashioniq"
    headline: ClassVar[str] = "mean"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    references_ranked: ClassVar[bool] = True

    @classmethod
    def found_in(cls, directory: Path) -> FashionIQ | None:
        known = (directory / "captions" / f"cap.{category}.{split}.json" for category in CATEGORIES for split in SPLITS)
        return cls(directory) if any(path.is_file() for path in known) else None

    def image_directory(self) -> Path | None:
        return first_folder(self.directory / name for name in ("images", "image_data"))

    def describe(self, options: Options) -> str:
        told = f"gallery {options.gallery or 'original'}, reference kept"
        return "; ".join(filter(None, (told, options.wording.describe(self.name))))

    def parts(self, images: ImageFolder | None = None) -> tuple[Part, ...]:
        return tuple(self._part(split, category, Options()) for split in SPLITS for category in CATEGORIES)

    def query_sets(self, split: str, options: Options, images: ImageFolder | None = None) -> tuple[QuerySet, ...]:
        check_asked(self, split, options)
        parts = [self._part(split, category, options) for category in CATEGORIES]
        check_complete(parts)
        return tuple(QuerySet(p.category, p.queries or (), p.galleries[options.gallery or "original"]) for p in parts)

    def training_records(self) -> tuple[TripletRecord, ...]:
        records = []
        for category in CATEGORIES:
            path, pairs = self._captions("train", category)
            for row, pair in enumerate(pairs, start=1):
                if pair.target is None:
                    raise InputError(f"{path}, record {row}: no target; training needs one")
                text, wordings = join_captions(pair.captions)
                records.append(TripletRecord(reference=pair.candidate, target=pair.target, text=text, wordings=wordings))
        return tuple(records)

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        return read_tags(self.directory, CATEGORIES, "train")

    def _captions(self, split: str, category: str) -> tuple[Path, list[CaptionedPair]]:
        path = self.directory / "captions" / f"cap.{category}.{split}.json"
        pairs = read_annotations(path, list[CaptionedPair])
        for row, pair in enumerate(pairs, start=1):
            if len(pair.captions) != 2:
                raise InputError(f"{path}, record {row}: {len(pair.captions)} captions, expected 2")
        return path, pairs

    def _part(self, split: str, category: str, options: Options) -> Part:
        captions = self.directory / "captions" / f"cap.{category}.{split}.json"
        listed = self.directory / "image_splits" / f"split.{category}.{split}.json"
        absent = tuple(path for path in (captions, listed) if not path.is_file())
        galleries = {} if listed in absent else {"original": ascending(read_annotations(listed, list[str]))}
        if captions in absent:
            return Part(split, category, galleries=galleries, absent=absent)
        queries, blank = [], []
        for row, pair in enumerate(self._captions(split, category)[1]):
            id = f"{category}-{split}-{row}"
            targets = () if pair.target is None else (pair.target,)
            text = join_blanks(pair.captions) if options.wording.blanks_joined else join_captions(pair.captions).text
            queries.append(Query(id, pair.candidate, text, targets))
            blank += [BlankCaption(id, caption) for caption in pair.captions if not caption.strip(_STRIPPED)]
        if split == "val":
            galleries["val"] = ascending(image for query in queries for image in query.images)
        return Part(split, category, tuple(queries), galleries, tuple(blank), absent)
