"""`RetrievalEngine`: a bundle and an index behind two calls, `index_images` and `search`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from .batching import Batcher
from .bundle import Bundle, bundle_folder
from .caches import CacheStats
from .contracts.graphs import GraphSpec
from .contracts.zones import ZoneSpec
from .dialogue import Dialogue
from .encoder import STAGES, Clock, Composed, Prepared, QueryEncoder
from .errors import DQEError, InputError
from .forks import ProcessBound
from .image_policy import DEFAULT_POLICY, ImagePolicy
from .image_sources import ImageSource, Pixels, image_pairs
from .index import GalleryIndex, ImageStorage, Storage
from .index.filters import is_small
from .index.indexer import Indexer, Progress
from .index.searched import SearchedIndex
from .index.validation import check_count
from .preprocessing import ImageLike, fit_image, open_image
from .processors import available_cpus, give_way
from .query import Query
from .results import (
    EncodedImages,
    EncodedQueries,
    Explanation,
    Hit,
    IndexingReport,
    IndexState,
    SearchResult,
    ZoneMembers,
    build_result_parts,
)
from .sessions import GraphSession, Provider

REMEMBERED_BYTES = 64 << 20
"""Maximum bytes that an engine remembers of the image tokens of uploads, and as many of composed queries."""

_SMALL = 500
"""Characters of a text, and values and characters of a filter, that an event loop's thread reads itself."""

__all__ = ["STAGES", "RetrievalEngine"]


class _Found(NamedTuple):
    hits: tuple[Hit, ...]
    zones: ZoneMembers | None
    exact: bool
    lost: tuple[str, ...]


class RetrievalEngine(ProcessBound):
    """Composed image retrieval over one index. Threads may search at the same time: a request changes no shared state."""

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Callable[[GraphSpec], GraphSession],
        *,
        index: SearchedIndex | None = None,
        threads: int = 0,
        images: ImagePolicy = DEFAULT_POLICY,
        kept_bytes: int = REMEMBERED_BYTES,
    ) -> None:
        """Most callers want `load`; this takes sessions of any runtime.

        - `index`: the index to search; an empty one is made by default.
        - `threads`: the most threads of a search, 0 for one per processor.
        - `images`, `kept_bytes`: see `load`.
        """
        self.bundle = bundle
        self.image_policy = images
        self._threads = threads
        self._encoder = QueryEncoder(bundle, open_graph, images, kept_bytes)
        self._index: SearchedIndex = GalleryIndex.for_bundle(bundle)
        if index is not None:
            self.attach(index)
        self.bind_to_process()

    @classmethod
    def load(
        cls,
        bundle_path: str | os.PathLike[str],
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        verify: bool = True,
        images: ImagePolicy = DEFAULT_POLICY,
        kept_bytes: int = REMEMBERED_BYTES,
    ) -> RetrievalEngine:
        """Verify and open a bundle.

        - `bundle_path`: a folder, or "hf://OWNER/NAME@REVISION" on the Hugging Face hub (a branch, a tag or a commit; needs the extra
          `hub`). `engine.bundle.origin` names the commit.
        - `provider`: the runtime for the graphs; "auto" takes the first of tensorrt, cuda and cpu that works.
        - `threads`: the most CPU threads of a graph and of a search; None for all. Small graphs and searches take fewer.
        - `verify`: check every file's SHA-256.
        - `images`: the images that this engine accepts, as references and for the index, and what one may cost.
        - `kept_bytes`: see `QueryEncoder`; 0 to remember nothing.

        Raises BundleError, and BackendError if the provider that was asked for cannot run.
        """
        folder = bundle_folder(bundle_path)  # once: a branch may move
        while True:
            bundle = Bundle.load(folder, verify=verify)
            try:
                engine = cls(bundle, partial(bundle.session, provider=provider, threads=threads), threads=threads or 0,
                             images=images, kept_bytes=kept_bytes)  # fmt: skip
            except DQEError:
                if bundle.is_current():
                    raise
                continue
            if bundle.is_current():  # else the files that were opened may be another bundle's, or of two
                return engine

    def __repr__(self) -> str:
        running = ", ".join(sorted(set(self.providers.values())))
        return f"<RetrievalEngine {self.bundle.manifest.name!r} of {self.bundle.origin or self.bundle.path} on {running}, {self._index!r}>"

    def __enter__(self) -> RetrievalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index (see `GalleryIndex.close`). The graphs go with the last reference to the engine."""
        self._index.close()

    @property
    def providers(self) -> dict[str, str]:
        """The provider that runs each graph, by the graph's name."""
        return {session.spec.name: session.provider for session in self._encoder.sessions}

    @property
    def index(self) -> GalleryIndex:
        """The index, if it is a `GalleryIndex`. Raises InputError for other kinds, which cannot be changed through an engine."""
        if not isinstance(self._index, GalleryIndex):
            raise InputError(f"this engine searches {self._index!r}, which is not changed through it; attach a GalleryIndex for that")
        return self._index

    @property
    def searched(self) -> SearchedIndex:
        """The index that is searched: a `GalleryIndex`, or another kind that was attached."""
        return self._index

    def attach(self, index: SearchedIndex) -> None:
        """Search this index from now on: a `GalleryIndex`, a `ShardedIndex` or a `MilvusIndex`. Raises IndexFormatError when it was made
        with another model."""
        index.require_model(self.bundle.model_hash)
        self._index = index

    def new_index(self, *, storage: Storage = "f32", image_storage: ImageStorage = "f16") -> GalleryIndex:
        """Attach an empty index with these storage options (see `GalleryIndex`) and return it."""
        index = GalleryIndex.for_bundle(self.bundle, storage=storage, image_storage=image_storage)
        self._index = index
        return index

    def load_index(self, path: str | os.PathLike[str], *, verify: bool = False, screened: bool | None = None, mapped: bool = True) -> None:
        """Attach a saved index; options and errors are those of `GalleryIndex.load`, also for another model's."""
        self._index = GalleryIndex.load(path, model_hash=self.bundle.model_hash, verify=verify, screened=screened, mapped=mapped)

    def save_index(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """See `GalleryIndex.save`."""
        self.index.save(path, overwrite=overwrite)

    def encode_images(self, images: Sequence[ImageLike], *, batch_size: int = 32) -> EncodedImages:
        """Target tokens and image tokens of images of any size and mode. Raises InputError for one that cannot be read."""
        check_count("batch_size", batch_size, 1)
        spec, policy = self.bundle.manifest.preprocessing, self.image_policy
        batches = [
            self._encoder.encode_pixels([fit_image(open_image(image, spec, policy), spec) for image in images[start : start + batch_size]])
            for start in range(0, len(images), batch_size)
        ] or [self._encoder.encode_pixels([])]
        return EncodedImages(
            np.concatenate([batch.target_tokens for batch in batches]), np.concatenate([batch.image_tokens for batch in batches])
        )

    def encode_pixels(self, pixels: Sequence[Pixels]) -> EncodedImages:
        """Target tokens and image tokens of images that `fit_image` has prepared, in one batch."""
        self.check_process()
        return self._encoder.encode_pixels(pixels)

    def index_images(
        self,
        images: ImageSource,
        *,
        metadata: Mapping[str, Mapping[str, Any] | None] | None = None,
        ignore_unknown: bool = False,
        add_only: bool = False,
        rehash: bool = False,
        batch_size: int = 32,
        progress: Progress | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        decode_threads: int = 4,
    ) -> IndexingReport:
        """Bring the index up to date with these images, batch by batch; `save_index` makes it durable.

        images: see `image_pairs`. An image that is new, or whose content differs from what was indexed under its id, is embedded; the
        item keeps its metadata unless other is given. The other options are those of `Indexer.plan` and `Indexer.embed`. What is
        refused is refused before any work; whatever stops it later, the batches that were added stay. Raises InputError.
        """
        check_count("batch_size", batch_size, 1)
        indexer = self.indexer(decode_threads=decode_threads)
        plan = indexer.plan(
            image_pairs(images, self.image_policy), metadata=metadata, ignore_unknown=ignore_unknown, add_only=add_only, rehash=rehash,
            on_error=on_error,
        )  # fmt: skip
        indexer.prepare(plan)
        return indexer.embed(plan, batch_size=batch_size, on_error=on_error, progress=progress)

    def indexer(self, *, decode_threads: int = 4) -> Indexer:
        """An `Indexer` of the attached index, to update it in steps."""
        return Indexer(
            self.index, self._encoder.encode_pixels, self.bundle.manifest.preprocessing, policy=self.image_policy, threads=decode_threads
        )

    def encode_queries(self, queries: Sequence[Query]) -> EncodedQueries:
        """The vectors that `search_batch` searches by. Raises InputError."""
        self.check_process()
        snapshot, clock = self._index.snapshot(), Clock(STAGES[:-1])
        prepared = [self._encoder.prepare(query, snapshot, clock) for query in queries]
        composed = self._encoder.compose(prepared, clock)
        attributes, width = self.bundle.sizes.attributes, self.bundle.sizes.embedding_dim
        return EncodedQueries(
            queries=np.array([one.vector for one in composed], np.float32).reshape(-1, width),
            predicted_weights=np.array([one.predicted for one in composed], np.float32).reshape(len(composed), attributes),
            weights=np.array([one.weights for one in composed], np.float32).reshape(len(composed), attributes),
            truncated=tuple(one.truncated for one in prepared),
            timings_ms=clock.timings_ms,
        )

    def search(self, query: Query) -> SearchResult:
        """The items that best answer a query, such as `Query(image=Path("photo.jpg"), text="in red")`. Raises InputError."""
        return self.search_batch([query])[0]

    def search_batch(self, queries: Sequence[Query]) -> tuple[SearchResult, ...]:
        """`search` for many queries, each with its own options, in one pass through the graphs and over one snapshot of the index.

        The batch is encoded at once: memory grows with it, so evaluations pass some tens to hundreds at a time.
        """
        self.check_process()
        snapshot, clock = self._index.snapshot(), Clock(STAGES)
        return self._answer([self._encoder.prepare(query, snapshot, clock) for query in queries], clock)

    def dialogue(self, query: Query) -> Dialogue:
        """Begin a search that goes on from its own hits: refine it, give unwanted examples, undo a step."""
        return Dialogue(self, query)

    def batcher(
        self,
        *,
        most: int = 32,
        patience: float = 0.0,
        room: int = 256,
        readers: int | None = None,
        niceness: int = 0,
        counts: Callable[[int], None] = lambda size: None,
    ) -> QueryBatcher:
        """A batcher, which answers queries of many threads and tasks together, as a server needs it.

        See `Batcher`, and `QueryBatcher` for `readers`. `niceness` lowers the priority of the threads that read and answer what tasks ask,
        so that they give way to the event loop (see `give_way`). `counts` is called with the size of each batch.
        """
        return QueryBatcher(self, most=most, patience=patience, room=room, readers=readers, niceness=niceness, counts=counts)

    def warm_up(self) -> None:
        """Run every graph once and make the screen of the index, so that the first search is not slower than the next."""
        spec, snapshot = self.bundle.manifest.preprocessing, self._index.snapshot()
        pixels = np.full((spec.image_size, spec.image_size, 3), 255, np.uint8)
        tokens = self._encoder.encode_pixels([pixels]).image_tokens[0]
        ids = self._encoder.text.tokenise(["red"])[0].ids
        self._answer([Prepared(Query(text="", k=1), snapshot, image_tokens=tokens, ids=ids)], Clock())

    @property
    def remembered(self) -> dict[str, CacheStats]:
        """Entries, bytes, hits and misses of the two caches: image tokens of "uploads", and outputs of the query encoder for "queries"."""
        return {"uploads": self._encoder.uploads.stats(), "queries": self._encoder.fused.stats()}

    def _answer(self, prepared: Sequence[Prepared], clock: Clock) -> tuple[SearchResult, ...]:
        composed = self._encoder.compose(prepared, clock)
        found = self._search(prepared, composed)
        clock.lap("search")
        return tuple(self._result(one, made, found[b], clock) for b, (one, made) in enumerate(zip(prepared, composed, strict=True)))

    def _search(self, prepared: Sequence[Prepared], composed: Sequence[Composed]) -> dict[int, _Found]:
        """What the index says, by place: one search for queries of the same snapshot, filter and zones."""
        groups: dict[Any, list[int]] = {}
        for b, one in enumerate(prepared):
            query = one.query
            spec = self._zone_spec(query.zones)
            digest = None if one.filter is None else one.filter.digest
            groups.setdefault((one.snapshot, digest, spec), []).append(b)
        found: dict[int, _Found] = {}
        for (_, _, spec), rows in groups.items():
            queries = [prepared[b].query for b in rows]
            most = max(query.k + query.offset for query in queries)
            matches = prepared[rows[0]].snapshot.search(
                np.stack([composed[b].vector for b in rows]), most, exclude=[query.excluded() for query in queries],
                filter=prepared[rows[0]].filter, zones=spec, picks=max(query.k for query in queries) if spec else 0, threads=self._threads,
            )  # fmt: skip
            for b, query, ranking in zip(rows, queries, matches, strict=True):
                kept = replace(ranking, matches=ranking.matches[: query.k + query.offset], picks=ranking.picks[: query.k])
                parts = build_result_parts(kept, offset=query.offset, minimum_score=query.minimum_score)
                found[b] = _Found(*parts, ranking.exact, ranking.lost)
        return found

    def _result(self, prepared: Prepared, composed: Composed, found: _Found, clock: Clock) -> SearchResult:
        hits, query, names = found.hits, prepared.query, self.bundle.vocabulary.names
        if query.explain:
            stored = prepared.snapshot.tokens_of([hit.id for hit in hits])
            made = [self._explanation(prepared, composed, tokens) for tokens in stored]
            hits = tuple([replace(hit, explanation=one) for hit, one in zip(hits, made, strict=True)])
        weights = {} if query.text is None else dict(zip(names, composed.weights.tolist(), strict=True))
        predicted = {} if query.text is None else dict(zip(names, composed.predicted.tolist(), strict=True))
        return SearchResult(
            hits=hits,
            mode=query.mode,
            weights=weights,
            predicted_weights=predicted,
            overrides={name: float(value) for name, value in query.weights.items()},
            truncated=prepared.truncated,
            unknown_words=prepared.unknown_words,
            zones=found.zones,
            timings_ms=dict(clock.timings_ms),
            index=IndexState(prepared.snapshot.count, prepared.snapshot.revision),
            exact=found.exact,
            lost=found.lost,
        )

    def _explanation(self, prepared: Prepared, composed: Composed, stored: NDArray[Any]) -> Explanation:
        tokens = stored.astype(np.float64)  # (M, D)
        best = int((tokens @ composed.vector).argmax())
        token, base = tokens[best], composed.base.astype(np.float64)
        names = self.bundle.vocabulary.names if prepared.query.text is not None else ()
        sub_queries = dict(zip(names, composed.sub_queries.astype(np.float64), strict=False))
        parts = {name: float(weight) * part for (name, part), weight in zip(sub_queries.items(), composed.weights, strict=False)}
        total = base + sum(parts.values(), np.zeros_like(token))
        length = float(np.linalg.norm(total)) or 1.0
        if prepared.query.unlike:
            length *= float(np.linalg.norm(total / length - composed.unlike)) or 1.0
        first = float(np.linalg.norm(total)) or 1.0
        return Explanation(
            token=best,
            base=float(base @ token) / length,
            attributes={name: float(part @ token) / length for name, part in parts.items()},
            unlike=-float(composed.unlike @ token) * first / length,
            base_similarity=_cosine(base, token),
            similarities={name: _cosine(part, token) for name, part in sub_queries.items()},
        )

    def _zone_spec(self, zones: bool | ZoneSpec) -> ZoneSpec | None:
        if zones is False:
            return None
        spec = self.bundle.manifest.zones if zones is True else zones
        return msgspec.structs.replace(spec, policy="hardest")  # for people: the best of the mid zone, not a sample of it


class QueryBatcher:
    """An engine behind a `Batcher`. Uploads, texts and filters are read before they queue up, so that what is wrong with one is told at
    once, and big photographs hold up nobody's batch: in the caller's own thread, or for tasks in one of `readers` threads (None: as many
    as there are processors). What a task asks is read in the event loop's thread only where that takes less than a change of threads, as it
    never does where another process is asked for items; item tokens, which may be on the disk, are read by the batch. Answers are those of
    `RetrievalEngine.search`; their timings have "wait", for a reader, in the queue and for what a batch's others had still to do, too."""

    def __init__(
        self,
        engine: RetrievalEngine,
        *,
        most: int,
        patience: float,
        room: int,
        readers: int | None,
        niceness: int = 0,
        counts: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Raises InputError for bounds that are not positive (`patience`: negative)."""
        readers = available_cpus() if readers is None else readers
        check_count("readers", readers, 1)
        self.engine, self._counts = engine, counts
        self._batcher: Batcher[tuple[Prepared, Clock], SearchResult] = Batcher(
            self._answer, most=most, patience=patience, room=room, niceness=niceness
        )
        self._readers = ThreadPoolExecutor(readers, "dqe-reader", give_way, (niceness,))

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def search(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """Raises InputError, OverloadError where too many wait, and DeadlineError after `timeout` seconds in the queue and the batch."""
        return self._batcher.ask(self._prepared(query), timeout=timeout)

    async def search_async(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """The same for a task. Uploads that wait for a reader count as waiting, and `timeout` covers them, too. A task that is cancelled
        leaves the queue, and what it uploaded is not decoded any more."""
        if not (_is_small(query) and self.engine.searched.at_hand):
            return await self._batcher.ask_later_async(partial(self._read, query), self._readers, timeout=timeout)
        return await self._batcher.ask_async(self._prepared(query), timeout=timeout)

    def close(self) -> None:
        """Answer what waits and take no more."""
        self._batcher.close()
        if self._batcher.is_at_home:
            self._readers.shutdown(wait=False)

    def __enter__(self) -> QueryBatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, query: Query) -> tuple[Prepared, Clock]:
        """`_prepared` in a reader's thread, which also makes the bitmap of a large filter."""
        prepared, clock = self._prepared(query)
        if prepared.filter is not None:
            prepared.snapshot.prepare(prepared.filter)  # kept, so the batch finds it
        return prepared, clock

    def _prepared(self, query: Query) -> tuple[Prepared, Clock]:
        clock = Clock((*STAGES, "wait"))
        prepared = self.engine._encoder.prepare(query, self.engine.searched.snapshot(), clock)
        clock.lap("decode")
        return prepared, clock

    def _answer(self, questions: Sequence[tuple[Prepared, Clock]]) -> list[SearchResult]:
        self._counts(len(questions))
        for _, clock in questions:
            clock.lap("wait")
        shared = Clock(STAGES)
        results = self.engine._answer([prepared for prepared, _ in questions], shared)
        return [
            replace(result, timings_ms={stage: own.timings_ms[stage] + shared.timings_ms.get(stage, 0.0) for stage in own.timings_ms})
            for result, (_, own) in zip(results, questions, strict=True)
        ]


def _is_small(query: Query) -> bool:
    """Whether it is checked within some ten microseconds, or is no query at all, which is told as fast."""
    if not isinstance(query, Query):
        return True
    sizes = len(query.text or ""), len(query.unlike), len(query.weights), len(query.absolute_weights)
    return query.image is None and max(sizes) <= _SMALL and (query.filter is None or is_small(query.filter, _SMALL))


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0
