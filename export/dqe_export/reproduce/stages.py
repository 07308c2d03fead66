"""What is made once for a model, and found again: the checkpoint of published weights, and its bundles."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dqe_engine.contracts.manifest import MANIFEST_FILE, PRECISIONS
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import InputError, ParityError
from dqe_engine.sessions import Provider
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.checkpointing.meta import META
from dqe_training.evaluation.rankers import CheckpointRanker, EngineRanker
from dqe_training.features.store import spell_bytes
from dqe_training.importing import ImportOptions, import_model

from ..bundle import ExportOptions, export_bundle
from .encoding import Opened
from .keys import content_key, key_of, software
from .source import Source
from .work import Work

Advance = Callable[[str], None]
_MARGIN = 64 << 20


class Places:
    """The folders of a run under `out`, each named by what it is made of."""

    def __init__(self, out: Path, source: Source, weights: str, work: Work, images: str, provider: str) -> None:
        """`weights`: `source_key`; `images`: a key of their bytes."""
        self.out, self.source = out, source
        self._weights, self._provider = weights, provider
        self._asked = key_of(work.ids, work.pairs, images)
        self._dataset = work.dataset

    @property
    def model(self) -> Path:
        """The checkpoint: where it was given, there."""
        if self.source.kind == "checkpoint":
            return self.source.path
        return self.out / "models" / f"{self.source.stem}-{self._weights}"

    def bundle(self, row: str) -> Path:
        if self.source.kind == "bundle":
            return self.source.path
        return self.out / "bundles" / f"{self.source.stem}-{row}-{key_of(self._weights, row, software())}"

    def encoded(self, row: str) -> Path:
        return self.out / "encoded" / f"{self._dataset}-{row}-{self._key(row)}"

    def index(self, row: str, galleries: Sequence[tuple[str, Sequence[str]]]) -> Path:
        return self.out / "indexes" / f"{self._dataset}-{row}-{key_of(self._key(row), galleries)}"

    def written(self, rows: Sequence[str]) -> int:
        """Bytes of what is there already."""
        folders = [self.model] if self.source.kind == "published" else []
        for row in rows:
            bundle = self.model if row == "pytorch" else self.bundle(row)
            folders += [bundle] if row != "pytorch" and self.source.kind != "bundle" else []
            folders += [self.encoded(row)] if (bundle / (META if row == "pytorch" else MANIFEST_FILE)).is_file() else []
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def results(self, *options: object) -> Path:
        return (
            self.out
            / "results"
            / f"{self._dataset}-{self.source.stem}-{key_of(self._weights, self._asked, self._provider, software(), *options)}"
        )

    def _key(self, row: str) -> str:
        made = self.model / META if row == "pytorch" else self.bundle(row) / MANIFEST_FILE
        return key_of(content_key(made), self._asked, self._provider, software())


def make_model(places: Places, options: ImportOptions, advance: Advance) -> None:
    """Import published weights, unless that was done."""
    if places.source.kind == "published" and not (places.model / META).is_file():
        import_model(places.source.path, places.model, options, advance=advance)


def make_bundle(places: Places, row: str, advance: Advance) -> str:
    """Export the bundle of a row, unless that was done. Returns why there is none where int8 is too far from PyTorch; raises ParityError
    for float32."""
    path = places.bundle(row)
    if (path / MANIFEST_FILE).is_file():
        return ""
    try:
        export_bundle(
            load_checkpoint(places.model), path, ExportOptions(name=places.source.stem, precision=PRECISIONS[row]),
            advance=lambda text: advance(f"{row}: {text}"),
        )  # fmt: skip
    except ParityError as error:
        if row == "f32":
            raise
        return f"no row of {row}: {error}"
    return ""


def open_row(places: Places, row: str, provider: Provider, threads: int | None) -> Opened:
    """The ranker of a row, and what it runs on."""
    if row == "pytorch":
        checkpoint = load_checkpoint(places.model)
        ranker = CheckpointRanker(checkpoint)
        return ranker, next(checkpoint.model.parameters()).device.type
    engine = RetrievalEngine.load(places.bundle(row), provider=provider, threads=threads)
    return EngineRanker(engine, image_storage="f32"), " and ".join(sorted(set(engine.providers.values())))


def needed_bytes(source: Source, work: Work, rows: Sequence[str]) -> dict[str, int]:
    """What a run from nothing writes at most, by what it is: int8's export keeps the float32 graphs beside it while it runs."""
    tokens, width = source.shape
    vectors = 4 * width * (tokens * len(work.ids) + len(work.pairs))
    served = [row for row in rows if row != "pytorch"]
    exported = 0 if source.kind == "bundle" else source.parameters * sum({"f32": 4, "int8": 6}[row] for row in served)
    return {"checkpoint": source.bytes, "bundles": exported, "vectors": vectors * len(rows), "indexes": vectors * len(served)}


def check_disk(out: Path, needed: dict[str, int], written: int = 0) -> str:
    """One line of what will be written and what is free. `written`: bytes of it that are there already. Raises InputError where the rest
    does not fit."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise InputError(f"--out {out}: {place} is no folder; choose another name")
    total, free = sum(needed.values()), shutil.disk_usage(place).free
    parts = ", ".join(f"{what} {spell_bytes(size)}" for what, size in needed.items() if size)
    if total - written + _MARGIN > free:
        raise InputError(
            f"--out {out}: up to {spell_bytes(total)} to write ({parts}), {spell_bytes(free)} free; free space, or choose another folder"
        )
    return f"disk: up to {spell_bytes(total)} in {out} ({parts}), {spell_bytes(written)} of it there; {spell_bytes(free)} free"
