"""Searches of a `MilvusIndex`: candidates by their bounds, exact scores, and the proof that nothing else can matter."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import InputError
from dqe_engine.zones import select_zones
from dqe_engine.zones.arrays import F32
from dqe_engine.zones.bitmaps import unpacked

from .filters import Combination, Filter, compiled_filter
from .metadata import MetadataColumns
from .milvus_entities import Origin, metadata_of, tokens_of
from .milvus_filters import expression_of
from .pooled_bounds import LEAST_NORM, MOST_NORM, believable, bound_vectors, extended_queries
from .searched import NO_IMAGE_TOKENS, Ability
from .snapshot import IndexMatches, Item, Match, unknown_item

_FACTOR = 4
"""By which the number of candidates grows from one round to the next."""
_MOST_BYTES = 32 << 20
"""Of tokens in one answer of Milvus, whose messages are bounded."""

LACKS: Mapping[Ability, str] = {
    "list": "a collection has no order of items that Milvus could list them by; search, or ask for an item by its id",
    "facets": "Milvus does not count the values of a collection; ask it with a query of your own",
    "write": "a collection is only read; change the index that it was made from, and bring it here with MilvusIndex.sync",
    "refine": NO_IMAGE_TOKENS,
    "filtered_zones": "zones are not counted among the items that pass a filter; leave the zones out, or the filter",
}
"""What a collection cannot do, and what to do instead."""


class Searched(Protocol):
    """What is asked of a `MilvusIndex`, which says what each means."""

    origin: Origin
    flat: bool
    collection: str
    candidates: int
    most: int

    @property
    def target_shape(self) -> tuple[int, int]: ...
    def nearest(self, vectors: F32, limit: int, expression: str) -> list[list[dict[str, Any]]]: ...
    def entities(self, ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]: ...
    def count(self) -> int: ...


class MilvusSnapshot:
    """What one query asks of the collection. Items that were read are remembered, so that what an id means does not change in between.

    All of one index are equal: what they search is the collection as it is then.
    """

    def __init__(self, index: Searched) -> None:
        self._index = index
        self._rows: dict[str, int] = {}
        self._tokens: dict[int, NDArray[Any]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MilvusSnapshot) and other._index is self._index

    def __hash__(self) -> int:
        return id(self._index)

    @cached_property
    def count(self) -> int:
        return self._index.count()

    @property
    def revision(self) -> str | None:
        """None: a collection has no states that could be named."""
        return None

    generation = revision

    def row(self, id: object) -> int | None:
        """Its position."""
        if not isinstance(id, str) or not id:
            return None
        self._read([id])
        return self._rows.get(id)

    def _read(self, ids: Sequence[str]) -> None:
        """Remember those of the items that are there, as many at once as an answer of Milvus holds."""
        unread = [id for id in dict.fromkeys(ids) if id not in self._rows]
        step = max(1, _MOST_BYTES // max(1, 4 * int(np.prod(self._index.target_shape))))
        for start in range(0, len(unread), step):
            for entity in self._index.entities(unread[start : start + step], ["id", "position", "tokens"]):
                self._rows[entity["id"]] = entity["position"]
                self._tokens[entity["position"]] = tokens_of(entity, self._index.origin)

    def require(self, ids: Sequence[str]) -> None:
        self._read(ids)
        for id in ids:
            if id not in self._rows:
                raise unknown_item(id)

    def find(self, ids: Sequence[str]) -> list[Item | None]:
        """Without the hash of the image, which Milvus does not have."""
        found = {one["id"]: Item(one["id"], metadata_of(one), None) for one in self._index.entities(ids, ["id", "document"])}
        return [found.get(id) for id in ids]

    def tokens_of(self, ids: Sequence[str]) -> list[NDArray[Any]]:
        self.require(ids)
        return [self._tokens[self._rows[id]] for id in ids]

    def key(self, row: int) -> Hashable:
        return "milvus", self._index.collection, self._index.origin.generation, self._tokens[row].tobytes()

    def target_tokens(self, row: int) -> NDArray[Any]:
        """Of a row that `row` gave."""
        return self._tokens[row]

    def image_tokens(self, row: int) -> NDArray[Any]:
        raise InputError(f"Milvus: {LACKS['refine']}")

    def page(self, filter: Filter | None = None, *, after: int | None = None, limit: int = 50) -> NoReturn:
        raise InputError(f"Milvus: {LACKS['list']}")

    def facets(self, filter: Filter | None = None) -> NoReturn:
        raise InputError(f"Milvus: {LACKS['facets']}")

    def prepare(self, filter: Combination) -> None:
        """Nothing: a filter is Milvus's to evaluate."""

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
        """See `MilvusIndex.search`."""
        if zones is not None and filter is not None:
            raise InputError(f"zones with a filter: {LACKS['filtered_zones']}")
        if zones is not None and picks and zones.policy != "hardest":
            raise InputError(f"picks by policy {zones.policy!r}: random draws depend on rows, which Milvus has not; take policy 'hardest'")
        compiled = compiled_filter(filter)
        expression, _ = expression_of(compiled)
        excluded = [set(ids) for ids in exclude] if exclude is not None else [set[str]()] * len(queries)
        index, queries = self._index, np.ascontiguousarray(queries)
        rows = max(1, _MOST_BYTES // max(1, 4 * int(np.prod(index.target_shape))))  # of one answer
        most = min(index.most, rows)
        extended, found = extended_queries(queries), dict[int, IndexMatches]()
        waiting, limit = list(range(len(queries))), min(most, max(index.candidates + 4 * k + max(map(len, excluded), default=0), 1))
        while waiting:
            step, left = max(1, rows // limit), list[int]()
            for start in range(0, len(waiting), step):
                some = waiting[start : start + step]
                for b, entities in zip(some, index.nearest(extended[some], limit, expression), strict=True):
                    seen = _Seen(self, queries[b], extended[b], entities, complete=len(entities) < limit)
                    found[b] = seen.answer(k, excluded[b], compiled, zones, picks, threads)
                    if len(entities) == most and len(found[b].matches) < k:
                        self._check_room(k, len(excluded[b]), most)
                    if not found[b].exact and index.flat and limit < most:
                        left.append(b)
            waiting, limit = left, min(most, limit * _FACTOR)
        return tuple(found[b] for b in range(len(queries)))

    def _check_room(self, k: int, excluded: int, most: int) -> None:
        """Raise InputError where no `most` items could hold k beside those that are excluded, and there are more."""
        if k + excluded > most < self.count:
            raise InputError(
                f"k={k:,} and {excluded:,} excluded ids: one search fetches at most {most:,} of {self.count:,} items from Milvus "
                f"({_MOST_BYTES >> 20} MiB of tokens, and most={self._index.most:,}); ask for fewer, or cut the index in shards"
            )


class _Seen:
    """What came back for one query. `complete`: it is all that passes Milvus's expression."""

    def __init__(self, snapshot: MilvusSnapshot, query: F32, extended: F32, entities: Sequence[dict[str, Any]], *, complete: bool) -> None:
        index, self._snapshot, self._query = snapshot._index, snapshot, query
        self._entities = sorted(entities, key=lambda entity: entity["position"])  # the order of age, by which ties are settled
        shape = (0, *index.target_shape)
        self._tokens = np.stack([tokens_of(one, index.origin) for one in self._entities]) if entities else np.empty(shape, np.float32)
        products = np.array([one["distance"] for one in self._entities], np.float64)
        length = float(np.linalg.norm(query.astype(np.float64)))
        self._ceiling = -np.inf if complete else float(products.min())
        """No item that did not come back has a score above this, provided that `_sound`."""
        self._sound = index.flat and (length == 0 or LEAST_NORM <= length <= MOST_NORM)
        if self._sound and entities:
            self._sound = believable(products, extended, bound_vectors(self._tokens))

    def answer(
        self, k: int, excluded: Collection[str], filter: Combination | None, zones: ZoneSpec | None, picks: int, threads: int
    ) -> IndexMatches:
        metadata = [metadata_of(one) for one in self._entities]
        chosen = np.array([one["id"] not in excluded for one in self._entities], np.bool_)
        if filter is not None:
            columns = MetadataColumns()
            columns.append(metadata)
            chosen &= unpacked(columns.mask(filter, len(metadata)), len(metadata))
        rows = np.flatnonzero(chosen)
        matched = select_zones(
            self._query[None], np.ascontiguousarray(self._tokens[rows]), k=min(k, len(rows)), zones=zones, counts=zones is not None,
            picks=min(picks, len(rows)) if zones is not None else 0, threads=threads,
        )  # fmt: skip

        def matches(ids: NDArray[np.int64], scores: F32) -> tuple[Match, ...]:
            pairs = [(int(rows[at]), score) for at, score in zip(ids.tolist(), scores.tolist(), strict=True) if at >= 0]
            return tuple([Match(self._entities[row]["id"], score, metadata[row]) for row, score in pairs])

        hits = matches(matched.ids[0], matched.scores[0])
        # Strictly above: an older item with the same score would have come first.
        exact = self._sound and (self._ceiling == -np.inf or (len(hits) == k and hits[-1].score > self._ceiling))
        if zones is None or matched.counts is None:
            return IndexMatches(hits, exact=exact)
        near, mid, easy = matched.counts[0].tolist()
        if self._ceiling > -np.inf:
            # The subtraction is the kernels', in float32, and falls with the score: what was not seen is easy where the ceiling is.
            best = np.float32(hits[0].score if hits else np.nan)
            exact = exact and bool(best - np.float32(self._ceiling) > np.float32(zones.hi))
            known = {one["id"] for one in self._entities}
            elsewhere = self._snapshot._index.entities([id for id in excluded if id not in known], ["id"])
            easy += max(0, self._snapshot.count - len(self._entities) - len(elsewhere))
        picked = () if matched.picks is None or matched.pick_scores is None else matches(matched.picks[0], matched.pick_scores[0])
        return IndexMatches(hits, (near, mid, easy), picked, exact=exact)
