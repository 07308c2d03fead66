"""`GalleryIndex`: what can be retrieved. Exact MaxSim search over target tokens, by way of `dqe_engine.zones`."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import IndexConflictError, IndexFormatError, InputError
from dqe_engine.forks import NotPickled
from dqe_engine.zones.arrays import F32

from . import storage as disk
from .filters import Filter
from .items import checked_items
from .repair import RepairReport, repair
from .saving import save
from .searched import InProcess
from .snapshot import IndexMatches, Item, Snapshot
from .storage import DTYPES, ImageStorage, IndexManifest, Storage
from .validation import (
    check_known,
    check_model,
    check_no_single_str,
    check_search,
    checked_metadata,
    quoted,
)
from .writer import Layout, Writer

Metadata = Mapping[str, Any]


class IndexStats(msgspec.Struct, frozen=True):
    """`removed`: rows of removed and replaced items, until compaction. Bytes: of target and image tokens, wherever they lie, and of the
    screen so far. `unsaved`: changes since the last save. `path` and `revision`: of the save that this index was loaded from or made."""

    items: int
    removed: int
    target_bytes: int
    image_bytes: int
    screen_bytes: int
    unsaved: int
    path: str | None
    revision: str | None


class GalleryIndex(NotPickled, InProcess):
    """Items under string ids, each with target tokens (M, D) and, where `image_storage` says so, image tokens (P, Hv).

    `storage`: precision of the target tokens; "f16" halves memory and moves scores by about 5e-4. `image_storage`: cached
    image tokens spare a catalogue reference the vision encoder; "f16" rounds them to 11 bits, so the composed query
    differs from the uncached one by about 1e-3; "none" stores no image tokens, for large galleries (P * Hv values each).
    `screened`: keep an 8-bit copy of the target tokens in memory (a quarter of float32), made at the first search: results
    stay exact, and searches take a fraction of the time (`dqe_engine.zones.Screen`). None: only if the target tokens take at most
    `SCREENED_BYTES`.

    Every change makes a new `Snapshot`; searches and reads take the present one and never wait, whoever adds, removes or saves
    meanwhile. Other processes that have loaded the same index follow by `refresh`. A context manager: see `close`.
    """

    instead = "save it, and load it in the other process by its path"

    def __init__(
        self,
        *,
        model_hash: str,
        target_shape: tuple[int, int],
        image_shape: tuple[int, int],
        storage: Storage = "f32",
        image_storage: ImageStorage = "none",
        screened: bool | None = None,
    ) -> None:
        """`target_shape`: (M, D); `image_shape`: (P, Hv). Raises InputError for an unknown storage."""
        if storage not in DTYPES or image_storage not in ("none", *DTYPES):
            raise InputError(f"storage is f32 or f16 and image_storage none, f16 or f32; got {storage!r} and {image_storage!r}")
        self._start(Writer(Layout(model_hash, target_shape, image_shape, storage, image_storage)), None, screened)

    def _start(self, writer: Writer, path: Path | None, screened: bool | None) -> None:
        layout = writer.layout
        self.model_hash, self.target_shape, self.image_shape = layout.model_hash, layout.target_shape, layout.image_shape
        self.storage, self.image_storage = layout.storage, layout.image_storage
        self._lock = threading.RLock()  # one change, save or refresh at a time; guards all below but `_now`
        self._writer, self._path, self._screened, self._closed = writer, path, screened, False
        self._now = writer.snapshot(screened)  # replaced, never changed: read without a lock

    @classmethod
    def for_bundle(cls, bundle: Bundle, *, storage: Storage = "f32", image_storage: ImageStorage = "f16") -> GalleryIndex:
        """An empty index of the bundle's shapes and model hash."""
        sizes = bundle.sizes
        return cls(
            model_hash=bundle.model_hash,
            target_shape=(sizes.target_tokens, sizes.embedding_dim),
            image_shape=(sizes.image_tokens, sizes.vision_width),
            storage=storage,
            image_storage=image_storage,
        )

    def __repr__(self) -> str:
        place = "in memory" if self._path is None else f"of {self._path}"
        unsaved = f", {len(self._writer.unsaved)} changes unsaved" if self._writer.unsaved else ""
        return f"<GalleryIndex {place}: {len(self)} items, targets {self.storage}, images {self.image_storage}{unsaved}>"

    def __enter__(self) -> GalleryIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of memory and files; what was not saved is gone. Any later call raises InputError; searches that are running finish. May
        be called twice."""
        with self._lock:
            self._closed = True
            self._writer = Writer(self._writer.layout)
            self._publish()

    def __len__(self) -> int:
        return self._now.count

    def __contains__(self, id: object) -> bool:
        return self._now.row(id) is not None

    def __iter__(self) -> Iterator[Item]:
        """Items as they are now, the oldest first."""
        return self.snapshot().items()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the items, oldest first."""
        return self.snapshot().ids()

    @property
    def screened(self) -> bool | None:
        return self._screened

    @screened.setter
    def screened(self, screened: bool | None) -> None:
        with self._lock:
            self._screened = screened
            self._publish()

    def snapshot(self) -> Snapshot:
        """The index at this moment; later changes do not show in it."""
        now = self._now
        self._check_open()
        return now

    def get(self, ids: Sequence[str]) -> tuple[Item, ...]:
        """These items, in this order. Raises InputError that names up to five ids that are not in the index."""
        check_no_single_str("ids", ids)
        now = self.snapshot()
        return tuple(map(now.item, check_known(ids, map(now.row, ids))))

    def count(self, filter: Filter | None = None) -> int:
        """How many items pass the filter (see `compile_filter`). Raises InputError."""
        return self.snapshot().count_of(filter)

    def stats(self) -> IndexStats:
        with self._lock:
            now, writer = self.snapshot(), self._writer
            return IndexStats(
                items=now.count,
                removed=now.rows - now.count,
                target_bytes=sum(shard.nbytes for shard in now.targets),
                image_bytes=sum(shard.nbytes for shard in now.images or ()),
                screen_bytes=writer.screen_bytes,
                unsaved=len(writer.unsaved),
                path=None if self._path is None else str(self._path),
                revision=None if writer.saved is None else writer.saved.revision,
            )

    def image_tokens(self, id: str, *, out: F32 | None = None) -> F32:
        """The item's cached image tokens: (P, Hv) float32, written to `out` where it is given.

        Raises InputError for an unknown id, or where none are kept.
        """
        if out is None:
            out = np.empty(self.image_shape, np.float32)
        elif out.shape != self.image_shape or out.dtype != np.float32:
            raise InputError(f"out: expected {self.image_shape} float32, got {out.shape} {out.dtype}")
        now = self.snapshot()
        out[:] = now.image_tokens(now.existing(id))
        return out

    def target_tokens(self, id: str) -> F32:
        """The item's target tokens as they are searched: (M, D) float32. Raises InputError for an unknown id."""
        now = self.snapshot()
        return now.target_tokens(now.existing(id)).astype(np.float32)

    def add(
        self,
        ids: Sequence[str],
        target_tokens: F32,
        image_tokens: NDArray[Any] | None = None,
        metadata: Sequence[Metadata | None] | None = None,
        *,
        contents: Sequence[str | None] | None = None,
        replace: bool = False,
    ) -> None:
        """Add n items, all or none.

        target_tokens: (n, M, D) float32; image_tokens: (n, P, Hv) float32 or float16, given if and only if the index
        keeps them; metadata: n JSON objects or None; contents: n hashes of the images, or None (`Indexer` gives them).
        Raises InputError for arrays that do not fit or are not finite in the index's precision, metadata that JSON cannot
        hold, ids that repeat, and ids that exist; with `replace`, such items are replaced, metadata included.
        """
        new = checked_items(self._writer.layout, ids, target_tokens, image_tokens, metadata, contents)
        with self._lock:
            existing = [id for id in new.ids if id in self]
            if existing and not replace:
                raise InputError(f"{len(existing)} ids are in the index already: {quoted(existing)}; remove them or pass replace=True")
            self._check_open()
            self._writer.put(*new)
            self._publish()

    def remove(self, ids: Collection[str]) -> None:
        """Remove items, all or none. Raises InputError that names up to five ids that are not in the index."""
        check_no_single_str("ids", ids)
        with self._lock:
            self._check_known(ids)
            self._writer.remove(dict.fromkeys(ids))
            self._publish()

    def update_metadata(self, metadata: Mapping[str, Metadata | None]) -> None:
        """Give items other metadata, by id, all or none; they become the newest. Costs as much as adding them again: tokens are copied.

        Raises InputError for ids that are not in the index, and metadata that JSON cannot hold.
        """
        if not isinstance(metadata, Mapping):
            raise InputError(f"metadata: expected objects or None by id, got {type(metadata).__name__}")
        entries = [checked_metadata(id, entry) for id, entry in metadata.items()]
        with self._lock:
            self._check_known(metadata)
            self._writer.put_metadata([str.__str__(id) for id in metadata], entries)  # as in `add`
            self._publish()

    def search(
        self,
        queries: F32,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        threads: int = 0,
    ) -> tuple[IndexMatches, ...]:
        """The k best items of each query, or all there are.

        queries: (B, D) float32, unit norm; exclude: per query, ids that are no candidates (ids that are not in the index
        exclude nothing); filter: see `compile_filter`; zones: also count the zones by Δ to the query's best candidate, with
        absolute bounds, and pick `picks` items of the mid zone by the spec's policy; threads: at most, 0 for one per processor.
        Raises InputError.
        """
        check_search(queries, k, self.target_shape[1], exclude=exclude, zones=zones, picks=picks)
        return self.snapshot().search(queries, k, exclude=exclude, filter=filter, zones=zones, picks=picks, threads=threads)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Make the present contents durable in the directory `path`; once this returns, no kill can lose them.

        Saving again to the same place appends what is new. All live rows are written anew (a new generation) to a new place, and once more
        than half of the rows are removed ones. Raises IndexConflictError when `path` holds an index that this one was not loaded from or
        that another writer changed since (unless `overwrite`), and IndexFormatError when the disk refuses.
        """
        with self._lock:
            self._check_open()
            self._save(Path(path).absolute(), overwrite=overwrite)

    def compact(self) -> None:
        """Drop the rows of removed and replaced items. An index that was loaded or saved is saved in its folder, too."""
        with self._lock:
            self._check_open()
            if self._path is not None:
                self._save(self._path, overwrite=False, compact=True)
            else:
                self._writer.compact()
                self._publish()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model_hash: str | None = None,
        verify: bool = False,
        screened: bool | None = None,
        mapped: bool = True,
    ) -> GalleryIndex:
        """Open a saved index; tokens are memory-mapped, so this takes the time of reading ids and metadata.

        Sizes and the catalogue's checksum are always checked; `verify` also reads all tokens and checks theirs. `mapped=False` reads the
        tokens into memory instead of mapping them: a process dies if a file that it has mapped is overwritten (`cp new/* served/`). Raises
        IndexFormatError for a missing, damaged or newer index, and one whose model is not `model_hash`.
        """
        root, index = Path(path).absolute(), cls.__new__(cls)

        def open_(manifest: IndexManifest) -> Writer:
            if model_hash is not None:
                check_model(manifest.model_hash, model_hash, where=root)
            return Writer.open(root, manifest, verify=verify, mapped=mapped)

        writer = disk.read_with_manifest(root, open_)
        if writer is None:
            raise IndexFormatError(f"{root}: no index here (manifest.json is missing); make one with dqe-index")
        index._start(writer, root, screened)
        return index

    def refresh(self) -> bool:
        """Take over what another process saved since this index was loaded or last refreshed. Returns whether there was anything.

        What was appended is read, whatever the size of the index; a compacted one is opened anew. Searches go on meanwhile. Raises
        InputError for an index that was never saved, IndexConflictError where there are unsaved changes of its own, and what `load` does.
        """
        with self._lock:
            self._check_open()
            root, writer = self._path, self._writer
            if root is None or writer.saved is None:
                raise InputError("this index was never saved or loaded, so there is nothing to follow; save it first")
            ours = (writer.saved.revision, writer.attempted)

            def follow(manifest: IndexManifest) -> bool:
                if manifest.revision in ours:
                    return False
                if writer.unsaved:
                    raise IndexConflictError(
                        f"{root} was changed by another writer, and {len(writer.unsaved)} changes here are unsaved; load it again, "
                        "and make them again"
                    )
                check_model(manifest.model_hash, self.model_hash, where=root)
                writer.follow(root, manifest)
                self._publish()
                return True

            followed = disk.read_with_manifest(root, follow)
            if followed is None:
                raise IndexFormatError(f"{root}: the index is gone (manifest.json is missing); restore it from a copy or index again")
            return followed

    def verify(self) -> None:
        """Read all files of the saved index and compare them with their checksums. Raises IndexFormatError, and InputError for an index
        that was never saved."""
        if self._path is None:
            raise InputError("this index was never saved or loaded, so there are no files to verify; save it first")
        type(self).load(self._path, model_hash=self.model_hash, verify=True).close()

    @staticmethod
    def repair(path: str | os.PathLike[str], *, drop_damaged: bool = False) -> RepairReport:
        """Remove from a saved index what no save confirmed, read all of it, and say which items are damaged, if any.

        `drop_damaged`: also write the index anew without those. Without it they stay, and `load(verify=True)` goes on to refuse them: a
        copy may have them whole. Raises IndexFormatError where only a copy helps: the manifest or the catalogue is damaged, a file is
        missing, or tokens are in an index of a version that kept no checksums of rows.
        """
        return repair(Path(path).absolute(), drop_damaged=drop_damaged)

    def require_model(self, model_hash: str, *, where: object = "the index") -> None:
        """Raise IndexFormatError unless this index was made with the model of that hash."""
        check_model(self.model_hash, model_hash, where=where)

    # -- by the one who holds `_lock` --------------------------------------------------------------------------------------------

    def _check_known(self, ids: Collection[str]) -> None:
        check_known(ids, map(self.snapshot().row, ids))

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this index is closed; load it again")

    def _publish(self) -> None:
        """What searches see from now on."""
        self._now = self._writer.snapshot(self._screened)

    def _save(self, root: Path, *, overwrite: bool, compact: bool = False) -> None:
        if save(self._writer, root, here=self._path == root, overwrite=overwrite, compact=compact):
            self._path = root
            self._publish()
