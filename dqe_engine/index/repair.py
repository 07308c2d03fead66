"""`repair`: make a damaged index usable without guessing. What no save confirmed goes; of what one confirmed, only rows that fail their
checksum, and only when asked."""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from dqe_engine.errors import IndexFormatError
from dqe_engine.files import open_in_place

from . import storage as disk
from .storage import DTYPES, Event, FileState, IndexManifest
from .writer import Writer


class RepairReport(msgspec.Struct, frozen=True):
    """`removed`: files that belonged to no save. `cut`: bytes behind the confirmed ones, gone now. `damaged_files`: those whose confirmed
    bytes changed. `damaged`: ids of the items whose rows lie in what changed; `dropped`: whether they are gone, and the files whole.

    Damaged files without damaged items: what changed are rows of items that were removed before."""

    removed: tuple[str, ...]
    cut: int
    damaged_files: tuple[str, ...]
    damaged: tuple[str, ...]
    dropped: bool

    @property
    def is_whole(self) -> bool:
        """Whether the index is as its checksums say now."""
        return self.dropped or not self.damaged_files


def repair(root: Path, *, drop_damaged: bool) -> RepairReport:
    """See `GalleryIndex.repair`."""
    manifest = disk.read_manifest(root)
    if manifest is None:
        raise IndexFormatError(f"{root}: no index here (manifest.json is missing); restore it from a copy")
    with disk.writing(root):
        manifest = disk.read_manifest(root) or manifest  # of whoever wrote before us
        sizes = {state.name: _size(root / state.name) for state in manifest.files}
        events = disk.read_events(root, manifest.catalogue)  # a damaged catalogue ends it here: no row can be told without it
        removed = disk.remove_orphans(root, keep=manifest)
        cut = sum(max(0, sizes[state.name] - state.size) for state in manifest.files)
        for state in manifest.files:
            if sizes[state.name] > state.size:
                _resize(root / state.name, state.size)
        files = [state for state in (manifest.targets, manifest.images) if state is not None and not _is_whole(root, state)]
        names = tuple(state.name for state in files)
        if not files:
            return RepairReport(removed, cut, (), (), False)
        damaged = _damaged_ids(root, manifest, events)
        if drop_damaged:
            for state in files:
                if sizes[state.name] < state.size:
                    _resize(root / state.name, state.size)  # with zeros, so that it can be mapped: all rows in there are damaged
            writer = Writer.open(root, manifest)
            writer.remove(damaged)
            writer.write_generation(root)
        return RepairReport(removed, cut, names, damaged, drop_damaged)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise IndexFormatError(f"{path}: missing; restore it from a copy or index again") from error


def _resize(path: Path, size: int) -> None:
    with os.fdopen(open_in_place(path, os.O_RDWR), "r+b") as stream:
        stream.truncate(size)
        os.fsync(stream.fileno())


def _is_whole(root: Path, state: FileState) -> bool:
    crc, left = 0, state.size
    with open(root / state.name, "rb") as stream:
        while left and (chunk := stream.read(min(left, 1 << 24))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return not left and crc == state.crc32


def _damaged_ids(root: Path, manifest: IndexManifest, events: list[Event]) -> tuple[str, ...]:
    """Ids of the items, oldest first, whose rows are not as they were saved."""
    added = [event for event in events if event.id is not None]
    gone = {event.removed for event in events}
    if any(event.crc32 is None for row, event in enumerate(added) if row not in gone):
        name = next(state.name for state in manifest.files[1:] if not _is_whole(root, state))
        raise IndexFormatError(
            f"{root / name}: its bytes changed (checksum differs), and this index is of a version that kept no checksums of rows; restore "
            "it from a copy or index again"
        )
    found = zip(added, _checksums(root, manifest), strict=True)
    return tuple([event.id or "" for row, (event, crc) in enumerate(found) if row not in gone and crc != event.crc32])


def _checksums(root: Path, manifest: IndexManifest) -> Iterator[int]:
    """Of each row's target tokens and image tokens, one after the other."""
    rows = [(manifest.targets, manifest.target_shape, DTYPES[manifest.storage])]
    if manifest.images is not None:
        rows.append((manifest.images, manifest.image_shape, DTYPES[manifest.image_storage]))
    with contextlib.ExitStack() as stack:
        files = [
            (stack.enter_context(open(root / state.name, "rb")), math.prod(shape) * np.dtype(dtype).itemsize)
            for state, shape, dtype in rows
        ]
        for _ in range(manifest.rows):
            crc = 0
            for stream, size in files:
                crc = zlib.crc32(stream.read(size), crc)
            yield crc
