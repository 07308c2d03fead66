"""`ShardedIndex`: the indexes of a sharded folder searched as one. Every answer is the one that a single index would give.

Exact MaxSim search needs no more than the best k of each shard, merged by score and age. Zones take two rounds: the best score over all
shards is where Δ starts, so it must be known before a shard can count.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import IndexFormatError, InputError, NoAnswerError
from dqe_engine.forks import NotPickled

from .filters import Combination, Filter, compiled_filter
from .merging import best_scores, merge_answers
from .shard_files import ShardSet, read_shards
from .shard_server import Reply, ShardServer
from .snapshot import IndexMatches, Item
from .validation import check_known, check_model, check_no_single_str, check_search

F32 = NDArray[np.float32]
OnLoss = Literal["error", "partial"]

_SHARD_ROWS = 1 << 33
"""A row of the whole is its shard's number times this, and its row there: more than an index can have."""
_OPENING_SECONDS = 600.0


@dataclass(frozen=True)
class Lost:
    """In the place of a shard's answer: why there is none."""

    reason: str


class Transport(Protocol):
    """Where the shard servers are. `slot`: one of them; shard n of a set is asked of slot n."""

    def ask(self, calls: Sequence[tuple[int, tuple[Any, ...]]], timeout: float) -> list[Reply | Lost]:
        """`ShardServer.call` with these arguments at these slots, all at the same time; the answers in the order of `calls`."""

    def close(self) -> None: ...


class HereTransport:
    """Shard servers in this process, in threads: for tests, and for an index that was cut and fits one machine after all."""

    def __init__(self, root: Path, model_hash: str, **options: Any) -> None:
        self._make = partial(ShardServer, str(root), model_hash, **options)
        self._servers: dict[int, ShardServer] = {}
        self._threads = ThreadPoolExecutor(64, "dqe-shard")

    def ask(self, calls: Sequence[tuple[int, tuple[Any, ...]]], timeout: float) -> list[Reply | Lost]:
        for slot, _ in calls:
            self._servers.setdefault(slot, self._make())
        asked = [self._threads.submit(self._servers[slot].call, *arguments) for slot, arguments in calls]
        done, late = wait(asked, timeout)
        for one in late:
            one.cancel()  # if it has begun, its thread goes on to the end
        return [one.result() if one in done else Lost(f"nothing came within {timeout:g} s") for one in asked]

    def close(self) -> None:
        self._servers.clear()
        self._threads.shutdown(wait=False)


@dataclass(frozen=True, eq=False)
class ShardedSnapshot:
    """One state of a sharded index: each shard is asked for the revision that belongs to it. `Snapshot` says what the methods do; all raise
    BackendError where a shard that is needed gives no answer."""

    set: ShardSet
    transport: Transport
    on_loss: OnLoss
    timeout: float

    @property
    def count(self) -> int:
        """How many items there are, on shards that answer or not."""
        return self.set.items

    @property
    def revision(self) -> str:
        return self.set.revision

    def row(self, id: object) -> int | None:
        return self.rows([id])[0] if isinstance(id, str) else None

    def rows(self, ids: Sequence[str]) -> list[int | None]:
        """Where items lie; None for an id that no shard has. One round, whatever their number."""
        answers, lost = self._ask_all("rows", list(ids))
        found: list[int | None] = [None] * len(ids)
        for shard, rows in answers.items():
            for at, row in enumerate(rows):
                if row is not None:
                    found[at] = shard * _SHARD_ROWS + row
        if lost and None in found:
            raise self._error(lost, f"whether {ids[found.index(None)]!r} is in the index is not known")
        return found

    def existing(self, id: str) -> int:
        if (row := self.row(id)) is None:
            raise InputError(f"{id!r} is not in the index")
        return row

    def key(self, row: int) -> Hashable:
        shard, place = divmod(row, _SHARD_ROWS)
        return "shard", self.set.shards[shard].name, self.set.shards[shard].revision, place

    def target_tokens(self, row: int) -> NDArray[Any]:
        return np.asarray(self._of("target_tokens", row))

    def image_tokens(self, row: int) -> NDArray[Any]:
        return np.asarray(self._of("image_tokens", row))

    def item(self, row: int) -> Item:
        found: Item = self._of("items", row, many=True)[0]
        return found

    def prepare(self, filter: Combination) -> None:
        """Nothing: shards keep the bitmaps of the filters they were asked for."""

    def count_of(self, filter: Filter | Combination | None) -> int:
        """How many items pass. Raises BackendError for a lost shard whatever `on_loss` says: a number cannot say what it lacks."""
        compiled = compiled_filter(filter)
        answers, lost = self._ask_all("count", compiled)
        if lost:
            raise self._error(lost, "the items that pass cannot be counted")
        return sum(answers.values())

    def search(
        self,
        queries: F32,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | Combination | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
        threads: int = 0,
    ) -> tuple[IndexMatches, ...]:
        """See `ShardedIndex.search`. `threads`: without effect, since the shards have their own."""
        if zones is not None and picks and zones.policy != "hardest":
            raise InputError(
                f"picks by policy {zones.policy!r}: random draws need the rows of one index; take policy 'hardest', or search an "
                "unsharded index"
            )
        compiled = compiled_filter(filter)
        excluded = None if exclude is None else [tuple(ids) for ids in exclude]
        queries = np.ascontiguousarray(queries)
        found, lost = self._ask_all("search", queries, k, excluded, compiled, None, 0, None)
        self._check_loss(lost)
        zoned: dict[int, Any] | None = None
        while zones is not None and zoned is None:
            anchors = best_scores(found, len(queries))
            zoned, more = self._ask_all("search", queries, 0, excluded, compiled, zones, picks, anchors, shards=sorted(found))
            if more:  # what is lost now takes its hits along, and perhaps the best one: the others are asked again
                self._check_loss(lost := lost | more)
                found, zoned = {shard: part for shard, part in found.items() if shard not in lost}, None
        names = tuple(self.set.shards[shard].name for shard in sorted(lost))
        return merge_answers(found, zoned, queries=len(queries), k=k, picks=picks, lost=names)

    def warm(self) -> None:
        """Have every shard open its index and make what the first search would."""
        _, lost = self._ask_all("warm", timeout=_OPENING_SECONDS)
        self._check_loss(lost)

    def _check_loss(self, lost: dict[int, Lost]) -> None:
        if lost and (self.on_loss == "error" or len(lost) == len(self.set.shards)):
            raise self._error(lost, "the search has no answer")

    def _error(self, lost: dict[int, Lost], consequence: str) -> NoAnswerError:
        first = min(lost)
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return NoAnswerError(
            f"shard {self.set.shards[first].name}{more} of {len(self.set.shards)} gave no answer, so {consequence} "
            f"({lost[first].reason}); look at the machine that has it, or allow more time (timeout), then ask again"
        )

    def _of(self, method: str, row: int, *, many: bool = False) -> Any:
        shard, place = divmod(row, _SHARD_ROWS)
        answers, lost = self._ask_all(method, [place] if many else place, shards=[shard])
        if lost:
            raise self._error(lost, "the item cannot be read")
        return answers[shard]

    def _ask_all(
        self, method: str, *arguments: Any, shards: Sequence[int] | None = None, timeout: float | None = None
    ) -> tuple[dict[int, Any], dict[int, Lost]]:
        """By shard: the answers that there are, and the losses. Raises InputError for what a shard refused."""
        asked = range(len(self.set.shards)) if shards is None else shards
        calls = [(n, (method, self.set.shards[n].name, self.set.shards[n].revision, *arguments)) for n in asked]
        answers, lost = dict[int, Any](), dict[int, Lost]()
        for shard, reply in zip(asked, self.transport.ask(calls, self.timeout if timeout is None else timeout), strict=True):
            if isinstance(reply, Lost):
                lost[shard] = reply
            elif reply[0] == "refused":
                raise InputError(reply[1])
            elif reply[0] == "lost":
                lost[shard] = Lost(reply[1])
            else:
                answers[shard] = reply[1]
        return answers, lost


class ShardedIndex(NotPickled):
    """The indexes of a folder made by `dqe-index shard` or `join`, searched as one; an engine takes it by `attach`.

    on_loss: what a search does about a shard that gives no answer within `timeout` seconds. "error": it raises BackendError. "partial": it
    answers from the others, with `exact` False and the shards' names in `lost`. Searches run over the state that was opened, or last
    refreshed; it is read, never written: change the index that was cut, or a shard that was joined, and cut or join again.
    """

    instead = "open the folder in the other process"

    def __init__(self, path: str | os.PathLike[str], transport: Transport, *, on_loss: OnLoss = "error", timeout: float = 30.0) -> None:
        """Most callers want `open_here`, or `dqe_engine.index.on_ray_shards.open_on_ray`. Raises IndexFormatError and BackendError."""
        if on_loss not in ("error", "partial"):
            raise InputError(f"on_loss is error or partial, got {on_loss!r}")
        if not timeout > 0:
            raise InputError(f"timeout: expected seconds above 0, got {timeout!r}")
        self._root, self._transport, self._closed = Path(path).absolute(), transport, False
        self._now = ShardedSnapshot(read_shards(self._root), transport, on_loss, timeout)
        self._now.warm()

    @classmethod
    def open_here(
        cls, path: str | os.PathLike[str], *, screened: bool | None = None, mapped: bool = True, threads: int = 0, **options: Any
    ) -> ShardedIndex:
        """All shards in this process. `options`: `on_loss`, `timeout`; the others are those of `GalleryIndex.load`."""
        root = Path(path).absolute()
        transport = HereTransport(root, read_shards(root).model_hash, screened=screened, mapped=mapped, threads=threads)
        return cls(root, transport, **options)

    def __repr__(self) -> str:
        return f"<ShardedIndex of {self._root}: {len(self)} items in {len(self._now.set.shards)} shards>"

    def __enter__(self) -> ShardedIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._now.count

    def __contains__(self, id: object) -> bool:
        return self.snapshot().row(id) is not None

    def snapshot(self) -> ShardedSnapshot:
        if self._closed:
            raise InputError("this index is closed; open it again")
        return self._now

    def require_model(self, model_hash: str, *, where: object = "the index") -> None:
        """Raise IndexFormatError unless this index was made with the model of that hash."""
        check_model(self._now.set.model_hash, model_hash, where=where)

    def search(
        self,
        queries: F32,
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | None = None,
        zones: ZoneSpec | None = None,
        picks: int = 0,
    ) -> tuple[IndexMatches, ...]:
        """`GalleryIndex.search` over all shards. Raises InputError, and BackendError where shards are lost (see `on_loss`)."""
        check_search(queries, k, self._now.set.target_shape[1], exclude=exclude, zones=zones, picks=picks)
        return self.snapshot().search(queries, k, exclude=exclude, filter=filter, zones=zones, picks=picks)

    def count(self, filter: Filter | None = None) -> int:
        """How many items pass the filter. Raises InputError and BackendError."""
        return self.snapshot().count_of(filter)

    def get(self, ids: Sequence[str]) -> tuple[Item, ...]:
        """These items, in this order. Raises InputError that names up to five ids that are not in the index, and BackendError."""
        check_no_single_str("ids", ids)
        now = self.snapshot()
        return tuple(map(now.item, check_known(ids, now.rows(ids))))

    def refresh(self) -> bool:
        """Follow what `dqe-index shard` or `join` did since; whether there was anything. Searches see the old state or the new one, never a
        mixture. Raises IndexFormatError, and BackendError where shards are lost (see `on_loss`): then all goes on as before."""
        before = self.snapshot()
        found = read_shards(self._root)
        if found == before.set:
            return False
        if found.model_hash != before.set.model_hash:
            raise IndexFormatError(f"{self._root} was cut anew from an index of another model; open it again, with that model's bundle")
        new = ShardedSnapshot(found, self._transport, before.on_loss, before.timeout)
        new.warm()
        self._now = new
        return True

    def close(self) -> None:
        """Let go of the shards. May be called twice."""
        self._closed = True
        self._transport.close()
