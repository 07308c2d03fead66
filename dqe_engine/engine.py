"""`RetrievalEngine`: a bundle and an index behind two calls, `index_images` and `search`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from .batching import Batcher
from .bundle import Bundle
from .caches import CacheStats
from .contracts.graphs import GraphSpec
from .contracts.zones import ZoneSpec
from .dialogue import Dialogue
from .encoder import STAGES, Clock, Composed, Prepared, QueryEncoder
from .errors import DQEError, InputError
from .image_policy import DEFAULT_POLICY, ImagePolicy
from .image_sources import ImageSource, decode_ahead, image_pairs
from .index import GalleryIndex, ImageStorage, Storage
from .index.validation import check_count, check_ids
from .preprocessing import ImageLike, fit_image, open_image
from .query import Query
from .results import (
    EncodedImages,
    EncodedQueries,
    Explanation,
    Hit,
    IndexingReport,
    SearchResult,
    SkippedImage,
    ZoneMembers,
    build_result_parts,
)
from .sessions import GraphSession, Provider

Progress = Callable[[int, int], None]
KEPT_BYTES = 64 << 20
"""Of image tokens of uploads, and again of composed queries, that an engine remembers."""

__all__ = ["STAGES", "RetrievalEngine"]


class RetrievalEngine:
    """Composed image retrieval over one index. Threads may search at the same time: a request changes no shared state."""

    def __init__(
        self,
        bundle: Bundle,
        open_graph: Callable[[GraphSpec], GraphSession],
        *,
        index: GalleryIndex | None = None,
        threads: int = 0,
        images: ImagePolicy = DEFAULT_POLICY,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """Most callers want `load`; this takes sessions of any runtime. Without `index`, an empty one is made. `threads`: of a search
        at most, 0 for one per processor. `images` and `kept_bytes`: see `load`."""
        self.bundle = bundle
        self.image_policy = images
        self._threads = threads
        self._encoder = QueryEncoder(bundle, open_graph, images, kept_bytes)
        self._index = GalleryIndex.for_bundle(bundle)
        if index is not None:
            self.attach(index)

    @classmethod
    def load(
        cls,
        bundle_path: str | os.PathLike[str],
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        verify: bool = True,
        images: ImagePolicy = DEFAULT_POLICY,
        kept_bytes: int = KEPT_BYTES,
    ) -> RetrievalEngine:
        """Verify and open a bundle. `threads`: CPU threads of a graph and of a search; None for all, and for one where there is little
        to do. `images`: what this engine accepts as an image and what one may cost, of references and of what is indexed. `kept_bytes`:
        see `QueryEncoder`; 0 to remember nothing. Raises BundleError, and BackendError when the provider that was asked for cannot run."""
        while True:
            bundle = Bundle.load(bundle_path, verify=verify)
            try:
                engine = cls(bundle, partial(bundle.session, provider=provider, threads=threads), threads=threads or 0,
                             images=images, kept_bytes=kept_bytes)  # fmt: skip
            except DQEError:
                if bundle.is_current():
                    raise
                continue
            if bundle.is_current():  # else the files that were opened may be another bundle's, or of two
                return engine

    @property
    def providers(self) -> dict[str, str]:
        """What runs each graph."""
        return {session.spec.name: session.provider for session in self._encoder.sessions}

    @property
    def index(self) -> GalleryIndex:
        return self._index

    def attach(self, index: GalleryIndex) -> None:
        """Search this index from now on. Raises IndexFormatError when it was made with another model."""
        index.require_model(self.bundle.model_hash)
        self._index = index

    def new_index(self, *, storage: Storage = "f32", image_storage: ImageStorage = "f16") -> GalleryIndex:
        """Attach an empty index with these storage options (see `GalleryIndex`) and return it."""
        self._index = GalleryIndex.for_bundle(self.bundle, storage=storage, image_storage=image_storage)
        return self._index

    def load_index(self, path: str | os.PathLike[str], *, verify: bool = False, screened: bool | None = None) -> None:
        """Attach a saved index; options and errors are those of `GalleryIndex.load`, also for another model's."""
        self._index = GalleryIndex.load(path, model_hash=self.bundle.model_hash, verify=verify, screened=screened)

    def save_index(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """See `GalleryIndex.save`."""
        self._index.save(path, overwrite=overwrite)

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

    def index_images(
        self,
        images: ImageSource,
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        replace: bool = False,
        decode_threads: int = 4,
    ) -> IndexingReport:
        """Encode images and add them to the index, batch by batch; `save_index` makes them durable.

        images: see `image_pairs`. metadata: by id. progress: called after every batch with (images done, images in all); what
        it raises stops the work between two batches. on_error: "raise" stops at an image that cannot be read, "skip"
        goes on and reports it. Existing ids are refused before any work, unless `replace`. Whatever stops it, the batches
        that were added stay. Raises InputError.
        """
        check_count("batch_size", batch_size, 1)
        check_count("decode_threads", decode_threads, 1)
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error is 'raise' or 'skip', got {on_error!r}")
        index, skipped = self._index, list[SkippedImage]()
        pairs = image_pairs(images, self.image_policy)
        if on_error == "skip":
            pairs = usable_pairs(pairs, skipped)
        check_ids([id for id, _ in pairs])
        if not replace and (existing := [id for id, _ in pairs if id in index]):
            raise InputError(f"{existing[0]!r} and {len(existing) - 1} more ids are in the index already; leave them out, or replace=True")
        if metadata and (unknown := metadata.keys() - dict(pairs).keys()):
            raise InputError(f"metadata for {sorted(unknown)[0]!r}, which is not among the images")
        added: list[str] = []
        batch: list[tuple[str, NDArray[np.uint8]]] = []
        decoded = decode_ahead(
            pairs, self.bundle.manifest.preprocessing, ahead=2 * batch_size, threads=decode_threads, policy=self.image_policy
        )
        with closing(decoded):
            for done, (id, pixels) in enumerate(decoded, start=1):
                if not isinstance(pixels, InputError):
                    batch.append((id, pixels))
                elif on_error == "raise":
                    raise pixels
                else:
                    skipped.append(SkippedImage(id, str(pixels)))
                if len(batch) == batch_size or done == len(pairs):
                    self._add_batch(index, batch, metadata or {}, replace=replace)
                    added += [id for id, _ in batch]
                    batch = []
                    if progress is not None:
                        progress(done, len(pairs))
        return IndexingReport(tuple(added), tuple(skipped))

    def encode_queries(self, queries: Sequence[Query]) -> EncodedQueries:
        """The vectors that `search_batch` searches by. Raises InputError."""
        snapshot, clock = self._index.snapshot(), Clock(STAGES[:-1])
        prepared = [self._encoder.prepare(query, snapshot, clock) for query in queries]
        composed = self._encoder.compose(prepared, clock)
        attributes, width = self.bundle.sizes.attributes, self.bundle.sizes.embedding_dim
        return EncodedQueries(
            queries=np.array([one.vector for one in composed], np.float32).reshape(-1, width),
            predicted_weights=np.array([one.predicted for one in composed], np.float32).reshape(-1, attributes),
            weights=np.array([one.weights for one in composed], np.float32).reshape(-1, attributes),
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
        snapshot, clock = self._index.snapshot(), Clock(STAGES)
        return self._answer([self._encoder.prepare(query, snapshot, clock) for query in queries], clock)

    def dialogue(self, query: Query) -> Dialogue:
        """A search that goes on from its own hits: refined, turned away from examples, and undone."""
        return Dialogue(self, query)

    def batcher(self, *, most: int = 32, patience: float = 0.0, room: int = 256) -> QueryBatcher:
        """For servers: queries of many threads and tasks, answered together. See `Batcher`."""
        return QueryBatcher(self, most=most, patience=patience, room=room)

    def warm_up(self) -> None:
        """Do what the first search would have to: run every graph once, and make the screen of the index."""
        spec, snapshot = self.bundle.manifest.preprocessing, self._index.snapshot()
        pixels = np.full((spec.image_size, spec.image_size, 3), 255, np.uint8)
        tokens = self._encoder.encode_pixels([pixels]).image_tokens[0]
        ids = self._encoder.text.tokenise([self.bundle.vocabulary.names[0]])[0].ids
        self._answer([Prepared(Query(text="", k=1), snapshot, image_tokens=tokens, ids=ids)], Clock())

    @property
    def remembered(self) -> dict[str, CacheStats]:
        """What is remembered of image tokens of "uploads", and of "queries" as the encoder gave them."""
        return {"uploads": self._encoder.uploads.stats(), "queries": self._encoder.fused.stats()}

    def _answer(self, prepared: Sequence[Prepared], clock: Clock) -> tuple[SearchResult, ...]:
        composed = self._encoder.compose(prepared, clock)
        found = self._search(prepared, composed)
        clock.lap("search")
        return tuple(self._result(one, made, found[b], clock) for b, (one, made) in enumerate(zip(prepared, composed, strict=True)))

    def _search(self, prepared: Sequence[Prepared], composed: Sequence[Composed]) -> dict[int, tuple[tuple[Hit, ...], ZoneMembers | None]]:
        """Hits and zone members by place: one search for queries of the same snapshot, filter and zones."""
        groups: dict[Any, list[int]] = {}
        for b, one in enumerate(prepared):
            query = one.query
            spec = self._zone_spec(query.zones)
            digest = None if one.filter is None else one.filter.digest
            groups.setdefault((id(one.snapshot), digest, spec), []).append(b)
        found: dict[int, tuple[tuple[Hit, ...], ZoneMembers | None]] = {}
        for (_, _, spec), rows in groups.items():
            queries = [prepared[b].query for b in rows]
            most = max(query.k + query.offset for query in queries)
            matches = prepared[rows[0]].snapshot.search(
                np.stack([composed[b].vector for b in rows]), most, exclude=[query.excluded() for query in queries],
                filter=prepared[rows[0]].filter, zones=spec, picks=max(query.k for query in queries) if spec else 0, threads=self._threads,
            )  # fmt: skip
            for b, query, ranking in zip(rows, queries, matches, strict=True):
                kept = replace(ranking, matches=ranking.matches[: query.k + query.offset], picks=ranking.picks[: query.k])
                found[b] = build_result_parts(kept, offset=query.offset, minimum_score=query.minimum_score)
        return found

    def _result(
        self, prepared: Prepared, composed: Composed, found: tuple[tuple[Hit, ...], ZoneMembers | None], clock: Clock
    ) -> SearchResult:
        (hits, members), query, names = found, prepared.query, self.bundle.vocabulary.names
        if query.explain:
            hits = tuple([replace(hit, explanation=self._explanation(prepared, composed, hit.id)) for hit in hits])
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
            zones=members,
            timings_ms=dict(clock.timings_ms),
        )

    def _explanation(self, prepared: Prepared, composed: Composed, id: str) -> Explanation:
        snapshot, names = prepared.snapshot, self.bundle.vocabulary.names
        tokens = snapshot.target_tokens(snapshot.existing(id)).astype(np.float64)  # (M, D)
        best = int((tokens @ composed.vector).argmax())
        token, parts = tokens[best], {"image" if prepared.query.text is None else "base": composed.base.astype(np.float64)}
        similarities = {name: _cosine(part, token) for name, part in parts.items()}
        if prepared.query.text is not None:
            for name, weight, sub_query in zip(names, composed.weights, composed.sub_queries.astype(np.float64), strict=True):
                parts[name], similarities[name] = float(weight) * sub_query, _cosine(sub_query, token)
        total = sum(parts.values(), np.zeros_like(token))
        length = float(np.linalg.norm(total)) or 1.0
        scaled = {name: part / length for name, part in parts.items()}
        if prepared.query.unlike:
            left = total / length - composed.unlike
            length = float(np.linalg.norm(left)) or 1.0
            scaled = {name: part / length for name, part in (*scaled.items(), ("unlike", -composed.unlike.astype(np.float64)))}
        return Explanation(best, {name: float(part @ token) for name, part in scaled.items()}, similarities)

    def _zone_spec(self, zones: bool | ZoneSpec) -> ZoneSpec | None:
        if zones is False:
            return None
        spec = self.bundle.manifest.zones if zones is True else zones
        return msgspec.structs.replace(spec, policy="hardest")  # for people: the best of the mid zone, not a sample of it

    def _add_batch(
        self,
        index: GalleryIndex,
        batch: Sequence[tuple[str, NDArray[np.uint8]]],
        metadata: Mapping[str, Mapping[str, Any]],
        *,
        replace: bool,
    ) -> None:
        encoded = self._encoder.encode_pixels([pixels for _, pixels in batch])
        index.add(
            [id for id, _ in batch],
            encoded.target_tokens,
            None if index.image_storage == "none" else encoded.image_tokens,
            [metadata.get(id) for id, _ in batch],
            replace=replace,
        )


class QueryBatcher:
    """An engine behind a `Batcher`. Images, texts and filters are read in the caller's own thread, before they queue up, so that what is
    wrong with one is told at once, and big photographs hold up nobody's batch. Answers are those of `RetrievalEngine.search`; their
    timings have "wait", in the queue, too."""

    def __init__(self, engine: RetrievalEngine, *, most: int, patience: float, room: int) -> None:
        self.engine = engine
        self._batcher: Batcher[tuple[Prepared, Clock], SearchResult] = Batcher(self._answer, most=most, patience=patience, room=room)

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def search(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """Raises InputError, OverloadError where too many wait, and DeadlineError after `timeout` seconds in the queue and the batch."""
        return self._batcher.ask(self._prepared(query), timeout=timeout)

    async def search_async(self, query: Query, *, timeout: float | None = None) -> SearchResult:
        """The same for a task; uploads are decoded in a thread of the event loop's pool. A task that is cancelled leaves the queue."""
        loop = asyncio.get_running_loop()
        prepared = self._prepared(query) if query.image is None else await loop.run_in_executor(None, self._prepared, query)
        return await self._batcher.ask_async(prepared, timeout=timeout)

    def close(self) -> None:
        """Answer what waits and take no more."""
        self._batcher.close()

    def __enter__(self) -> QueryBatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _prepared(self, query: Query) -> tuple[Prepared, Clock]:
        clock = Clock((*STAGES, "wait"))
        prepared = self.engine._encoder.prepare(query, self.engine.index.snapshot(), clock)
        clock.lap("decode")
        return prepared, clock

    def _answer(self, questions: Sequence[tuple[Prepared, Clock]]) -> list[SearchResult]:
        for _, clock in questions:
            clock.lap("wait")
        shared = Clock(STAGES)
        results = self.engine._answer([prepared for prepared, _ in questions], shared)
        return [
            replace(result, timings_ms={stage: own.timings_ms[stage] + shared.timings_ms.get(stage, 0.0) for stage in own.timings_ms})
            for result, (_, own) in zip(results, questions, strict=True)
        ]


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def usable_pairs(pairs: Sequence[tuple[str, ImageLike]], skipped: list[SkippedImage]) -> list[tuple[str, ImageLike]]:
    """Pairs whose id can be one; the others (file names that are not Unicode) are added to `skipped`."""
    usable = []
    for id, image in pairs:
        try:
            check_ids([id])
            usable.append((id, image))
        except InputError as error:
            skipped.append(SkippedImage(id, str(error)))
    return usable
