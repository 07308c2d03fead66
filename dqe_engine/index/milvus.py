"""`MilvusIndex`: items in Milvus, a database of vectors, and exact MaxSim search on the candidates that it returns (extra `milvus`).

    with MilvusIndex.create("http://milvus:19530", "garments", index) as there:  # a file such as "garments.db" is embedded Milvus Lite
        engine.attach(there)

Milvus keeps for each item one bound vector (`pooled_bounds`), its tokens and its metadata. It returns the items whose score may be highest,
and their scores are computed here from the tokens. Where the k-th is above what anything that was not returned can have, the answer is
proved to be the exact one, and says so (`exact`); else more is fetched, up to a limit. The proof needs searches in Milvus that look at
every vector: a flat index, and a server that makes no interim index of new vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import BackendError, DQEError, IndexFormatError, InputError
from dqe_engine.forks import NotPickled

from .filters import Filter, compile_filter
from .gallery import GalleryIndex
from .milvus_calls import MilvusCalls, without_secrets
from .milvus_entities import Origin, check_entity, entities, schema_of
from .milvus_filters import expression_of, one_of
from .milvus_search import LACKS, MilvusSnapshot
from .searched import Health
from .snapshot import IndexMatches, Snapshot
from .validation import check_count, check_model, check_search

F32 = NDArray[np.float32]
Consistency = Literal["Strong", "Bounded", "Eventually"]
IndexType = Literal["FLAT", "HNSW", "IVF_FLAT", "AUTOINDEX"]

_WRITTEN = 256
"""Entities in one request."""
_READ = 4096


class MilvusIndex(NotPickled):
    """A collection in Milvus. Reads at `consistency`: "Strong" sees every write that was confirmed before; the others may miss the latest,
    and then the proof of an answer is about the items as they were a moment before."""

    instead = "open the collection in the other process"

    def __init__(
        self,
        uri: str,
        collection: str,
        *,
        token: str = "",
        timeout: float = 30.0,
        consistency: Consistency = "Strong",
        exhaustive: bool | None = None,
        candidates: int = 64,
        most: int = 16384,
        spare: bool = False,
    ) -> None:
        """Open a collection that `create` made. uri: of a server, or the path of a Milvus Lite file.

        timeout: seconds for which each call of Milvus is waited for, at most; reading an item is one call, a search one or, while its
        answer is not proved, some more. exhaustive: whether a flat search looks at every vector. None: yes in Milvus Lite, no in a server,
        which searches new vectors by an approximate index of its own until they are indexed, unless
        `queryNode.segcore.interimIndex.enableIndex` is false there; say True where it is. candidates: items that are fetched first, beside
        4 for each of k; most: at most, before an answer is given without proof. spare: see `MilvusCalls`.

        Raises BackendError where Milvus cannot be reached, IndexFormatError for a collection that is missing, empty or not ours, and
        InputError.
        """
        check_count("candidates", candidates, 1)
        check_count("most", most, candidates)
        if consistency not in get_args(Consistency):
            raise InputError(f"consistency: expected {', '.join(get_args(Consistency))}, got {consistency!r}")
        self.collection, self.consistency, self.candidates, self.most = collection, consistency, candidates, min(most, 16384)
        self._where, self._timeout, self._closed = without_secrets(uri), timeout, False
        self._calls = MilvusCalls(self._where, timeout, spare=spare)
        self._client = self._connect(uri, token)
        if not self.asked(self._client.has_collection, collection, timeout=timeout):
            raise IndexFormatError(f"Milvus at {self._where} has no collection {collection!r}; make it with MilvusIndex.create")
        self.asked(self._client.load_collection, collection, timeout=timeout)
        self.origin = self._read_origin()
        self.flat = self._is_flat() and ("://" not in uri if exhaustive is None else exhaustive)
        """Whether Milvus returns the very largest products, without which nothing is proved."""

    @classmethod
    def create(
        cls,
        uri: str,
        collection: str,
        index: GalleryIndex,
        *,
        index_type: IndexType = "FLAT",
        replace: bool = False,
        token: str = "",
        timeout: float = 30.0,
        **options: Any,
    ) -> MilvusIndex:
        """Make the collection from a saved index and open it.

        index_type: of Milvus's index over the bound vectors; answers are proved with "FLAT" alone. replace: drop a collection of this name
        first. Raises InputError for an index that is empty or not saved, or has items that Milvus cannot hold, and what opening does.
        """
        now = _saved(index)
        if not now.count:
            raise InputError("an empty index: Milvus would not know the shape of its items; add some first")
        check_entity(now, now.live_rows().tolist())
        made = cls.__new__(cls)
        made._where, made._timeout, made._closed = without_secrets(uri), timeout, False
        made._calls = MilvusCalls(made._where, timeout)
        client = made._client = made._connect(uri, token)
        if replace:
            made.asked(client.drop_collection, collection, timeout=timeout)
        if made.asked(client.has_collection, collection, timeout=timeout):
            raise InputError(f"Milvus at {made._where} has a collection {collection!r} already; open it and sync, or say replace=True")
        schema, indexes = schema_of(client, index.target_shape, index_type)
        options_of_all = {"schema": schema, "index_params": indexes, "consistency_level": "Strong", "timeout": timeout}
        made.asked(client.create_collection, collection, **options_of_all)
        made.collection = collection
        made._write(index, now, now.live_rows().tolist())
        made.close()
        return cls(uri, collection, token=token, timeout=timeout, **options)

    def __repr__(self) -> str:
        return f"<MilvusIndex {self.collection!r} at {self._where}>"

    def __enter__(self) -> MilvusIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.snapshot().count

    def __contains__(self, id: object) -> bool:
        return self.snapshot().row(id) is not None

    @property
    def target_shape(self) -> tuple[int, int]:
        return self.origin.target_shape

    at_hand, watched, lacks = False, None, LACKS

    def refresh(self) -> bool:
        """Every search asks the collection as it is then."""
        return False

    def look(self) -> Health:
        """Whether Milvus answers; the collection is the one part. The look is a count, which is cheap; after a call that was late it is a
        search, since a count may be answered where searches hang."""
        nothing = np.zeros((1, self.target_shape[1] + 1), np.float32)
        try:
            self._calls.look(*((self._nearest, nothing, 1, "") if self._calls.spared else (self._count,)))
        except DQEError as error:
            return Health(lost=(self.collection,), reasons=(str(error),), answers=False)
        return Health()

    def snapshot(self) -> MilvusSnapshot:
        """For one search: what Milvus says is remembered in it, and read at the time when it is first asked."""
        if self._closed:
            raise InputError("this index is closed; open it again")
        return MilvusSnapshot(self)

    def require_model(self, model_hash: str, *, where: object = "the collection") -> None:
        """Raise IndexFormatError unless the items were made with the model of that hash."""
        check_model(self.origin.model_hash, model_hash, where=where)

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
        """`GalleryIndex.search`; each answer says whether it is proved to be the exact one. Zones go without a filter. Raises InputError
        and BackendError."""
        check_search(queries, k, self.target_shape[1], exclude=exclude, zones=zones, picks=picks)
        return self.snapshot().search(queries, k, exclude=exclude, filter=filter, zones=zones, picks=picks)

    def expression(self, filter: Filter) -> tuple[str, bool]:
        """What Milvus is asked for a filter ("": everything), and whether that is all of it; the rest is applied to what comes back."""
        return expression_of(compile_filter(filter))

    def sync(self, index: GalleryIndex) -> tuple[int, int]:
        """Bring the collection to what a saved index holds; how many items were written and removed. All are written where the index was
        compacted since. Searches meanwhile see some changes and not others. Killed, it is run again."""
        self.require_model(index.model_hash)
        now = _saved(index)
        if (index.storage, index.target_shape) != (self.origin.storage, self.target_shape):
            raise IndexFormatError(
                f"{self!r} has {self.origin.storage} tokens of shape {self.target_shape}, the index {index.storage} of "
                f"{index.target_shape}; "
                "create another collection"
            )
        origin = Origin.of(index, now).text()
        rows = dict(zip(now.ids(), now.live_rows().tolist(), strict=True))
        gone = list[str]()
        for id, position, found in self._known():
            if id not in rows:
                gone.append(id)
            elif (found, position) == (origin, rows[id]):
                del rows[id]
        check_entity(now, list(rows.values()))
        self._write(index, now, list(rows.values()))
        for start in range(0, len(gone), _READ):
            self.asked(self._client.delete, self.collection, filter=one_of(gone[start : start + _READ]), timeout=self._timeout)
        return len(rows), len(gone)

    def close(self) -> None:
        """May be called twice."""
        if not self._closed:
            self._closed = True
            self._calls.ask(self._client.close)
            self._calls.close()

    # -- what searches need; all raise BackendError where Milvus does not answer -------------------------------------------------

    def nearest(self, vectors: F32, limit: int, expression: str) -> list[list[dict[str, Any]]]:
        """For each extended query, up to `limit` entities by the product with their bound vector, which is their "distance"."""
        found: list[list[dict[str, Any]]] = self.asked(self._nearest, vectors, limit, expression)
        return found

    def _nearest(self, vectors: F32, limit: int, expression: str) -> list[list[dict[str, Any]]]:
        found = self._client.search(
            self.collection,
            data=list(vectors),
            anns_field="bound",
            limit=limit,
            filter=expression,
            output_fields=["id", "position", "tokens", "document"],
            search_params={"metric_type": "IP"},
            consistency_level=self.consistency,
            timeout=self._timeout,
        )
        return [[{"distance": hit["distance"], **hit["entity"]} for hit in hits] for hits in found]

    def entities(self, ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Those that are there, in any order."""
        if not ids:
            return []
        found = self.asked(
            self._client.query,
            self.collection,
            filter=one_of(ids),
            output_fields=list(fields),
            consistency_level=self.consistency,
            timeout=self._timeout,
        )
        return [dict(one) for one in found]

    def count(self) -> int:
        """How many items there are."""
        return int(self.asked(self._count))

    def _count(self) -> int:
        found = self._client.query(
            self.collection,
            filter="",
            output_fields=["count(*)"],
            consistency_level=self.consistency,
            timeout=self._timeout,
        )
        return int(found[0]["count(*)"])

    def asked(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Milvus's answer. Raises BackendError, one line, for its errors, NoAnswerError where it cannot be reached or takes too long."""
        return self._calls(question, *arguments, **options)

    def _connect(self, uri: str, token: str) -> Any:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise BackendError("pymilvus is not installed; pip install 'dqe-engine[milvus]'") from error
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs each error that it raises, with its traceback
        return self.asked(MilvusClient, uri=uri, token=token, timeout=self._timeout)

    def _read_origin(self) -> Origin:
        found = self.asked(self._client.query, self.collection, filter="", output_fields=["origin"], limit=1, timeout=self._timeout)
        try:
            return Origin.parse(found[0]["origin"])
        except (IndexError, KeyError, ValueError, msgspec.DecodeError) as error:
            raise IndexFormatError(
                f"the collection {self.collection!r} at {self._where} is empty or was not made by dqe-engine; make one with "
                "MilvusIndex.create"
            ) from error

    def _is_flat(self) -> bool:
        described = self.asked(self._client.describe_index, self.collection, "bound", timeout=self._timeout)
        return str(described.get("index_type")) == "FLAT" and str(described.get("metric_type")) == "IP"

    def _known(self) -> list[tuple[str, int, str]]:
        """Id, position and origin of all entities."""
        iterator = self.asked(
            self._client.query_iterator,
            self.collection,
            filter="",
            output_fields=["id", "position", "origin"],
            batch_size=_READ,
            consistency_level="Strong",
            timeout=self._timeout,
        )
        known = []
        while batch := self.asked(iterator.next):
            known += [(one["id"], one["position"], one["origin"]) for one in batch]
        iterator.close()
        return known

    def _write(self, index: GalleryIndex, now: Snapshot, rows: Sequence[int]) -> None:
        origin = Origin.of(index, now).text()
        for start in range(0, len(rows), _WRITTEN):
            batch = entities(now, rows[start : start + _WRITTEN], origin)
            self.asked(self._client.upsert, self.collection, batch, timeout=self._timeout)


def _saved(index: GalleryIndex) -> Snapshot:
    now = index.snapshot()
    if now.generation is None:
        raise InputError("the index has changes that are not saved; save it first")
    return now
