"""`ShardedIndex`: the indexes of a sharded folder searched as one. Every answer is the one that a single index would give.

Exact MaxSim search needs no more than the best k of each shard, merged by score and age. Zones take two rounds: the best score over all
shards is where Δ starts, so it must be known before a shard can count.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import DQEError, IndexFormatError, InputError, NoAnswerError
from dqe_engine.forks import NotPickled

from .filters import Combination, Filter, compiled_filter
from .merging import best_scores, merge_answers
from .searched import NO_IMAGE_TOKENS, Ability, Health
from .shard_files import SHARDS_FILE, ShardSet, read_shards
from .snapshot import IndexMatches, Item, Page, unknown_item
from .transports import HereTransport, Lost, Sparing, Transport
from .validation import check_count, check_known, check_model, check_no_single_str, check_search

F32 = NDArray[np.float32]
OnLoss = Literal["error", "partial"]

_SHARD_ROWS = 1 << 33
"""A row of the whole is its shard's number times this, and its row there: more than an index can have."""
_OPENING_SECONDS = 600.0
LACKS: Mapping[Ability, str] = {
    "facets": "a shard's most common values need not be those of all; list the items of one filter, whose total counts them",
    "write": "shards are only read; change the index that was cut and run dqe-index shard again (or a part, and dqe-index join)",
}
"""What a sharded index cannot do, and what to do instead."""


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

    @property
    def generation(self) -> str:
        """The revision: a part that was joined may be compacted, so that its rows have other numbers."""
        return self.set.revision

    def row(self, id: object) -> int | None:
        return self.rows([id])[0] if isinstance(id, str) else None

    def rows(self, ids: Sequence[str]) -> list[int | None]:
        """Where items lie; None for an id that no shard has. One round, whatever their number."""
        return [None if found is None else found[0] * _SHARD_ROWS + found[1] for found in self._of_ids("rows", ids, by_shard=True)]

    def require(self, ids: Sequence[str]) -> None:
        """One round, whatever their number."""
        _refuse_unknown(ids, self.rows(ids))

    def find(self, ids: Sequence[str]) -> list[Item | None]:
        """One round. An id that two shards have is the newer one's, as an item that was replaced."""
        return self._of_ids("find", ids)

    def tokens_of(self, ids: Sequence[str]) -> list[NDArray[Any]]:
        """One round."""
        found = self._of_ids("tokens_of", ids)
        _refuse_unknown(ids, found)
        return found

    def key(self, row: int) -> Hashable:
        shard, place = divmod(row, _SHARD_ROWS)
        return "shard", self.set.shards[shard].name, self.set.shards[shard].revision, place

    def target_tokens(self, row: int) -> NDArray[Any]:
        return np.asarray(self._of("target_tokens", row))

    def image_tokens(self, row: int) -> NDArray[Any]:
        return np.asarray(self._of("image_tokens", row))

    def page(self, filter: Filter | Combination | None = None, *, after: int | None = None, limit: int = 50) -> Page:
        """See `Snapshot.page`; `after`: a row. A round for the total, and one for each shard that has a part of the page. Raises
        BackendError for a lost shard whatever `on_loss` says."""
        check_count("limit", limit, 1)
        compiled = compiled_filter(filter)
        counts = self._counts(compiled)
        first, place = (0, None) if after is None else divmod(max(after, 0), _SHARD_ROWS)
        items, next = list[Item](), None
        for shard in range(first, len(counts)):
            if not counts[shard]:
                continue
            if len(items) == limit:
                next = shard * _SHARD_ROWS - 1  # behind all rows of the shards before
                break
            answers, lost = self._ask_all("page", compiled, place if shard == first else None, limit - len(items), shards=[shard])
            if lost:
                raise self._error(lost, "its items cannot be listed")
            found: Page = answers[shard]
            items += found.items
            if found.next is not None:
                next = shard * _SHARD_ROWS + found.next
                break
        return Page(tuple(items), next, sum(counts))

    def facets(self, filter: Filter | None = None) -> NoReturn:
        raise InputError(f"no values are counted over shards: {LACKS['facets']}")

    def prepare(self, filter: Combination) -> None:
        """Nothing: shards keep the bitmaps of the filters they were asked for."""

    def count_of(self, filter: Filter | Combination | None) -> int:
        """How many items pass. Raises BackendError for a lost shard whatever `on_loss` says: a number cannot say what it lacks."""
        return sum(self._counts(compiled_filter(filter)))

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
        _, lost = self._ask_all("open", timeout=_OPENING_SECONDS)
        self._check_loss(lost)

    def lost(self, transport: Transport) -> dict[int, Lost]:
        """The shards that do not answer a search, asked by this transport."""
        return replace(self, transport=transport)._ask_all("warm")[1]

    def _counts(self, filter: Combination | None) -> list[int]:
        """How many items of each shard pass."""
        answers, lost = self._ask_all("count", filter)
        if lost:
            raise self._error(lost, "the items that pass cannot be counted")
        return [answers[shard] for shard in range(len(self.set.shards))]

    def _of_ids(self, method: str, ids: Sequence[str], *, by_shard: bool = False) -> list[Any]:
        """What `method` of the shard that has it says of each id; None for an id that no shard has. by_shard: (shard, what it says)."""
        answers, lost = self._ask_all(method, list(ids)) if ids else ({}, {})
        found: list[Any] = [None] * len(ids)
        for shard, parts in sorted(answers.items()):
            for at, part in enumerate(parts):
                if part is not None:
                    found[at] = (shard, part) if by_shard else part
        if lost and any(one is None for one in found):
            unknown = next(id for id, one in zip(ids, found, strict=True) if one is None)
            raise self._error(lost, f"whether {unknown!r} is in the index is not known")
        return found

    def _check_loss(self, lost: dict[int, Lost]) -> None:
        if lost and (self.on_loss == "error" or len(lost) == len(self.set.shards)):
            raise self._error(lost, "the search has no answer")

    def _error(self, lost: dict[int, Lost], consequence: str) -> NoAnswerError:
        first = min(lost)
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return NoAnswerError(
            f"shard {self.set.shards[first].name}{more} of {len(self.set.shards)} gave no answer, so {consequence} "
            f"({lost[first].reason}); look at the machine that has it, or allow more time (timeout), then ask again",
            parts=tuple([self.set.shards[shard].name for shard in sorted(lost)]),
        )

    def _of(self, method: str, row: int) -> Any:
        shard, place = divmod(row, _SHARD_ROWS)
        answers, lost = self._ask_all(method, place, shards=[shard])
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

    at_hand = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        transport: Transport,
        *,
        on_loss: OnLoss = "error",
        timeout: float = 30.0,
        spare: bool = False,
    ) -> None:
        """Most callers want `open_here`, or `dqe_engine.index.on_ray_shards.open_on_ray`. spare: a shard that was late once is lost at
        once, until a `look` finds that it answers; for servers, which look all the time. Raises IndexFormatError and BackendError."""
        if on_loss not in ("error", "partial"):
            raise InputError(f"on_loss is error or partial, got {on_loss!r}")
        if not timeout > 0:
            raise InputError(f"timeout: expected seconds above 0, got {timeout!r}")
        self._root, self._transport, self._closed = Path(path).absolute(), transport, False
        self._sparing = Sparing(transport) if spare else None
        self._following = Lock()
        self._now = ShardedSnapshot(read_shards(self._root), self._sparing or transport, on_loss, timeout)
        self._now.warm()

    @classmethod
    def open_here(
        cls,
        path: str | os.PathLike[str],
        *,
        screened: bool | None = None,
        mapped: bool = True,
        threads: int = 0,
        niceness: int = 0,
        **options: Any,
    ) -> ShardedIndex:
        """All shards in this process. threads: of a search in each shard. niceness: of the threads that search (see `give_way`). `options`:
        `on_loss`, `timeout`, `spare`; the others are those of `GalleryIndex.load`."""
        root = Path(path).absolute()
        own: dict[str, Any] = {"screened": screened, "mapped": mapped, "threads": threads}
        transport = HereTransport(root, read_shards(root).model_hash, niceness=niceness, **own)
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
        found = self.snapshot().find(ids)
        check_known(ids, [None if item is None else 0 for item in found])
        return tuple([item for item in found if item is not None])

    @property
    def lacks(self) -> Mapping[Ability, str]:
        return LACKS if self._now.set.image_storage != "none" else {**LACKS, "refine": NO_IMAGE_TOKENS}

    @property
    def watched(self) -> Path:
        return self._root / SHARDS_FILE

    def look(self) -> Health:
        """Search each shard for nothing in particular, also those that are spared."""
        now = self._now
        shards = now.set.shards
        try:
            lost = now.lost(self._transport)
        except DQEError as error:  # a refusal, which no shard should give
            lost = dict.fromkeys(range(len(shards)), Lost(str(error)))
        if self._sparing is not None:
            self._sparing.found({shards[n].name: one for n, one in lost.items()})
        self._let_go()  # by now, nobody searches what was refreshed before the last look
        answers = not lost or (now.on_loss == "partial" and len(lost) < len(shards))
        names, reasons = [shards[n].name for n in sorted(lost)], [lost[n].reason for n in sorted(lost)]
        return Health(len(shards), tuple(names), tuple(reasons), answers)

    def refresh(self) -> bool:
        """Follow what `dqe-index shard` or `join` did since; whether there was anything. Searches see the old state or the new one, never a
        mixture. Raises IndexFormatError, and BackendError where shards are lost (see `on_loss`): then all goes on as before."""
        before = self.snapshot()
        found = read_shards(self._root)
        if found == before.set:
            return False
        if found.model_hash != before.set.model_hash:
            raise IndexFormatError(f"{self._root} was cut anew from an index of another model; open it again, with that model's bundle")
        new = replace(before, set=found)
        with self._following:
            new.warm()
            self._now = new
        if self._sparing is None:
            self._let_go()
        return True

    def _let_go(self) -> None:
        """Of shards that a refresh replaced; not while one opens others."""
        if self._following.acquire(blocking=False):
            try:
                self._transport.keep([shard.name for shard in self._now.set.shards])
            finally:
                self._following.release()

    def close(self) -> None:
        """Let go of the shards. May be called twice."""
        self._closed = True
        self._transport.close()


def _refuse_unknown(ids: Sequence[str], found: Sequence[object]) -> None:
    """Raises UnknownItemError for the first that was not found."""
    for id, one in zip(ids, found, strict=True):
        if one is None:
            raise unknown_item(id)
