"""What a dataset folder holds and lacks: counts, captions without words, images that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..image_folder import ImageFolder
from .base import Benchmark, BlankCaption, Part

_SHOWN = 5


@dataclass(frozen=True)
class PartCheck:
    """missing: ids of the part's images that have no file; affected: queries that name one of them."""

    part: Part
    missing: tuple[str, ...] = ()
    affected: int = 0


@dataclass(frozen=True)
class DatasetCheck:
    benchmark: Benchmark
    images: ImageFolder | None
    parts: tuple[PartCheck, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of all parts, each once, ascending."""
        return tuple(sorted({id for check in self.parts for id in check.missing}))


def check_dataset(benchmark: Benchmark, images: Path | None = None) -> DatasetCheck:
    """Read every annotation file, and look every image up once. `images`: the folder, where it is not the usual one.

    Raises InputError for annotations that are not in the official format.
    """
    root = images or benchmark.image_directory()
    folder = None if root is None else ImageFolder.scan(root)
    return DatasetCheck(benchmark, folder, tuple(_check_part(part, folder) for part in benchmark.parts(folder)))


def _check_part(part: Part, images: ImageFolder | None) -> PartCheck:
    if images is None:
        return PartCheck(part)
    missing = images.missing(part.images)
    gone = set(missing)
    return PartCheck(part, missing, sum(not gone.isdisjoint(query.images) for query in part.queries or ()))


def describe(check: DatasetCheck) -> list[str]:
    """The report, line by line: a table of counts, then what needs attention."""
    galleries = list(dict.fromkeys(name for c in check.parts for name in c.part.galleries))
    head = ["split", "category", "triplets", *(f"gallery {name}" for name in galleries), "empty captions"]
    rows = [head]
    for c in check.parts:
        part = c.part
        counts = [str(len(part.galleries[name])) if name in part.galleries else "-" for name in galleries]
        empty = "-" if part.queries is None else str(sum(blank.empty for blank in part.blank))
        rows.append([part.split, part.category or "-", "-" if part.queries is None else str(len(part.queries)), *counts, empty])
    lines = [f"{check.benchmark.name}: {check.benchmark.directory}", *_table(rows)]
    if not galleries:
        lines.append("gallery: nothing lists it; add COCO's image_info_unlabeled2017.json, or give --images")
    for c in check.parts:
        lines += [f"{_label(c.part)}: not there: {path}" for path in c.part.absent]
        lines += _answer_lines(c.part) + _blank_lines(c.part)
    return lines + _image_lines(check)


def _label(part: Part) -> str:
    return f"{part.split} {part.category}".strip()


def _answer_lines(part: Part) -> list[str]:
    answers = [len(query.targets) for query in part.queries or () if query.targets]
    if max(answers, default=0) < 2:
        return []
    mean = sum(answers) / len(answers)
    return [f"{_label(part)}: {mean:.2f} ground truths a query, {min(answers)} to {max(answers)}"]


def _blank_lines(part: Part) -> list[str]:
    def shown(blank: Sequence[BlankCaption]) -> str:
        return _some([b.query if b.empty else f"{b.query} {b.caption.strip()!r}" for b in blank])

    groups = (
        ([b for b in part.blank if b.empty], "empty captions"),
        ([b for b in part.blank if not b.empty], "captions of punctuation alone"),
    )
    lines = [f"{_label(part)}: {what} ({len(blank)}): {shown(blank)}" for blank, what in groups if blank]
    wordless = [query.id for query in part.queries or () if query.wordless]
    if wordless:
        lines.append(f"{_label(part)}: queries without any word, for which models read '.' ({len(wordless)}): {_some(wordless)}")
    return lines


def _image_lines(check: DatasetCheck) -> list[str]:
    if check.images is None:
        return ["images: none given; say where they are with --images DIR"]
    lines = [f"images: {len(check.images)} under {check.images.root}, {len(check.missing)} missing"]
    for c in check.parts:
        if c.missing:
            queries = "" if c.part.queries is None else f", which {c.affected} of {len(c.part.queries)} triplets need"
            lines.append(f"{_label(c.part)}: {len(c.missing)} of {len(c.part.images)} images missing{queries}: {_some(c.missing)}")
    return lines


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    left = 2  # split and category are words, the others numbers
    return [
        "  ".join(cell.ljust(w) if column < left else cell.rjust(w) for column, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
