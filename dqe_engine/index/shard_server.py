"""`ShardServer`: one shard in a process of its own, or in this one. It answers for a revision that the caller names, or not at all."""

from __future__ import annotations

from collections import OrderedDict
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
"""States of a shard that are held for searches which began before a refresh. They are of one folder and share their arrays, so they cost
next to nothing; another folder's would be a second shard in memory."""
QUERIES_AT_ONCE = 4
"""Queries that the kernels score row by row (their MAX_ROW_QUERIES), screened or not. Larger batches are multiplied in tiles where no
screen is used, and then the last bits of a score depend on the batch, on k, and on how many items there are. Shards must not differ in
them: equal items of two shards would change places, and zones be counted from a best score that no shard has."""

Reply = tuple[Literal["answer", "refused", "lost"], Any]


class ShardServer:
    """An index under `root`, the one that was asked for last. It is opened when it is asked for, so that a server that was started anew
    answers as before."""

    def __init__(self, root: str, model_hash: str, screened: bool | None = None, mapped: bool = True, threads: int = 0) -> None:
        """`screened` and `mapped`: see `GalleryIndex.load`. threads: of one search at most, 0 for one per processor."""
        self._root, self._model_hash, self._screened, self._mapped, self._threads = Path(root), model_hash, screened, mapped, threads
        self._index: tuple[str, GalleryIndex] | None = None
        self._states: OrderedDict[tuple[str, str], Snapshot] = OrderedDict()
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
        if (known := self._states.get((name, revision))) is not None:
            return known
        with self._lock:
            if (known := self._states.get((name, revision))) is not None:
                return known
            if self._index is not None and self._index[0] == name:
                index = self._index[1]
                index.refresh()
            else:
                index = GalleryIndex.load(self._root / name, model_hash=self._model_hash, screened=self._screened, mapped=self._mapped)
            now = index.snapshot()
            if now.revision != revision:
                raise IndexFormatError(
                    f"{self._root / name} has revision {now.revision}, but {revision} was asked for, so it was changed meanwhile; "
                    "refresh, and if "
                    "that does not help, run dqe-index shard (or join) to its end"
                )
            self._index = name, index
            if any(other != name for other, _ in self._states):
                self._states = OrderedDict()  # a new one: others read it without the lock
            self._states[name, revision] = now
            while len(self._states) > KEPT_STATES:
                self._states.popitem(last=False)
            return now
