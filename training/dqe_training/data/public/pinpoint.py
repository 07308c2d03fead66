"""PinPoint (Mahadev et al., CVPR 2026, arXiv 2603.04598): several valid answers a query, explicit negatives, several wordings.

Files, as in the authors' repository: `pinpoint_licensed.parquet` (or `pinpoint_metadata.parquet`), one query a row, and
`index_signatures.txt`, the gallery, one id a line. An id is an image's signature; images are looked for as `<signature>.jpg`. The
reference stays in its own ranking, as in the authors' script, whose negatives often name it.

Queries with two reference images (13 %) are left out: a composed query here has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from dqe_engine.contracts.parsing import without_mark
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular, require_regular

from ..image_folder import ImageFolder
from ..queries import Query, QuerySet
from ..records import TripletRecord
from .base import BlankCaption, Options, Part, ascending, check_asked, check_complete, first_folder

QUERY_FILES = ("pinpoint_licensed.parquet", "pinpoint_metadata.parquet")
GALLERY_FILE = "index_signatures.txt"
SPLIT = "all"
_NONE = (None, "", "None")
"""How the column of the second reference image says that there is none."""


class Row(msgspec.Struct, frozen=True):
    """The columns that are read; the file has more."""

    query_id: str
    query_image_signature: str
    instruction: str
    positive_candidates: list[str | None]
    query_image_signature2: str | None = None
    negative_candidates: list[str | None] | None = None


@dataclass(frozen=True)
class PinPoint:
    directory: Path
    name: ClassVar[str] = "pinpoint"
    headline: ClassVar[str] = "map_at_10"
    splits: ClassVar[tuple[str, ...]] = (SPLIT,)
    references_ranked: ClassVar[bool] = True

    @classmethod
    def found_in(cls, directory: Path) -> PinPoint | None:
        return cls(directory) if any((directory / name).is_file() for name in QUERY_FILES) else None

    def image_directory(self) -> Path | None:
        return first_folder([self.directory / "images"])

    def describe(self, options: Options) -> str:
        return "reference kept, queries with two reference images left out; every positive counts in mAP, every negative in negative recall"

    def parts(self, images: ImageFolder | None = None) -> tuple[Part, ...]:
        queries, listed = self._query_file(), self.directory / GALLERY_FILE
        absent = tuple(path for path in (queries, listed) if not path.is_file())
        galleries = {} if listed in absent else {"original": ascending(_lines(listed))}
        if queries in absent:
            return (Part(SPLIT, galleries=galleries, absent=absent),)
        asked = tuple(_query(row) for row in _rows(queries) if row.query_image_signature2 in _NONE)
        blank = tuple(BlankCaption(query.id, query.text) for query in asked if query.wordless)
        return (Part(SPLIT, "", asked, galleries, blank, absent),)

    def query_sets(self, split: str, options: Options, images: ImageFolder | None = None) -> tuple[QuerySet, ...]:
        check_asked(self, split, options)
        (part,) = self.parts()
        check_complete([part])
        return (QuerySet(split, part.queries or (), part.galleries["original"]),)

    def training_records(self) -> tuple[TripletRecord, ...]:
        raise InputError(f"{self.directory}: PinPoint is for evaluation; train on FashionIQ, CIRR or triplets of your own")

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def _query_file(self) -> Path:
        return next((self.directory / name for name in QUERY_FILES if (self.directory / name).is_file()), self.directory / QUERY_FILES[0])


def _query(row: Row) -> Query:
    """Lists as the file has them, but for empty places: the authors' figures count what is listed twice."""
    targets, negatives = (tuple(id for id in ids or () if id is not None) for ids in (row.positive_candidates, row.negative_candidates))
    return Query(row.query_id, row.query_image_signature, row.instruction, targets, negatives=negatives)


def _rows(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    try:
        require_regular(path)
        with open(path, "rb") as stream:
            there = set(parquet.read_schema(stream).names)
            stream.seek(0)
            table: Sequence[Mapping[str, Any]] = parquet.read_table(
                stream, columns=[name for name in Row.__struct_fields__ if name in there]
            ).to_pylist()
        return msgspec.convert(table, list[Row])
    except (pyarrow.ArrowException, msgspec.ValidationError) as error:
        raise InputError(f"{path}: not in the official format, get the file again: {' '.join(str(error).split())}") from error
    except OSError as error:  # pyarrow raises it, without a number, for broken files too
        reason = (
            describe_os_error(error, path)
            if error.errno
            else f"{path}: not in the official format, get the file again: {' '.join(str(error).split())}"
        )
        raise InputError(reason) from error


def _lines(path: Path) -> list[str]:
    try:
        text = without_mark(read_regular(path)).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; expected an image's signature a line") from error
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    return [line.strip() for line in text.splitlines() if line.strip()]
