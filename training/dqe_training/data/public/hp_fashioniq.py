"""HP-FashionIQ (QuRe, ICML 2025): which of two retrieved sets of five images people preferred, for FashionIQ queries.

One file, `hpfiq.json`: user -> `question_set_1`, `question_set_2` -> parallel lists (`ref_img_paths`, `sentences`,
`retrieved_set1` and `retrieved_set2` with their `img_path`, `preferred set`). An image's id is its file name: the paths
begin with a placeholder. Sentences are read as they are, the authors' "dotmark" for a full stop included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import msgspec

from dqe_engine.errors import InputError

from ..image_folder import ImageFolder
from ..queries import Preference, Query, QuerySet
from ..records import TripletRecord
from .base import BlankCaption, Options, Part, ascending, check_asked, check_complete, first_folder, read_annotations

FILE = "hpfiq.json"


class RetrievedSet(msgspec.Struct, frozen=True):
    img_path: list[str]


class QuestionSet(msgspec.Struct, frozen=True):
    ref_img_paths: list[str]
    sentences: list[str]
    retrieved_set1: list[RetrievedSet]
    retrieved_set2: list[RetrievedSet]
    preferred: list[Literal["1", "2"]] = msgspec.field(name="preferred set")


def _id(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).stem


@dataclass(frozen=True)
class HPFashionIQ:
    directory: Path
    name: ClassVar[str] = "hp-fashioniq"
    headline: ClassVar[str] = "preference_accuracy"
    splits: ClassVar[tuple[str, ...]] = ("all",)
    references_ranked: ClassVar[bool] = True

    @classmethod
    def found_in(cls, directory: Path) -> HPFashionIQ | None:
        return cls(directory) if (directory / FILE).is_file() else None

    def image_directory(self) -> Path | None:
        return first_folder(self.directory / name for name in ("images", "image_data"))

    def describe(self, options: Options) -> str:
        return "which set has the higher mean score: accuracy over all questions, and the authors' preference ratio"

    def parts(self, images: ImageFolder | None = None) -> tuple[Part, ...]:
        file = self.directory / FILE
        if not file.is_file():
            return (Part("all", absent=(file,)),)
        queries = self._queries(file)
        blank = tuple(BlankCaption(q.id, q.text) for q in queries if q.wordless)
        return (Part("all", "", queries, {"original": ascending(i for q in queries for i in q.images)}, blank),)

    def query_sets(self, split: str, options: Options, images: ImageFolder | None = None) -> tuple[QuerySet, ...]:
        check_asked(self, split, options)
        (part,) = self.parts()
        check_complete([part])
        return (QuerySet(split, part.queries or (), part.galleries["original"]),)

    def training_records(self) -> tuple[TripletRecord, ...]:
        raise InputError(f"{self.directory}: HP-FashionIQ is for evaluation; train on FashionIQ")

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def _queries(self, file: Path) -> tuple[Query, ...]:
        queries = []
        for user, sets in read_annotations(file, dict[str, dict[str, QuestionSet]]).items():
            for number, asked in sets.items():
                where = f"{file}: {user}, {number}"
                columns = (asked.ref_img_paths, asked.sentences, asked.retrieved_set1, asked.retrieved_set2, asked.preferred)
                if len({len(column) for column in columns}) != 1:
                    raise InputError(f"{where}: lists of {', '.join(str(len(c)) for c in columns)} entries, expected equal lengths")
                for row, (reference, text, first, second, preferred) in enumerate(zip(*columns, strict=True)):
                    if not (first.img_path and second.img_path):
                        raise InputError(f"{where}, question {row}: a retrieved set without images")
                    choice = Preference(tuple(map(_id, first.img_path)), tuple(map(_id, second.img_path)), int(preferred))
                    queries.append(Query(f"{user}/{number}/{row}", _id(reference), text, preference=choice))
        return tuple(queries)
