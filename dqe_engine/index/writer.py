"""`Writer`: the rows of an index while they change, and what a save writes. One thread at a time; readers have snapshots."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import IndexFormatError

from . import storage as disk
from .columns import Column, Rows, ScreenCache
from .snapshot import Snapshot
from .storage import DTYPES, Event, FileState, ImageStorage, IndexManifest, Storage
from .table import Live, Table

SCREENED_BYTES = 256 << 20
COMPACTED_ROWS = 1024
"""Of rows that were never saved: so many removed ones, and more than there are items, are compacted at once."""


class Layout(msgspec.Struct, frozen=True):
    """What all rows of an index have in common: the model they come from, `target_shape` (M, D), `image_shape` (P, Hv), and precisions."""

    model_hash: str
    target_shape: tuple[int, int]
    image_shape: tuple[int, int]
    storage: Storage
    image_storage: ImageStorage

    @classmethod
    def of(cls, manifest: IndexManifest) -> Layout:
        return cls(manifest.model_hash, manifest.target_shape, manifest.image_shape, manifest.storage, manifest.image_storage)

    def columns(self) -> tuple[Column, Column | None]:
        """Empty ones, for target tokens and for image tokens where they are kept."""
        images = None if self.image_storage == "none" else Column(self.image_shape, DTYPES[self.image_storage])
        return Column(self.target_shape, DTYPES[self.storage]), images


class Writer:
    """`unsaved`: changes since the last save. `saved`: the manifest of that save; None before the first. `attempted`: the revision of a
    save since that failed, though its manifest may have landed.

    `mapped`: whether saved tokens are memory-mapped or read into memory.
    """

    def __init__(self, layout: Layout, *, mapped: bool = True) -> None:
        self.layout, self.mapped = layout, mapped
        self.unsaved: list[Event] = []
        self.saved: IndexManifest | None = None
        self.attempted: str | None = None
        self._table, self._live, self._screens = Table(), Live(), ScreenCache()
        self._targets, self._images = layout.columns()

    @classmethod
    def open(cls, root: Path, manifest: IndexManifest, *, verify: bool = False, mapped: bool = True) -> Writer:
        """The rows that a manifest confirms. Raises IndexFormatError, and OSError for files that cannot be read."""
        writer = cls(Layout.of(manifest), mapped=mapped)
        writer._replay(root, manifest, disk.read_events(root, manifest.catalogue), verify=verify)
        return writer

    @property
    def screen_bytes(self) -> int:
        return self._screens.nbytes

    def snapshot(self, screened: bool | None) -> Snapshot:
        """The rows as they are now. `screened`: see `GalleryIndex`."""
        targets, images = self._targets.shards(), None if self._images is None else self._images.shards()
        wanted = sum(shard.nbytes for shard in targets) <= SCREENED_BYTES if screened is None else screened
        screens = self._screens if wanted else None
        saved = None if self.unsaved else self.saved
        revision, generation = (None, None) if saved is None else (saved.revision, Path(saved.catalogue.name).stem)
        rows, live = len(self._table), self._live
        return Snapshot(self._table, rows, live.count, live.bitmap(), targets, images, screens, revision, generation)

    def put(
        self,
        ids: Sequence[str],
        targets: Rows,
        images: Rows | None,
        metadata: Sequence[dict[str, Any] | None],
        contents: Sequence[str | None],
    ) -> None:
        """Append rows in the layout's precisions; those of the same ids are gone."""
        self._targets.reserve(len(ids))  # what may run out of memory comes first
        if self._images is not None and images is not None:
            self._images.reserve(len(ids))
        self.remove(ids)
        self._targets.append(targets)
        if self._images is not None and images is not None:
            self._images.append(images)
        self._table.append(ids, metadata, contents)
        self._live.append(len(ids))
        self.unsaved += self._additions(range(len(self._table) - len(ids), len(self._table)))
        self._compact_if_worth_it()

    def put_metadata(self, ids: Sequence[str], metadata: Sequence[dict[str, Any] | None]) -> None:
        """Other metadata for ids that are there, in rows of their own."""
        rows = [row for id in ids if (row := self._table.row_of(id, len(self._table))) is not None]
        targets, images = self._copied(np.array(rows, np.int64))
        self.put(ids, targets.rows(), None if images is None else images.rows(), metadata, [self._table.contents[row] for row in rows])

    def remove(self, ids: Iterable[str]) -> None:
        """The rows of these ids are gone, where they have one."""
        rows = [row for id in ids if (row := self._table.row_of(id, len(self._table))) is not None and self._live[row]]
        self._live.remove(rows)
        self.unsaved += [Event(removed=row) for row in rows]

    def compact(self) -> None:
        """Drop the rows that are gone. For rows that were never saved."""
        assert self.saved is None
        rows = self._live.rows()
        columns = self._copied(rows)
        self._keep(rows)
        self._targets, self._images = columns
        self.unsaved = self._additions(range(len(self._table)))

    @property
    def is_sparse(self) -> bool:
        """Whether most rows are gone."""
        return 2 * self._live.count < len(self._table)

    def _compact_if_worth_it(self) -> None:
        """Rows that came since the last save, and are gone, are dropped once there are many."""
        start = 0 if self.saved is None else self.saved.rows
        there = self._live.count_from(start)
        if len(self._table) - start - there <= max(COMPACTED_ROWS, there):
            return
        if self.saved is None:
            self.compact()
        else:
            self._compact_since_the_save(start)

    def _compact_since_the_save(self, start: int) -> None:
        """What is saved keeps its numbers, as its files do."""
        rows, saved = self._live.rows(), np.arange(start)
        tail = rows[rows >= start]
        removed = [event for event in self.unsaved if event.removed is not None and event.removed < start]
        targets = self._targets.followed_by(self._targets.taken(tail).rows())
        images = None if self._images is None else self._images.followed_by(self._images.taken(tail).rows())
        self._keep(np.concatenate([saved, tail]))
        self._live.remove(np.setdiff1d(saved, rows).tolist())
        self._targets, self._images = targets, images
        self.unsaved = [*removed, *self._additions(range(start, len(self._table)))]

    def _additions(self, rows: Iterable[int]) -> list[Event]:
        table = self._table
        return [Event(id=table.ids[row], metadata=table.metadata[row], content=table.contents[row]) for row in rows]

    def _copied(self, rows: NDArray[np.int64]) -> tuple[Column, Column | None]:
        return self._targets.taken(rows), None if self._images is None else self._images.taken(rows)

    def _keep(self, rows: NDArray[np.int64]) -> None:
        """Number these rows anew, in all but the columns of tokens; all or nothing, should memory run out."""
        before, table, at = self._table, Table(), rows.tolist()
        table.append([before.ids[row] for row in at], [before.metadata[row] for row in at], [before.contents[row] for row in at])
        live, screens = Live(len(at)), self._screens.taken(rows)
        self._table, self._live, self._screens = table, live, screens

    # -- the disk; all raise IndexFormatError, and OSError where it refuses ------------------------------------------------------

    def follow(self, root: Path, manifest: IndexManifest) -> None:
        """Take over what another process saved since. There must be nothing unsaved."""
        ours = self.saved
        assert ours is not None
        assert not self.unsaved
        if manifest.catalogue.name == ours.catalogue.name and manifest.rows >= ours.rows:
            self._replay(root, manifest, disk.read_events(root, manifest.catalogue, since=ours.catalogue))
        else:
            other = Writer.open(root, manifest, mapped=self.mapped)
            self._table, self._live, self._screens = other._table, other._live, other._screens
            self._targets, self._images, self.saved = other._targets, other._images, other.saved

    def append(self, root: Path) -> None:
        """Save by appending what is new to the files of the last save."""
        ours = self.saved
        assert ours is not None
        images = ours.images
        if images is not None and self._images is not None:
            images = disk.extend(root, images, self._images.since(ours.rows))
        manifest = msgspec.structs.replace(
            ours,
            schema_version=disk.SCHEMA_VERSION,
            revision=disk.new_revision(),
            rows=len(self._table),
            catalogue=disk.extend(root, ours.catalogue, [self._encoded(self.unsaved, range(ours.rows, len(self._table)))]),
            targets=disk.extend(root, ours.targets, self._targets.since(ours.rows)),
            images=images,
        )
        self.attempted = manifest.revision
        disk.write_manifest(root, manifest)  # the moment from which the save counts; memory follows
        self._settle(manifest, self._files(root, manifest))

    def write_generation(self, root: Path) -> None:
        """Save the rows that are there, alone, in new files."""
        rows, layout = self._live.rows(), self.layout
        events = self._additions(rows.tolist())
        generation = disk.new_revision()[:8]
        targets, images = self._targets, self._images
        manifest = IndexManifest(
            model_hash=layout.model_hash,
            revision=disk.new_revision(),
            rows=len(rows),
            storage=layout.storage,
            image_storage=layout.image_storage,
            target_shape=layout.target_shape,
            image_shape=layout.image_shape,
            catalogue=disk.extend(root, FileState(name=f"{generation}.catalogue"), [self._encoded(events, rows.tolist())]),
            targets=disk.extend(root, FileState(name=f"{generation}.targets"), (targets[row] for row in rows)),
            images=None if images is None else disk.extend(root, FileState(name=f"{generation}.images"), (images[row] for row in rows)),
        )
        self.attempted = manifest.revision
        disk.write_manifest(root, manifest)  # as in `append`
        columns = self._files(root, manifest)
        if len(rows) != len(self._table):
            self._keep(rows)
        self._settle(manifest, columns)

    def _encoded(self, events: Sequence[Event], rows: Iterable[int]) -> bytes:
        """Catalogue lines of events that add these rows, in their order, each with its row's checksum."""
        row = iter(rows)
        return disk.encode_events(
            [event if event.id is None else msgspec.structs.replace(event, crc32=self._checksum(next(row))) for event in events]
        )

    def _checksum(self, row: int) -> int:
        crc = zlib.crc32(self._targets[row].data)
        return crc if self._images is None else zlib.crc32(self._images[row].data, crc)

    def _replay(self, root: Path, manifest: IndexManifest, events: Sequence[Event], *, verify: bool = False) -> None:
        """Follow a catalogue that goes on after the rows that are known, all or nothing of it."""
        start = len(self._table)
        live: dict[str, bool] = {}  # of the ids that these events speak of
        ids: list[str] = []
        metadata: list[dict[str, Any] | None] = []
        contents: list[str | None] = []
        removed: set[int] = set()

        def is_live(id: str) -> bool:
            row = self._table.row_of(id, start)
            return live.get(id, row is not None and self._live[row])

        for event in events:
            if event.id is not None and not is_live(event.id):
                live[event.id] = True
                ids.append(event.id)
                metadata.append(event.metadata)
                contents.append(event.content)
                continue
            row = event.removed
            known = row is not None and 0 <= row < start + len(ids) and row not in removed and (row >= start or self._live[row])
            if event.id is not None or row is None or not known:
                raise IndexFormatError(f"{root}: the catalogue contradicts itself at {event}; restore it from a copy or index again")
            removed.add(row)
            live[self._table.ids[row] if row < start else ids[row - start]] = False
        if start + len(ids) != manifest.rows or (manifest.images is None) != (manifest.image_storage == "none"):
            raise IndexFormatError(f"{root}: the manifest and the catalogue disagree; restore it from a copy or index again")
        columns = self._files(root, manifest, verify=verify)
        self._table.append(ids, metadata, contents)
        self._live.append(len(ids))
        self._live.remove(removed)
        self._settle(manifest, columns)

    def _files(self, root: Path, manifest: IndexManifest, *, verify: bool = False) -> tuple[Column, Column | None]:
        """The tokens that the manifest confirms."""

        def column(state: FileState, shape: tuple[int, int], storage: str) -> Column:
            rows = disk.map_rows(root, state, manifest.rows, shape, storage, verify=verify)
            return Column(shape, DTYPES[storage], rows if self.mapped else np.array(rows))

        targets = column(manifest.targets, self.layout.target_shape, self.layout.storage)
        return targets, None if manifest.images is None else column(manifest.images, self.layout.image_shape, self.layout.image_storage)

    def _settle(self, manifest: IndexManifest, columns: tuple[Column, Column | None]) -> None:
        self._targets, self._images = columns
        self.unsaved, self.saved, self.attempted = [], manifest, None
