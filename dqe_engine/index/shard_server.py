"""`ShardServer`: one shard in a process of its own, or in this one. It answers for a revision that the caller names, or not at all."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import DQEError, IndexFormatError, InputError

from .filters import Combination
from .gallery import GalleryIndex
from .snapshot import IndexMatches, Item, Page, Snapshot

KEPT_STATES = 3
"""States of a folder that are held for searches which began before a refresh. They share their arrays, so they cost next to nothing."""
KEPT_FOLDERS = 2
"""Folders that are held: of a shard that was cut anew, the old one answers while the new one is opened, and until all have moved on."""
KEPT_SECONDS = 30.0
"""How long the older folder is held after the last call that asked for it."""
QUERIES_AT_ONCE = 4
"""Queries that the kernels score row by row (their MAX_ROW_QUERIES), screened or not. Larger batches are multiplied in tiles where no
screen is used, and then the last bits of a score depend on the batch, on k, and on how many items there are. Shards must not differ in
them: equal items of two shards would change places, and zones be counted from a best score that no shard has."""

Reply = tuple[Literal["answer", "refused", "lost"], Any]


class _Folder:
    """A shard that is open. `states`, by revision, is replaced and never changed, so it is read without the lock."""

    def __init__(self, index: GalleryIndex) -> None:
        self.index = index
        self.states: dict[str, Snapshot] = {}
        self.asked = time.monotonic()


class ShardServer:
    """The indexes under `root` that are asked for: one, and while a shard that was cut anew is taken up, the one before beside it. They are
    opened when they are asked for, so that a server that was started anew answers as before."""

    def __init__(self, root: str, model_hash: str, screened: bool | None = None, mapped: bool = True, threads: int = 0) -> None:
        """`screened` and `mapped`: see `GalleryIndex.load`. threads: of one search at most, 0 for one per processor."""
        self._root, self._model_hash, self._screened, self._mapped, self._threads = Path(root), model_hash, screened, mapped, threads
        self._folders: dict[str, _Folder] = {}  # by name, the one that was opened last at the end; replaced as `_Folder.states` are
        self._lock = Lock()  # of opening and following; searches go on meanwhile

    def call(self, method: str, name: str, revision: str, *arguments: Any) -> Reply:
        """What `method` says of the shard `name` as its save `revision` left it. An answer, or a line: "refused" for what the caller did
        wrong, "lost" for a shard that cannot be read or has another revision."""
        try:
            return "answer", getattr(self, method)(self._state(name, revision), *arguments)
        except InputError as error:
            return "refused", str(error)
        except DQEError as error:
            return "lost", str(error)

    def open(self, now: Snapshot) -> int:
        """`warm`, of a state that is asked for the first time, so that it may take minutes."""
        return self.warm(now)

    def warm(self, now: Snapshot) -> int:
        """Make what the first search would have to. How many items there are."""
        now.search(np.zeros((1, now.targets[0].shape[2]), np.float32), 1, threads=self._threads)
        return now.count

    def search(
        self,
        now: Snapshot,
        queries: NDArray[np.float32],
        k: int,
        exclude: Sequence[Collection[str]] | None,
        filter: Combination | None,
        zones: ZoneSpec | None,
        picks: int,
        anchors: NDArray[np.float32] | None,
    ) -> tuple[IndexMatches, ...]:
        """See `Snapshot.search`, a few queries at a time."""
        found = list[IndexMatches]()
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            found += now.search(
                queries[part], k, exclude=None if exclude is None else exclude[part], filter=filter, zones=zones, picks=picks,
                anchors=None if anchors is None else anchors[part], threads=self._threads,
            )  # fmt: skip
        return tuple(found)

    def rows(self, now: Snapshot, ids: Sequence[str]) -> list[int | None]:
        return [now.row(id) for id in ids]

    def find(self, now: Snapshot, ids: Sequence[str]) -> list[Item | None]:
        return now.find(ids)

    def tokens_of(self, now: Snapshot, ids: Sequence[str]) -> list[NDArray[Any] | None]:
        """(M, D) of each; None for an id that is not here."""
        return [None if row is None else np.array(now.target_tokens(row)) for row in map(now.row, ids)]

    def page(self, now: Snapshot, filter: Combination | None, after: int | None, limit: int) -> Page:
        return now.page(filter, after=after, limit=limit)

    def count(self, now: Snapshot, filter: Combination | None) -> int:
        return now.count_of(filter)

    def target_tokens(self, now: Snapshot, row: int) -> NDArray[Any]:
        return np.array(now.target_tokens(row))

    def image_tokens(self, now: Snapshot, row: int) -> NDArray[Any]:
        return np.array(now.image_tokens(row))

    def _state(self, name: str, revision: str) -> Snapshot:
        """Raises IndexFormatError where this revision is not the one on the disk and was not seen here before."""
        if (known := self._known(name, revision)) is not None:
            self._let_go()
            return known
        with self._lock:
            if (known := self._known(name, revision)) is not None:
                return known
            if (folder := self._folders.get(name)) is not None:
                folder.index.refresh()
            else:
                others = sorted(self._folders, key=lambda other: self._folders[other].asked)[-(KEPT_FOLDERS - 1) :]
                self._folders = {other: folder for other, folder in self._folders.items() if other in others}  # before the next is opened
                folder = _Folder(
                    GalleryIndex.load(self._root / name, model_hash=self._model_hash, screened=self._screened, mapped=self._mapped)
                )
            now = folder.index.snapshot()
            if now.revision != revision:
                raise IndexFormatError(
                    f"{self._root / name} has revision {now.revision}, but {revision} was asked for, so it was changed meanwhile; "
                    "refresh, and if "
                    "that does not help, run dqe-index shard (or join) to its end"
                )
            states = {**folder.states, revision: now}
            folder.states = {one: states[one] for one in list(states)[-KEPT_STATES:]}
            folder.asked = time.monotonic()
            self._folders = {**self._folders, name: folder}
            return now

    def _known(self, name: str, revision: str) -> Snapshot | None:
        if (folder := self._folders.get(name)) is None or (known := folder.states.get(revision)) is None:
            return None
        folder.asked = time.monotonic()
        return known

    def _let_go(self) -> None:
        """Of older folders that nobody asks for any more; not while one is being opened."""
        if len(self._folders) > 1 and self._lock.acquire(blocking=False):
            try:
                *older, _ = self._folders
                gone = [name for name in older if time.monotonic() - self._folders[name].asked >= KEPT_SECONDS]
                self._folders = {name: folder for name, folder in self._folders.items() if name not in gone}
            finally:
                self._lock.release()
