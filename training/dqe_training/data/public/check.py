"""What a dataset folder holds and lacks: counts, captions without words, images that are missing or damaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..damage import Progress, find_damaged
from ..image_folder import ImageFolder
from .base import Benchmark, BlankCaption, Part

_SHOWN = 5


@dataclass(frozen=True)
class PartCheck:
    """missing: ids of the part's images that have no file; damaged: those whose file cannot be read."""

    part: Part
    missing: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetCheck:
    benchmark: Benchmark
    images: ImageFolder | None
    parts: tuple[PartCheck, ...]
    damage: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with each damaged image, by id."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of all parts, each once, ascending."""
        return tuple(sorted({id for check in self.parts for id in check.missing}))

    @property
    def damaged_files(self) -> tuple[Path, ...]:
        """By id, ascending."""
        return () if self.images is None else tuple(self.images.root / self.images.names[id] for id in sorted(self.damage))


def check_dataset(
    benchmark: Benchmark,
    images: Path | None = None,
    *,
    decode: bool = False,
    progress: Progress = lambda done, total: None,
) -> DatasetCheck:
    """Read every annotation file, and look every image that one names up once. `images`: the folder, where it is not the usual one.

    `decode` and `progress`: see `find_damaged`. Raises InputError for annotations that are not in the official format.
    """
    root = images or benchmark.image_directory()
    folder = None if root is None else ImageFolder.scan(root)
    parts = benchmark.parts(folder)
    if folder is None:
        return DatasetCheck(benchmark, None, tuple(map(PartCheck, parts)))
    ids = [id for id in dict.fromkeys(id for part in parts for id in part.images) if id in folder]
    damaged = find_damaged(folder.root, [folder.names[id] for id in ids], decode=decode, progress=progress)
    damage = {id: damaged[folder.names[id]] for id in ids if folder.names[id] in damaged}
    checks = [PartCheck(part, folder.missing(part.images), tuple(id for id in part.images if id in damage)) for part in parts]
    return DatasetCheck(benchmark, folder, tuple(checks), damage)


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
    counts = f"{len(check.missing)} missing, {len(check.damage)} damaged"
    lines = [f"images: {len(check.images)} under {check.images.root}, {counts}"]
    for c in check.parts:
        lines += _lacking(c.part, "missing", c.missing, _some(c.missing))
        lines += _lacking(c.part, "damaged", c.damaged, _some([f"{id} ({check.damage[id]})" for id in c.damaged]))
    return lines


def _lacking(part: Part, what: str, ids: Sequence[str], shown: str) -> list[str]:
    """`val dress: 2 of 20 images missing, which 5 of 8 triplets need: …`."""
    if not ids:
        return []
    gone = set(ids)
    affected = sum(not gone.isdisjoint(query.images) for query in part.queries or ())
    queries = "" if part.queries is None else f", which {affected} of {len(part.queries)} triplets need"
    return [f"{_label(part)}: {len(ids)} of {len(part.images)} images {what}{queries}: {shown}"]


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
