"""CIRR, release rc2 (Liu et al., ICCV 2021): image sets of six, a second ranking within the set, a test server.

Files: `captions/cap.rc2.{split}.json`, `image_splits/split.rc2.{split}.json`. The reference is left out of its own
ranking; the subset ranking keeps the other five members of the image set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from dqe_engine.errors import InputError

from ..image_folder import ImageFolder
from ..queries import Query, QuerySet
from ..records import TripletRecord
from .base import BlankCaption, Options, Part, ascending, check_asked, check_complete, first_folder, read_annotations

SPLITS = ("train", "val", "test1")
_SET_SIZE = 6


class ImageSet(msgspec.Struct, frozen=True):
    members: list[str]


class CaptionedPair(msgspec.Struct, frozen=True):
    pairid: int
    reference: str
    caption: str
    img_set: ImageSet
    target_hard: str | None = None


@dataclass(frozen=True)
class CIRR:
    directory: Path
    name: ClassVar[str] = "cirr"
    headline: ClassVar[str] = "mean_of_recall_at_5_and_subset_recall_at_1"
    splits: ClassVar[tuple[str, ...]] = ("val", "test1")
    references_ranked: ClassVar[bool] = False

    @classmethod
    def found_in(cls, directory: Path) -> CIRR | None:
        benchmark = cls(directory)
        return benchmark if any(p.is_file() for split in SPLITS for p in benchmark._files(split)) else None

    def image_directory(self) -> Path | None:
        """`images` or `img_raw`; else the folder, or the one above it, where that holds `dev` or `test1`."""
        split = [root for root in (self.directory, self.directory.parent) if (root / "dev").is_dir() or (root / "test1").is_dir()]
        return first_folder([self.directory / "images", self.directory / "img_raw", *split])

    def describe(self, options: Options) -> str:
        return "reference removed, subset ranking over the other members of the image set"

    def parts(self, images: ImageFolder | None = None) -> tuple[Part, ...]:
        return tuple(self._part(split) for split in SPLITS)

    def query_sets(self, split: str, options: Options, images: ImageFolder | None = None) -> tuple[QuerySet, ...]:
        check_asked(self, split, options)
        part = self._part(split)
        check_complete([part])
        return (QuerySet(split, part.queries or (), part.galleries["original"]),)

    def training_records(self) -> tuple[TripletRecord, ...]:
        path = self._files("train")[0]
        records = []
        for pair in read_annotations(path, list[CaptionedPair]):
            if pair.target_hard is None:
                raise InputError(f"{path}, pair {pair.pairid}: no target_hard; training needs one")
            records.append(TripletRecord(reference=pair.reference, target=pair.target_hard, text=pair.caption))
        return tuple(records)

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def _files(self, split: str) -> tuple[Path, Path]:
        root = self.directory
        return root / "captions" / f"cap.rc2.{split}.json", root / "image_splits" / f"split.rc2.{split}.json"

    def _part(self, split: str) -> Part:
        captions, listed = self._files(split)
        absent = tuple(path for path in (captions, listed) if not path.is_file())
        galleries = {} if listed in absent else {"original": ascending(read_annotations(listed, dict[str, str]))}
        if captions in absent:
            return Part(split, galleries=galleries, absent=absent)
        queries, blank = [], []
        for pair in read_annotations(captions, list[CaptionedPair]):
            members, where = pair.img_set.members, f"{captions}, pair {pair.pairid}"
            if len(set(members)) != _SET_SIZE or pair.reference not in members:
                raise InputError(f"{where}: expected an image set of {_SET_SIZE} with the reference, got {len(set(members))} members")
            targets = () if pair.target_hard is None else (pair.target_hard,)
            others = tuple(member for member in members if member != pair.reference)
            queries.append(Query(str(pair.pairid), pair.reference, pair.caption, targets, exclude=(pair.reference,), subset=others))
            if not pair.caption.strip():
                blank.append(BlankCaption(str(pair.pairid), pair.caption))
        return Part(split, "", tuple(queries), galleries, tuple(blank), absent)
