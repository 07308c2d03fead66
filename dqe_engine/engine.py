"""`RetrievalEngine`: a bundle and an index behind two calls, `index_images` and `search`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .answering import Answerer
from .bundle import Bundle, bundle_folder
from .caches import CacheStats
from .contracts.graphs import GraphSpec
from .dialogue import Dialogue
from .encoder import STAGES, Clock, Prepared, QueryEncoder
from .errors import DQEError, InputError
from .forks import ProcessBound
from .image_policy import DEFAULT_POLICY, ImagePolicy
from .image_sources import ImageSource, Pixels, image_pairs
from .index import GalleryIndex, ImageStorage, Storage
from .index.searched import SearchedIndex
from .index.validation import check_count
from .indexer import Indexer, Progress
from .preprocessing import ImageLike, fit_image, open_image
from .query import Query
from .query_batcher import QueryBatcher
from .results import EncodedImages, EncodedQueries, IndexingReport, SearchResult
from .sessions import GraphSession, Provider

if TYPE_CHECKING:
    from .index.on_devices import DeviceIndex

REMEMBERED_BYTES = 64 << 20
"""Maximum bytes that an engine remembers of the image tokens of uploads, and as many of composed queries."""

__all__ = ["STAGES", "RetrievalEngine"]


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
        self._encoder = QueryEncoder(bundle, open_graph, images, kept_bytes)
        self._answerer = Answerer(bundle, self._encoder, threads)
        self._index: SearchedIndex = GalleryIndex.for_bundle(bundle)
        self._on_devices: DeviceIndex | None = None  # a copy of the index, which is searched
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
        """Close the index (see `GalleryIndex.close`) and its copy on devices. The graphs are freed with the engine object."""
        if self._on_devices is not None:
            self._on_devices.close()
        self._index.close()

    @property
    def providers(self) -> dict[str, str]:
        """The provider that runs each graph, by the graph's name."""
        return {session.spec.name: session.provider for session in self._encoder.sessions}

    @property
    def index(self) -> GalleryIndex:
        """The index, if it is a `GalleryIndex`. Raises InputError for other kinds, which cannot be changed through an engine."""
        if not isinstance(self._index, GalleryIndex):
            raise InputError(f"this engine searches {self._index!r}, which an engine cannot change; attach a GalleryIndex for that")
        return self._index

    @property
    def attached(self) -> SearchedIndex:
        """The index, of any kind. After `search_on`, `searched` is a copy of it."""
        return self._index

    @property
    def searched(self) -> SearchedIndex:
        """The index that is searched: a `GalleryIndex`, its copy on devices (`search_on`), or another kind that was attached."""
        return self._index if self._on_devices is None else self._on_devices

    def search_on(self, devices: Sequence[int]) -> None:
        """Search a copy of the `GalleryIndex`, as it is now, on these CUDA devices (see `DeviceIndex`); on the host again if none is given.
        Changes and saves go to the index, not to the copy; call this again to search them. While a copy is made, the one before is
        searched, so a device needs room for both. Raises InputError for devices that are not there, BackendError where one has no room or
        the CUDA kernels are missing."""
        from dqe_engine.index.on_devices import DeviceIndex

        # The one before is not closed: a search may be about to ask it. Its memory goes with the last of them.
        self._on_devices = DeviceIndex(self.index, devices) if devices else None

    def attach(self, index: SearchedIndex) -> None:
        """Search this index from now on: a `GalleryIndex`, a `ShardedIndex` or a `MilvusIndex`. Raises IndexFormatError when it was made
        with another model."""
        index.require_model(self.bundle.model_hash)
        self._index, self._on_devices = index, None

    def new_index(self, *, storage: Storage = "f32", image_storage: ImageStorage = "f16") -> GalleryIndex:
        """Attach an empty index with these storage options (see `GalleryIndex`) and return it."""
        index = GalleryIndex.for_bundle(self.bundle, storage=storage, image_storage=image_storage)
        self._index, self._on_devices = index, None
        return index

    def load_index(self, path: str | os.PathLike[str], *, verify: bool = False, screened: bool | None = None, mapped: bool = True) -> None:
        """Attach a saved index; options and errors are those of `GalleryIndex.load`, also for another model's."""
        self._index = GalleryIndex.load(path, model_hash=self.bundle.model_hash, verify=verify, screened=screened, mapped=mapped)
        self._on_devices = None

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
        item keeps its metadata unless other is given. The other options are those of `Indexer.plan` and `Indexer.embed`. Arguments are
        checked before any work; if it stops later, the batches that were added stay. Raises InputError.
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
        snapshot, clock = self.searched.snapshot(), Clock(STAGES[:-1])
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
        snapshot, clock = self.searched.snapshot(), Clock(STAGES)
        return self._answerer.answer([self._encoder.prepare(query, snapshot, clock) for query in queries], clock)

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
        return QueryBatcher(
            self, self._encoder, self._answerer,
            most=most, patience=patience, room=room, readers=readers, niceness=niceness, counts=counts,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Run every graph once and make the screen of the index, so that the first search is not slower than the next."""
        spec, snapshot = self.bundle.manifest.preprocessing, self.searched.snapshot()
        pixels = np.full((spec.image_size, spec.image_size, 3), 255, np.uint8)
        tokens = self._encoder.encode_pixels([pixels]).image_tokens[0]
        ids = self._encoder.text.tokenise(["red"])[0].ids
        self._answerer.answer([Prepared(Query(text="", k=1), snapshot, image_tokens=tokens, ids=ids)], Clock())

    @property
    def remembered(self) -> dict[str, CacheStats]:
        """Entries, bytes, hits and misses of the two caches: image tokens of "uploads", and outputs of the query encoder for "queries"."""
        return {"uploads": self._encoder.uploads.stats(), "queries": self._encoder.fused.stats()}
