"""What a dataset's table needs: the query sets of each view, and the images and the pairs of reference and text that are encoded once for
all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dqe_engine.contracts.parsing import Contract
from dqe_engine.errors import InputError
from dqe_training.data.damage import Progress, require_readable
from dqe_training.data.image_folder import ImageFolder
from dqe_training.data.public.base import Benchmark, GalleryName, Options
from dqe_training.data.public.detect import open_benchmark
from dqe_training.data.public.placing import place_queries
from dqe_training.data.public.wording import PLAIN, Wording
from dqe_training.data.queries import Query, QuerySet
from dqe_training.features.identity import digest_images

Pair = tuple[str, str]
"""A reference and what the model reads."""
_GALLERY_OF_LIMIT = 4
"""With a limit, so many more images than queries are kept beside those that the queries need."""


class View(Contract, frozen=True):
    """One way to judge a model. `gallery`: FashionIQ's choice, "" elsewhere. `judged`: whether its answers are public here."""

    split: str
    gallery: str
    reference_kept: bool
    judged: bool

    @property
    def name(self) -> str:
        told = f"gallery `{self.gallery}`" if self.gallery else self.split
        return f"{told}, reference {'kept' if self.reference_kept else 'left out'}"


@dataclass(frozen=True)
class Seen:
    """A view and its query sets, with the name of the gallery of each: sets of one name have one gallery."""

    view: View
    sets: tuple[QuerySet, ...]
    galleries: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """`ids`: every image of a gallery, ascending. `pairs`: distinct ones, in the order of their references. `notes`: what a reader of the
    figures must know."""

    dataset: str
    folder: ImageFolder
    seen: tuple[Seen, ...]
    ids: tuple[str, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The images' files, relative to the folder."""
        return [self.folder.names[id] for id in self.ids]

    def rows(self, queries: QuerySet) -> list[int]:
        """Where each query's pair is."""
        at = {pair: row for row, pair in enumerate(self.pairs)}
        return [at[pair] for pair in _pairs(queries)]

    def block(self, start: int, stop: int, first: int) -> QuerySet:
        """The images at `start` to `stop`, and the pairs from `first` on whose reference is among them, as queries without answers."""
        ids = self.ids[start:stop]
        inside, asked = set(ids), []
        for row in range(first, len(self.pairs)):
            reference, text = self.pairs[row]
            if reference not in inside:
                break
            asked.append(Query(str(row), reference, text))
        return QuerySet(f"images {start + 1} to {stop}", tuple(asked), ids)

    def digest(self, progress: Progress) -> list[str]:
        """SHA-256 of every image, in order. Raises InputError for images that are damaged."""
        names, done = self.names, 0
        require_readable(self.folder.root, names)

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress(done, len(names))

        return digest_images(self.folder.root, names, advance=advance)


def find_annotations(dataset: str, annotations: Path | None, images: Path) -> Benchmark:
    """The dataset in the folder given, else in that of the images or the one above. Raises InputError."""
    if annotations is None:
        for folder in (images, images.parent):
            if folder.is_dir():
                try:
                    return _opened(dataset, folder)
                except InputError:
                    continue
        raise InputError(f"{images}: no annotations of {dataset} here or one folder above; give their folder with --annotations DIR")
    return _opened(dataset, annotations)


def _opened(dataset: str, folder: Path) -> Benchmark:
    benchmark = open_benchmark(folder, dataset)
    assert benchmark is not None  # it was named
    return benchmark


def plan_work(
    benchmark: Benchmark, images: Path, *, shared_concept: bool = False, wording: Wording = PLAIN, submission: bool = True,
    limit: int | None = None, allow_missing: bool = False,
) -> Work:  # fmt: skip
    """Raises InputError, one line: annotations that are missing, images that are, with their number and the first."""
    folder = ImageFolder.scan(images)
    asked = [(view, benchmark.query_sets(view.split, options, folder)) for view, options in _views(benchmark.name, shared_concept, wording)]
    asked = [(view, sets) for view, sets in asked if submission or view.judged]
    wanted = sorted({id for _, sets in asked for queries in sets for id in queries.gallery})
    if (missing := folder.missing(wanted)) and not allow_missing:
        raise InputError(
            f"{images}: {len(missing)} of {len(wanted)} images of {benchmark.name} are missing, for example {missing[0]}; "
            f"dqe-data check {benchmark.directory} --images {images} --missing-list FILE lists them, --allow-missing goes on without"
        )
    seen, notes = [], []
    for view, sets in asked:
        placed = []
        for queries in sets:
            kept, coverage = place_queries(queries, folder, allow_missing=allow_missing)
            if not coverage.complete:
                notes.append(f"{queries.name} ({view.name}): {coverage.describe('queries')}; not comparable to others' figures")
            placed.append(kept if limit is None else _limited(kept, limit))
        judged = view.judged and not any(queries.secret for queries in placed)
        if not judged and (missing or limit is not None):
            continue  # its server takes whole answers alone
        sets = tuple(placed) if view.reference_kept else tuple(map(_left_out, placed))
        galleries = tuple("_".join(filter(None, (queries.name, view.gallery))) for queries in placed)
        seen.append(Seen(view, sets, galleries))
    if limit is not None:
        notes.append(f"limited to {limit} queries a set, over part of the gallery: shows that everything runs, and no more")
    ids = tuple(sorted({id for one in seen for queries in one.sets for id in queries.gallery}))
    pairs = sorted({pair for one in seen for queries in one.sets for pair in _pairs(queries)})
    return Work(benchmark.name, folder, tuple(seen), ids, tuple(pairs), tuple(dict.fromkeys(notes)))


def _views(dataset: str, shared_concept: bool, wording: Wording) -> Iterator[tuple[View, Options]]:
    if dataset == "fashioniq":
        galleries: tuple[GalleryName, ...] = ("original", "val")
        for gallery in galleries:
            for kept in (True, False):
                yield View(split="val", gallery=gallery, reference_kept=kept, judged=True), Options(gallery=gallery, wording=wording)
        return
    kept = dataset == "circo"
    options = Options(shared_concept=shared_concept, wording=wording)
    yield View(split="val", gallery="", reference_kept=kept, judged=True), options
    yield View(split="test" if kept else "test1", gallery="", reference_kept=kept, judged=False), options


def _pairs(queries: QuerySet) -> list[Pair]:
    return [(query.reference, text) for query, text in zip(queries.queries, queries.texts, strict=True)]


def _left_out(queries: QuerySet) -> QuerySet:
    asked = tuple(query if query.exclude else replace(query, exclude=(query.reference,)) for query in queries.queries)
    return replace(queries, queries=asked)


def _limited(queries: QuerySet, limit: int) -> QuerySet:
    asked: Sequence[Query] = queries.queries[:limit]
    needed = {id for query in asked for id in query.images} | set(queries.gallery[: _GALLERY_OF_LIMIT * limit])
    return QuerySet(queries.name, tuple(asked), tuple(id for id in queries.gallery if id in needed))
