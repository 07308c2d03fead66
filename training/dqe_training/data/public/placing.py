"""Queries and triplets onto the image files that are there: what is missing is an error, or dropped and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.vocabulary import AttributeVocabulary
from dqe_engine.errors import InputError

from ..image_folder import ImageFolder
from ..queries import WORDLESS_TEXT, QuerySet
from ..records import TripletRecord
from ..triplets import TripletData, build_triplets, read_vocabulary
from ..vocabularies import dataset_vocabulary
from .base import Benchmark
from .fashioniq_tags import tag_labels


class Coverage(Contract, frozen=True):
    """What is used of how much; both counts are equal unless missing images were allowed.

    `wordless`: how many of the queries used have no text.
    """

    queries: int
    of_queries: int
    images: int
    of_images: int
    wordless: int = 0

    @property
    def complete(self) -> bool:
        return self.queries == self.of_queries and self.images == self.of_images

    def describe(self, what: str) -> str:
        """`dropped 3 of 2017 queries (0.15 %) and 4 of 3817 gallery images (0.10 %): their images are missing`."""
        queries, images = self.of_queries - self.queries, self.of_images - self.images
        shares = 100 * queries / max(self.of_queries, 1), 100 * images / max(self.of_images, 1)
        return (
            f"dropped {queries} of {self.of_queries} {what} ({shares[0]:.2f} %) and {images} of {self.of_images} images "
            f"({shares[1]:.2f} %): these images are missing, or ones that they name"
        )


def open_images(benchmark: Benchmark, images: Path | None) -> ImageFolder:
    """The images given, or those where the dataset's authors put them. Raises InputError."""
    root = images or benchmark.image_directory()
    if root is None:
        raise InputError(f"{benchmark.directory}: no images found for {benchmark.name}; say where they are with --images DIR")
    return ImageFolder.scan(root)


def place_queries(queries: QuerySet, images: ImageFolder, *, allow_missing: bool) -> tuple[QuerySet, Coverage]:
    """The query set over the images that are there. A query goes when any image that it names is missing.

    Raises InputError where something is missing and not allowed to be, or where nothing is left.
    """
    missing = set(images.missing(queries.gallery))
    if missing and not allow_missing:
        raise InputError(_missing(queries.name, images, sorted(missing), len(queries.gallery)))
    kept = queries
    if missing:
        kept = QuerySet(
            queries.name,
            tuple(q for q in queries.queries if not missing.intersection(q.images)),
            tuple(id for id in queries.gallery if id not in missing),
        )
    if not kept.queries:
        raise InputError(
            f"{queries.name}: none of {len(queries)} queries has all its images under {images.root}; name another folder with --images"
        )
    wordless = sum(query.wordless for query in kept.queries)
    return kept, Coverage(
        queries=len(kept), of_queries=len(queries), images=len(kept.gallery), of_images=len(queries.gallery), wordless=wordless
    )


def _missing(name: str, images: ImageFolder, missing: list[str], total: int) -> str:
    shown = ", ".join(missing[:3])
    return (
        f"{images.root}: {len(missing)} of {total} images of {name} are missing, for example {shown}; "
        "dqe-data check --missing-list FILE lists them, --allow-missing goes on without"
    )


@dataclass(frozen=True)
class BenchmarkSource:
    """The training split of a public dataset, as `train_run` takes it: records whose images are files under `images`.

    `dataset` is its name, which says the vocabulary where none is given; `tags` are words that the dataset has for an image.
    `derive`: values that nothing states are derived from the texts (docs/attributes.md).
    """

    records: tuple[TripletRecord, ...]
    images: Path
    name: str
    coverage: Coverage
    dataset: str
    vocabulary: Path | None = None
    references_ranked: bool = False
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    derive: bool = True

    @classmethod
    def open(
        cls,
        benchmark: Benchmark,
        images: Path | None = None,
        *,
        vocabulary: Path | None = None,
        allow_missing: bool = False,
        derive: bool = True,
    ) -> BenchmarkSource:
        """Raises InputError: no training split, no images, or images missing without `allow_missing`."""
        records = benchmark.training_records()
        folder = open_images(benchmark, images)
        names = list(dict.fromkeys(name for r in records for name in (r.reference, r.target)))
        missing = set(folder.missing(names))
        if missing and not allow_missing:
            raise InputError(_missing(f"{benchmark.name} train", folder, sorted(missing), len(names)))
        placed = tuple(
            msgspec.structs.replace(
                r, reference=folder.names[r.reference], target=folder.names[r.target], text=r.text if r.text.strip() else WORDLESS_TEXT
            )
            for r in records
            if r.reference not in missing and r.target not in missing
        )
        coverage = Coverage(
            queries=len(placed), of_queries=len(records), images=len(names) - len(missing), of_images=len(names),
            wordless=sum(r.text == WORDLESS_TEXT for r in placed),
        )  # fmt: skip
        tags = {folder.names[image]: words for image, words in benchmark.training_tags().items() if image in folder.names}
        return cls(
            placed, folder.root, f"{benchmark.name} train", coverage, benchmark.name, vocabulary, benchmark.references_ranked, tags, derive
        )

    def read_vocabulary(self) -> AttributeVocabulary:
        """The one given, or the dataset's own."""
        return dataset_vocabulary(self.dataset) if self.vocabulary is None else read_vocabulary(self.vocabulary)

    def read(self, vocabulary: AttributeVocabulary) -> TripletData:
        """The triplets in arrays. Raises InputError."""
        return build_triplets(
            self.records, vocabulary, references_ranked=self.references_ranked, guessed=tag_labels(self.tags, vocabulary),
            derive=self.derive, where=self.name,
        )  # fmt: skip
