"""Writes the `garments` dataset: a folder of JPEGs, image attributes and triplets, the same bytes for the same options."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from dqe_engine.contracts.parsing import Contract, parse_json, to_json
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_directory

from ..records import ImageRecord, TripletRecord, read_jsonl, write_jsonl
from .catalog import ALL_GARMENTS, Garment, is_held_out, vocabulary
from .render import render
from .texts import Modification, modify

_CHUNK = 250
_META = "dataset.json"


class GarmentsSpec(Contract, frozen=True):
    """`train_images` come from combinations that are not held out; the gallery has all of them.

    `val_queries` triplets over `gallery_images` to choose settings by, and as many others over the same gallery, which is never trained
    on, to report (`val.jsonl`, `test.jsonl`); the reference of each is itself in the gallery.
    """

    train_images: int = 12_000
    train_triplets: int = 48_000
    gallery_images: int = 5_000
    val_queries: int = 1_000
    held_out_share: float = 0.15
    image_size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train_images, self.train_triplets, self.gallery_images, self.val_queries, self.seed) < 0:
            raise ValueError("counts and the seed must not be negative")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie in [0, 1), got {self.held_out_share}")
        if self.image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {self.image_size}")


def _render_chunk(job: tuple[str, list[Garment], int, int, int, int]) -> None:
    """Worker: one chunk of a split. Image i of a split depends on (seed, split, i) alone."""
    folder, garments, start, size, seed, stream = job
    for offset, garment in enumerate(garments):
        index = start + offset
        image = render(garment, np.random.default_rng([seed, stream, index]), size=size)
        image.save(f"{folder}/{index:06d}.jpg", quality=92)


def _render_split(folder: Path, garments: list[Garment], spec: GarmentsSpec, stream: int, advance: Callable[[int], None]) -> None:
    folder.mkdir(parents=True)
    jobs = [
        (str(folder), garments[start : start + _CHUNK], start, spec.image_size, spec.seed, stream)
        for start in range(0, len(garments), _CHUNK)
    ]
    with ProcessPoolExecutor() as pool:
        for job, _ in zip(jobs, pool.map(_render_chunk, jobs), strict=True):
            advance(len(job[1]))


def _draw_garments(count: int, choices: list[Garment], rng: np.random.Generator) -> list[Garment]:
    return [choices[i] for i in rng.integers(len(choices), size=count)]


def _triplets(
    garments: list[Garment],
    names: list[str],
    count: int,
    rng: np.random.Generator,
    held_out: float,
    *,
    other_than: Sequence[TripletRecord] = (),
) -> list[TripletRecord]:
    """Triplets whose target is drawn from all the images that satisfy the text, the reference excepted. None asks what one of
    `other_than` does: the same change of the same reference, in whatever words."""
    taken = {(record.reference, _spell(record.allowed or {})) for record in other_than}
    by_garment: dict[Garment, list[int]] = defaultdict(list)
    for index, garment in enumerate(garments):
        by_garment[garment].append(index)
    records: list[TripletRecord] = []
    attempts = 0
    while len(records) < count:
        attempts += 1
        if attempts > 200 * (len(records) + 50):
            raise InputError(f"{len(garments)} images are too few to find {count} triplets among; draw more images, or ask for 0 triplets")
        source = int(rng.integers(len(garments)))
        reference = garments[source]
        change: Modification = modify(reference, rng)
        options = [change.allowed.get(name, (getattr(reference, name),)) for name in Garment._fields]
        valid = [i for values in itertools.product(*options) for i in by_garment.get(Garment(*values), ())]
        if not valid or (names[source], _spell(change.allowed)) in taken:
            continue
        target = valid[int(rng.integers(len(valid)))]
        records.append(
            TripletRecord(
                reference=names[source],
                target=names[target],
                text=change.text,
                attributes={name: getattr(garments[target], name) for name in change.named},
                allowed={name: list(values) for name, values in change.allowed.items()},
                held_out=is_held_out(garments[target], held_out),
            )
        )
    return records


def _spell(allowed: Mapping[str, Sequence[str]]) -> str:
    return repr(sorted((name, list(values)) for name, values in allowed.items()))


def _names(split: str, garments: list[Garment]) -> list[str]:
    return [f"{split}/{i:06d}.jpg" for i in range(len(garments))]


def _draw_splits(spec: GarmentsSpec) -> dict[str, list[Garment]]:
    rng = np.random.default_rng([spec.seed, 7])
    seen = [g for g in ALL_GARMENTS if not is_held_out(g, spec.held_out_share)]
    return {
        "train": _draw_garments(spec.train_images, seen, rng),
        "gallery": _draw_garments(spec.gallery_images, list(ALL_GARMENTS), rng),
    }


def _write_test(directory: Path, spec: GarmentsSpec, gallery: list[Garment]) -> None:
    """test.jsonl: queries over the gallery of val.jsonl, drawn apart from these."""
    val = read_jsonl(directory / "val.jsonl", TripletRecord)
    rng = np.random.default_rng([spec.seed, 11, 2])
    names = _names("gallery", gallery)
    write_jsonl(directory / "test.jsonl", _triplets(gallery, names, len(val), rng, spec.held_out_share, other_than=val))


def write_garments(directory: Path, spec: GarmentsSpec, *, advance: Callable[[int], None] = lambda n: None) -> Path:
    """Write the dataset to `directory` (atomically). When it is there with the same options, at most test.jsonl is added, which earlier
    versions did not write.

    Raises InputError when `directory` holds something else. `advance(n)` is called as images are done.
    """
    if directory.exists():
        meta = directory / _META
        if meta.is_file() and parse_json(GarmentsSpec, meta.read_bytes(), where=str(meta)) == spec:
            if (directory / "val.jsonl").is_file() and not (directory / "test.jsonl").is_file():
                _write_test(directory, spec, _draw_splits(spec)["gallery"])
            return directory
        raise InputError(f"{directory}: holds another dataset or other files; remove it or choose another folder")
    splits = _draw_splits(spec)
    with atomic_directory(directory) as temporary:
        images: list[ImageRecord] = []
        for stream, (split, garments) in enumerate(splits.items()):
            names = _names(split, garments)
            _render_split(temporary / "images" / split, garments, spec, stream, advance)
            images += [ImageRecord(image=n, attributes=g._asdict()) for n, g in zip(names, garments, strict=True)]
            count = spec.train_triplets if split == "train" else spec.val_queries
            if count and garments:
                records = _triplets(garments, names, count, np.random.default_rng([spec.seed, 11, stream]), spec.held_out_share)
                write_jsonl(temporary / ("train.jsonl" if split == "train" else "val.jsonl"), records)
        if (temporary / "val.jsonl").is_file():
            _write_test(temporary, spec, splits["gallery"])
        write_jsonl(temporary / "images.jsonl", images)
        (temporary / "vocabulary.json").write_bytes(to_json(vocabulary()))
        (temporary / _META).write_bytes(to_json(spec))
    return directory
