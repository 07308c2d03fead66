"""`GalleryIndex`: what can be retrieved. Exact MaxSim search over target tokens, by way of `dqe_engine.zones`."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.bundle import Bundle
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import IndexConflictError, IndexFormatError, InputError
from dqe_engine.files import describe_os_error

from . import storage as disk
from .columns import Column, ScreenCache
from .filters import Filter
from .searching import IndexMatches, Snapshot, search_snapshot
from .storage import DTYPES, Event, FileState, ImageStorage, IndexManifest, Storage
from .validation import check_count, check_ids, check_no_single_str, checked_metadata, checked_rows, some

Metadata = Mapping[str, Any]
SCREENED_BYTES = 256 << 20
F32 = NDArray[np.float32]


class GalleryIndex:
    """Items under string ids, each with target tokens (M, D) and, where `image_storage` says so, image tokens (P, Hv).

    `storage`: precision of the target tokens; "f16" halves memory and moves scores by about 5e-4. `image_storage`: cached
    image tokens spare a catalogue reference the vision encoder; "f16" rounds them to 11 bits, so the composed query
    differs from the uncached one by about 1e-3; "none" stores no image tokens, for large galleries (P * Hv values each).
    `screened`: keep an 8-bit copy of the target tokens in memory (a quarter of float32), made at the first search: results
    stay exact, and searches take a fraction of the time (`dqe_engine.zones.Screen`). None: while the target tokens take at most
    `SCREENED_BYTES`, so that no memory is taken that anybody would miss.

    Threads may search while one adds, removes or saves: a search sees the index as it was when the search began.
    """

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
        self.model_hash = model_hash
        self.target_shape, self.image_shape = target_shape, image_shape
        self.storage, self.image_storage = storage, image_storage
        self._state = threading.RLock()  # brief: guards the attributes below
        self._writer = threading.RLock()  # long: one add, remove or save at a time; taken before _state
        self.screened = screened
        self._screen = ScreenCache()
        self._views: dict[bool | None, Snapshot] = {}  # by `screened`, while nothing has changed since
        self._changes = 0
        self._targets, self._images = self._columns()
        self._ids: list[str] = []  # by position; a removed item keeps its position until compaction
        self._metadata: list[dict[str, Any] | None] = []
        self._positions: dict[str, int] = {}  # live ids
        self._dead: set[int] = set()
        self._unsaved: list[Event] = []
        self._saved: tuple[Path, IndexManifest] | None = None

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

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, id: object) -> bool:
        return id in self._positions

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the items, oldest first."""
        with self._state:
            return tuple(self._positions)

    def image_tokens(self, id: str, *, out: F32 | None = None) -> F32:
        """The item's cached image tokens: (P, Hv) float32, written to `out` where it is given.

        Raises InputError for an unknown id, or where none are kept.
        """
        if out is None:
            out = np.empty(self.image_shape, np.float32)
        elif out.shape != self.image_shape or out.dtype != np.float32:
            raise InputError(f"out: expected {self.image_shape} float32, got {out.shape} {out.dtype}")
        with self._state:
            if id not in self._positions:
                raise InputError(f"{id!r} is not in the index")
            if self._images is None:
                raise InputError(f"the index keeps no image tokens, so {id!r} cannot be a reference by id; pass its image instead")
            tokens = self._images[self._positions[id]]
        out[:] = tokens  # outside of the lock: it may be read from the disk
        return out

    def target_tokens(self, id: str) -> F32:
        """The item's target tokens as they are searched: (M, D) float32. Raises InputError for an unknown id."""
        with self._state:
            if id not in self._positions:
                raise InputError(f"{id!r} is not in the index")
            tokens = self._targets[self._positions[id]]
        return tokens.astype(np.float32)

    def add(
        self,
        ids: Sequence[str],
        target_tokens: F32,
        image_tokens: NDArray[Any] | None = None,
        metadata: Sequence[Metadata | None] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Add n items, all or none.

        target_tokens: (n, M, D) float32; image_tokens: (n, P, Hv) float32 or float16, given if and only if the index
        keeps them; metadata: n JSON objects or None. Raises InputError for arrays that do not fit or are not finite in
        the index's precision, metadata that JSON cannot hold, ids that repeat, and ids that exist unless `replace`.
        """
        check_no_single_str("ids", ids)
        ids = [str.__str__(id) if isinstance(id, str) else id for id in ids]  # of `np.str_` too, which JSON would not take
        check_ids(ids)
        targets = checked_rows("target_tokens", target_tokens, (len(ids), *self.target_shape), DTYPES[self.storage])
        if (image_tokens is None) != (self.image_storage == "none"):
            kept = "keeps no image tokens" if self.image_storage == "none" else "keeps image tokens, and none were given"
            raise InputError(f"this index {kept}; image_storage is chosen when an index is made")
        images = None
        if image_tokens is not None:
            images = checked_rows("image_tokens", image_tokens, (len(ids), *self.image_shape), DTYPES[self.image_storage])
        if metadata is not None and len(metadata) != len(ids):
            raise InputError(f"{len(metadata)} metadata entries for {len(ids)} ids")
        entries = [checked_metadata(id, entry) for id, entry in zip(ids, metadata or [None] * len(ids), strict=True)]
        with self._writer, self._state:
            existing = [id for id in ids if id in self._positions]
            if existing and not replace:
                raise InputError(f"{len(existing)} ids are in the index already: {some(existing)}; remove them or pass replace=True")
            self._kill(existing)
            self._targets.append(targets)
            self._changed()
            if self._images is not None and images is not None:
                self._images.append(images)
            for id, entry in zip(ids, entries, strict=True):
                self._positions[id] = len(self._ids)
                self._ids.append(id)
                self._metadata.append(entry)
                self._unsaved.append(Event(id=id, metadata=entry))

    def remove(self, ids: Collection[str]) -> None:
        """Remove items, all or none. Raises InputError that names up to five ids that are not in the index."""
        check_no_single_str("ids", ids)
        with self._writer, self._state:
            unknown = [id for id in ids if id not in self._positions]
            if unknown:
                raise InputError(f"{len(unknown)} ids are not in the index: {some(unknown)}")
            self._kill(dict.fromkeys(ids))

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
        exclude nothing); filter: see `compile_filter`, and what passed one is remembered until the index changes; zones: also
        count the zones by Δ to the query's best candidate, with absolute bounds, and pick `picks` items of the mid zone by the
        spec's policy; threads: at most, 0 for one per processor. Raises InputError.
        """
        if queries.ndim != 2 or queries.shape[1] != self.target_shape[1] or queries.dtype != np.float32:
            raise InputError(f"expected queries of shape (B, {self.target_shape[1]}) float32, got {queries.shape} {queries.dtype}")
        check_count("k", k, 1)
        check_count("picks", picks, 0)
        if picks and zones is None:
            raise InputError("picks need zones: pass zones=ZoneSpec(lo=..., hi=...)")
        if zones is not None and zones.bounds != "absolute":
            raise InputError(
                f"zones with {zones.bounds} bounds: a search has no target, and Δ starts from its own best hit; give absolute bounds"
            )
        if exclude is not None and len(exclude) != len(queries):
            raise InputError(f"{len(exclude)} exclusions for {len(queries)} queries")
        for ids in exclude or ():
            check_no_single_str("exclude", ids)
        view, excluded = self._snapshot(exclude if exclude is not None else [()] * len(queries))
        return search_snapshot(view, queries, k, excluded=excluded, filter=filter, zones=zones, picks=picks, threads=threads)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Make the present contents durable in the directory `path`; once this returns, no kill can lose them.

        Saving again to the same place appends what is new. More than half of the rows removed, or a new place: a new
        generation with the live rows only. Raises IndexConflictError when `path` holds an index that this one was not
        loaded from or that another writer changed since (unless `overwrite`), and IndexFormatError when the disk refuses.
        """
        root = Path(path).absolute()
        with self._writer, disk.writing(root):
            current = disk.read_manifest_to_replace(root) if overwrite else disk.read_manifest(root)
            ours = self._saved[1] if self._saved is not None and self._saved[0] == root else None
            known = current is not None and ours is not None and current.revision == ours.revision
            if current is not None and not known and not overwrite:
                reason = "was changed by another writer: load it again" if ours else "holds another index: choose another path"
                raise IndexConflictError(f"{root} {reason}, or pass overwrite=True")
            if known and not self._unsaved:
                return
            disk.remove_orphans(root, keep=current)
            if known and ours is not None and 2 * len(self._dead) <= len(self._ids):
                self._append(root, ours)
            else:
                self._write_generation(root)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, model_hash: str | None = None, verify: bool = False, screened: bool | None = None
    ) -> GalleryIndex:
        """Open a saved index; tokens are memory-mapped, so this takes the time of reading ids and metadata.

        Sizes and the catalogue's checksum are always held; `verify` also reads all tokens and holds theirs. Raises
        IndexFormatError for a missing, damaged or newer index, and one whose model is not `model_hash`.
        """
        root = Path(path).absolute()
        manifest = disk.read_manifest(root)
        while manifest is not None:
            try:
                return cls._open(root, manifest, model_hash, verify, screened)
            except OSError as error:  # a writer may have compacted twice between our two reads: look again
                newer = disk.read_manifest(root)
                if newer == manifest:
                    if isinstance(error, FileNotFoundError):
                        raise IndexFormatError(f"{error.filename}: missing; restore it from a copy or index again") from error
                    raise IndexFormatError(describe_os_error(error)) from error
                manifest = newer
        raise IndexFormatError(f"{root}: no index here (manifest.json is missing); make one with dqe-index")

    def require_model(self, model_hash: str, *, where: object = "the index") -> None:
        """Raise IndexFormatError unless this index was made with the model of that hash."""
        if self.model_hash != model_hash:
            raise IndexFormatError(
                f"{where} was made with model {self.model_hash[:12]}, this bundle is {model_hash[:12]}; index the images again with it"
            )

    @classmethod
    def _open(cls, root: Path, manifest: IndexManifest, model_hash: str | None, verify: bool, screened: bool | None) -> GalleryIndex:
        index = cls(
            model_hash=manifest.model_hash,
            target_shape=manifest.target_shape,
            image_shape=manifest.image_shape,
            storage=manifest.storage,
            image_storage=manifest.image_storage,
            screened=screened,
        )
        if model_hash is not None:
            index.require_model(model_hash, where=root)
        for event in disk.read_events(root, manifest.catalogue):
            if event.id is not None and event.id not in index._positions:
                index._positions[event.id] = len(index._ids)
                index._ids.append(event.id)
                index._metadata.append(event.metadata)
            elif event.removed is not None and 0 <= event.removed < len(index._ids) and event.removed not in index._dead:
                index._dead.add(event.removed)
                del index._positions[index._ids[event.removed]]
            else:
                raise IndexFormatError(f"{root}: the catalogue contradicts itself at {event}; restore it from a copy or index again")
        if len(index._ids) != manifest.rows or (manifest.images is None) != (manifest.image_storage == "none"):
            raise IndexFormatError(f"{root}: the manifest and the catalogue disagree; restore it from a copy or index again")
        index._targets, index._images = index._mapped_columns(root, manifest, verify=verify)
        index._saved = (root, manifest)
        return index

    def _columns(self) -> tuple[Column, Column | None]:
        images = None if self.image_storage == "none" else Column(self.image_shape, DTYPES[self.image_storage])
        return Column(self.target_shape, DTYPES[self.storage]), images

    def _mapped_columns(self, root: Path, manifest: IndexManifest, *, verify: bool = False) -> tuple[Column, Column | None]:
        def column(state: FileState, shape: tuple[int, int], storage: str) -> Column:
            return Column(shape, DTYPES[storage], disk.map_rows(root, state, manifest.rows, shape, storage, verify=verify))

        images = None if manifest.images is None else column(manifest.images, self.image_shape, self.image_storage)
        return column(manifest.targets, self.target_shape, self.storage), images

    def _kill(self, ids: Iterable[str]) -> None:
        for id in ids:
            position = self._positions.pop(id)
            self._dead.add(position)
            self._unsaved.append(Event(removed=position))
            self._changed()

    def _changed(self) -> None:
        """What searches see is no longer what `_views` say."""
        self._changes += 1
        self._views.clear()

    def _snapshot(self, exclude: Sequence[Collection[str]]) -> tuple[Snapshot, list[NDArray[np.int64]]]:
        """The index as it is now, and per query the excluded positions, sorted and unique."""
        with self._state:
            excluded = [np.array(sorted({self._positions[id] for id in ids if id in self._positions}), np.int64) for ids in exclude]
            screened, changes = self.screened, self._changes
            if (view := self._views.get(screened)) is not None:
                return view, excluded
            dead = np.array(sorted(self._dead), np.int64)
            shards: tuple[NDArray[Any], ...] = self._targets.shards()
            cache, ids, metadata = self._screen, self._ids, self._metadata
        wanted = sum(shard.nbytes for shard in shards) <= SCREENED_BYTES if screened is None else screened
        screen = None
        if wanted:  # outside of the lock: the first one takes a while
            shards, screen = cache.screen(*shards)
        view = Snapshot(shards, screen, ids, metadata, dead)
        with self._state:
            if changes == self._changes:
                self._views[screened] = view
        return view, excluded

    def _append(self, root: Path, ours: IndexManifest) -> None:
        images = ours.images
        if images is not None and self._images is not None:
            images = disk.extend(root, images, self._images.since(ours.rows))
        self._commit(
            root,
            msgspec.structs.replace(
                ours,
                schema_version=disk.SCHEMA_VERSION,
                revision=disk.new_revision(),
                rows=len(self._ids),
                catalogue=disk.extend(root, ours.catalogue, [disk.encode_events(self._unsaved)]),
                targets=disk.extend(root, ours.targets, self._targets.since(ours.rows)),
                images=images,
            ),
        )

    def _write_generation(self, root: Path) -> None:
        live = list(self._positions.values())
        ids, metadata = [self._ids[at] for at in live], [self._metadata[at] for at in live]
        generation = disk.new_revision()[:8]
        events = [Event(id=id, metadata=entry) for id, entry in zip(ids, metadata, strict=True)]
        targets, images = self._targets, self._images
        manifest = IndexManifest(
            model_hash=self.model_hash,
            revision=disk.new_revision(),
            rows=len(live),
            storage=self.storage,
            image_storage=self.image_storage,
            target_shape=self.target_shape,
            image_shape=self.image_shape,
            catalogue=disk.extend(root, FileState(name=f"{generation}.catalogue"), [disk.encode_events(events)]),
            targets=disk.extend(root, FileState(name=f"{generation}.targets"), (targets[at] for at in live)),
            images=None if images is None else disk.extend(root, FileState(name=f"{generation}.images"), (images[at] for at in live)),
        )
        self._commit(root, manifest, (ids, metadata))

    def _commit(self, root: Path, manifest: IndexManifest, compacted: tuple[list[str], list[dict[str, Any] | None]] | None = None) -> None:
        """Replace the manifest, the moment from which the save counts, then let memory follow: map what was written."""
        disk.write_manifest(root, manifest)
        targets, images = self._mapped_columns(root, manifest)
        with self._state:
            self._targets, self._images = targets, images
            self._changed()
            if compacted is not None:
                self._screen = self._screen.taken(np.fromiter(self._positions.values(), np.int64))
                self._ids, self._metadata = compacted
                self._positions = {id: at for at, id in enumerate(self._ids)}
                self._dead = set()
            self._unsaved = []
            self._saved = (root, manifest)
