"""CIRCO (Baldrati et al., ICCV 2023): several valid targets a query, over the unlabelled images of COCO 2017.

Files: `annotations/{val,test}.json`, and COCO's `image_info_unlabeled2017.json`, which lists the gallery; without it, the
gallery is what the image folder holds. Ids are COCO's, as twelve digits. The reference stays in its own ranking.
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

SPLITS = ("val", "test")
_DIGITS = 12


class Annotation(msgspec.Struct, frozen=True):
    id: int
    reference_img_id: int
    relative_caption: str
    shared_concept: str = ""
    target_img_id: int | None = None
    gt_img_ids: list[int] = []
    semantic_aspects: list[str] = []


class CocoImage(msgspec.Struct, frozen=True):
    id: int


class CocoImages(msgspec.Struct, frozen=True):
    images: list[CocoImage]


def coco_name(id: int) -> str:
    """271520 as in 000000271520.jpg."""
    return f"{id:0{_DIGITS}d}"


@dataclass(frozen=True)
class CIRCO:
    directory: Path
    name: ClassVar[str] = "circo"
    headline: ClassVar[str] = "map_at_10"
    splits: ClassVar[tuple[str, ...]] = SPLITS
    references_ranked: ClassVar[bool] = True

    @classmethod
    def found_in(cls, directory: Path) -> CIRCO | None:
        return cls(directory) if any((directory / "annotations" / f"{split}.json").is_file() for split in SPLITS) else None

    def image_directory(self) -> Path | None:
        return first_folder(self.directory / name for name in ("COCO2017_unlabeled/unlabeled2017", "unlabeled2017", "images"))

    def describe(self, options: Options) -> str:
        text = "shared concept and relative caption" if options.shared_concept else "relative caption"
        told = f"text: {text}; reference kept, every ground truth counts in mAP, the target alone in recall"
        return "; ".join(filter(None, (told, options.wording.describe(self.name))))

    def parts(self, images: ImageFolder | None = None) -> tuple[Part, ...]:
        gallery = self._gallery(images)
        return tuple(self._part(split, gallery, Options()) for split in SPLITS)

    def query_sets(self, split: str, options: Options, images: ImageFolder | None = None) -> tuple[QuerySet, ...]:
        check_asked(self, split, options)
        gallery = self._gallery(images)
        part = self._part(split, gallery, options)
        check_complete([part])
        if not gallery:
            raise InputError(f"{self.directory}: nothing lists the gallery; add COCO's image_info_unlabeled2017.json, or give --images")
        queries = part.queries or ()
        # An image that a query names belongs to it, also where an image folder that lacks it is the only list.
        return (QuerySet(split, queries, ascending([*gallery, *(image for query in queries for image in query.images)])),)

    def training_records(self) -> tuple[TripletRecord, ...]:
        raise InputError(f"{self.directory}: CIRCO has no training split; train on FashionIQ, CIRR or triplets of your own")

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def _gallery(self, images: ImageFolder | None) -> tuple[str, ...]:
        name = "annotations/image_info_unlabeled2017.json"
        listed = next((p for p in (self.directory / "COCO2017_unlabeled" / name, self.directory / name) if p.is_file()), None)
        if listed is not None:
            return ascending(coco_name(image.id) for image in read_annotations(listed, CocoImages).images)
        return () if images is None else ascending(id for id in images.names if len(id) == _DIGITS and id.isdecimal())

    def _part(self, split: str, gallery: tuple[str, ...], options: Options) -> Part:
        path = self.directory / "annotations" / f"{split}.json"
        galleries = {"original": gallery} if gallery else {}
        if not path.is_file():
            return Part(split, galleries=galleries, absent=(path,))
        queries, blank = [], []
        for entry in read_annotations(path, list[Annotation]):
            id, text = str(entry.id), entry.relative_caption
            if not text.strip():
                blank.append(BlankCaption(id, text))
            if options.shared_concept:
                text = f"{entry.shared_concept}, {text}"
            text = options.wording.circo.replace("{}", text)
            valid = [entry.target_img_id, *entry.gt_img_ids] if entry.target_img_id is not None else []
            targets = tuple(dict.fromkeys(coco_name(image) for image in valid if image is not None))
            queries.append(Query(id, coco_name(entry.reference_img_id), text, targets, aspects=tuple(entry.semantic_aspects)))
        return Part(split, "", tuple(queries), galleries, tuple(blank))
