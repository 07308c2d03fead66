"""What the public datasets have in common: their parts, the options of their protocols, and how annotations are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec

from dqe_engine.contracts.parsing import NOT_JSON, without_mark
from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error, read_regular

from ..image_folder import ImageFolder
from ..queries import Query, QuerySet
from ..records import TripletRecord
from .names import TITLES
from .wording import PLAIN, Wording

GalleryName = Literal["original", "val"]
T = TypeVar("T")


@dataclass(frozen=True)
class BlankCaption:
    """A caption without words: empty, or punctuation alone."""

    query: str
    caption: str

    @property
    def empty(self) -> bool:
        return not self.caption.strip()


@dataclass(frozen=True)
class Part:
    """One split (of one category, where a dataset has them).

    queries: None where the annotation file is not there. galleries: by the protocol's name, ids ascending; empty where
    nothing lists them. absent: annotation files that are not there.
    """

    split: str
    category: str = ""
    queries: tuple[Query, ...] | None = None
    galleries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blank: tuple[BlankCaption, ...] = ()
    absent: tuple[Path, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """Every image of the part, ids ascending."""
        queried = (image for query in self.queries or () for image in query.images)
        return tuple(sorted({*queried, *(image for gallery in self.galleries.values() for image in gallery)}))


@dataclass(frozen=True)
class Options:
    """Choices that change figures. None, False and `PLAIN`: the dataset's usual protocol."""

    gallery: GalleryName | None = None
    shared_concept: bool = False
    wording: Wording = PLAIN


class Benchmark(Protocol):
    """A public dataset in a folder. Loaders raise InputError that names the file."""

    @property
    def name(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def splits(self) -> tuple[str, ...]:
        """Those with queries to evaluate."""
        ...

    @property
    def headline(self) -> str:
        """The figure that the dataset is compared by, of those that its evaluation gives (`evaluation.benchmarks`)."""
        ...

    @property
    def references_ranked(self) -> bool:
        """Whether its protocol leaves a query's reference in its own ranking: training may then take it for a negative."""
        ...

    def image_directory(self) -> Path | None:
        """Where its images are, when they lie where the dataset's authors put them."""
        ...

    def parts(self, images: ImageFolder | None) -> tuple[Part, ...]:
        """Everything there is, for counting."""
        ...

    def query_sets(self, split: str, options: Options, images: ImageFolder | None) -> tuple[QuerySet, ...]:
        """The queries of a split over their galleries, one set per category."""
        ...

    def describe(self, options: Options) -> str:
        """The protocol in words, for the report."""
        ...

    def training_records(self) -> tuple[TripletRecord, ...]:
        """Training triplets; reference and target are ids."""
        ...

    def training_tags(self) -> Mapping[str, tuple[str, ...]]:
        """Words that the dataset's files have for an image of the training split, by id; empty where there are none."""
        ...


def read_annotations(path: Path, kind: type[T]) -> T:
    """JSON as `kind`; keys that it does not know are the dataset's own business. Raises InputError."""
    try:
        return msgspec.json.decode(without_mark(read_regular(path)), type=kind)
    except FileNotFoundError as error:
        raise InputError(_no_file(path)) from error
    except NOT_JSON as error:
        raise InputError(f"{path}: not in the official format, get the file again: {error}") from error
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error


def ascending(ids: Iterable[str]) -> tuple[str, ...]:
    """Distinct ids in the order that breaks ties."""
    return tuple(sorted(set(ids)))


def first_folder(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if path.is_dir()), None)


_OWNERS = {"gallery": "fashioniq", "shared_concept": "circo"}
"""The options that one dataset alone has."""


def check_asked(benchmark: Benchmark, split: str, options: Options) -> None:
    """Raises InputError for a split without queries to evaluate, and for another dataset's option."""
    if split not in benchmark.splits:
        raise InputError(f"{benchmark.name}: no split {split!r} to evaluate; there are {', '.join(benchmark.splits)}")
    for name, owner in _OWNERS.items():
        if getattr(options, name) and benchmark.name != owner:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {TITLES[owner]}'s, and {TITLES[benchmark.name]} has nothing of the kind; leave {option} out")


def check_complete(parts: Iterable[Part]) -> None:
    """Raises InputError for the first annotation file that is missing."""
    if absent := [path for part in parts for path in part.absent]:
        raise InputError(_no_file(absent[0]))


def _no_file(path: Path) -> str:
    return f"{path}: no such annotation file; docs/datasets.md shows the folders"
