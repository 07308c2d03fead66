"""`RetrievalEngine`: a bundle and an index behind two calls, `index_images` and `search`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .compose import apply_overrides, compose_query
from .contracts.graphs import GRAPHS, GraphSpec
from .contracts.zones import ZoneSpec
from .errors import BackendError, DQEError, InputError
from .image_policy import DEFAULT_POLICY, ImagePolicy
from .image_sources import ImageSource, image_pairs
from .index import GalleryIndex, ImageStorage, Storage
from .index.filters import Filter
from .index.indexer import Indexer, Progress
from .index.validation import check_count
from .preprocessing import ImageLike, fit_image, normalise, open_image
from .references import ItemId, Reference, one_reference
from .results import EncodedImages, EncodedQueries, Hit, IndexingReport, SearchResult, SkippedImage, ZoneMembers, build_result_parts
from .sessions import GraphSession, Provider, text_buckets

STAGES = ("decode", "preprocess", "tokenise", "vision", "query", "attributes", "compose", "search")

__all__ = ["EncodedImages", "EncodedQueries", "Hit", "IndexingReport", "RetrievalEngine", "SearchResult", "SkippedImage", "ZoneMembers"]


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
    ) -> None:
        """Most callers want `load`; this takes sessions of any runtime. Without `index`, an empty one is made. `threads`: of a search
        at most, 0 for one per processor. `images`: see `load`."""
        self.bundle = bundle
        self.image_policy = images
        self._threads = threads
        self._sessions = self._vision, self._query, self._attributes, self._target = tuple(map(open_graph, GRAPHS))
        self._text, self._text_lengths = bundle.text_encoder(), text_buckets(self._query, self._attributes)
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
    ) -> RetrievalEngine:
        """Verify and open a bundle. `threads`: CPU threads of a graph and of a search; None for all, and for one where there is little
        to do. `images`: what this engine accepts as an image and what one may cost, of references and of what is indexed. Raises
        BundleError, and BackendError when the provider that was asked for cannot run."""
        while True:
            bundle = Bundle.load(bundle_path, verify=verify)
            try:
                engine = cls(bundle, partial(bundle.session, provider=provider, threads=threads), threads=threads or 0, images=images)
            except DQEError:
                if bundle.is_current():
                    raise
                continue
            if bundle.is_current():  # else the files that were opened may be another bundle's, or of two
                return engine

    @property
    def providers(self) -> dict[str, str]:
        """What runs each graph."""
        return {session.spec.name: session.provider for session in self._sessions}

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
            self._encode_pixels([fit_image(open_image(image, spec, policy), spec) for image in images[start : start + batch_size]])
            for start in range(0, len(images), batch_size)
        ] or [self._encode_pixels([])]
        return EncodedImages(
            np.concatenate([batch.target_tokens for batch in batches]), np.concatenate([batch.image_tokens for batch in batches])
        )

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
        item keeps its metadata unless other is given. The other options are those of `Indexer.plan` and `Indexer.carry_out`. What is
        refused is refused before any work; whatever stops it later, the batches that were added stay. Raises InputError.
        """
        check_count("batch_size", batch_size, 1)
        indexer = self.indexer(decode_threads=decode_threads)
        plan = indexer.plan(
            image_pairs(images, self.image_policy), metadata=metadata, ignore_unknown=ignore_unknown, add_only=add_only, rehash=rehash,
            on_error=on_error,
        )  # fmt: skip
        return indexer.carry_out(plan, batch_size=batch_size, on_error=on_error, progress=progress)

    def indexer(self, *, decode_threads: int = 4) -> Indexer:
        """Of the attached index, for work in steps: see `Indexer`."""
        return Indexer(
            self._index, self._encode_pixels, self.bundle.manifest.preprocessing, policy=self.image_policy, threads=decode_threads
        )

    def encode_queries(
        self, references: Sequence[Reference], texts: Sequence[str], *, attribute_weights: Mapping[str, float] | None = None
    ) -> EncodedQueries:
        """Composed queries, references and texts by pairs; a reference is an `ItemId` or an image. Raises InputError."""
        return self._encode_queries(self._index, references, texts, attribute_weights)

    def _encode_queries(
        self, index: GalleryIndex, references: Sequence[Reference], texts: Sequence[str], attribute_weights: Mapping[str, float] | None
    ) -> EncodedQueries:
        if len(references) != len(texts):
            raise InputError(f"{len(references)} reference images for {len(texts)} modification texts; a composed query needs one of each")
        clock = _Clock(STAGES[:-1])
        encoded = self._text.encode(texts, lengths=self._text_lengths)
        clock.lap("tokenise")
        image_tokens = self._reference_tokens(index, references, clock)
        fused = self._query.run(image_tokens=image_tokens, input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        base = fused.pop("base_query")
        clock.lap("query")
        read = self._attributes.run(**fused, attention_mask=encoded.attention_mask)
        clock.lap("attributes")
        predicted = read["attribute_weights"]
        weights = apply_overrides(predicted, self.bundle.vocabulary.names, attribute_weights or {})
        queries = compose_query(base, read["sub_queries"], weights)
        if not np.isfinite(queries).all():
            raise BackendError("the query encoder gave values that are not finite; export the bundle in a higher precision")
        clock.lap("compose")
        return EncodedQueries(queries, predicted, weights, encoded.truncated, clock.timings_ms)

    def search(
        self,
        *,
        text: str,
        image: ImageLike | None = None,
        reference_id: str | None = None,
        k: int = 10,
        attribute_weights: Mapping[str, float] | None = None,
        zones: bool | ZoneSpec = False,
        exclude_reference: bool = True,
        filter: Filter | None = None,
    ) -> SearchResult:
        """The k items that best show the reference image changed as the text says.

        image: a `Path`, bytes or PIL image, within the engine's `ImagePolicy`; or reference_id: an item of the index, whose cached
        image tokens are used (no file is looked at, whatever the id is).
        attribute_weights: multipliers of the predicted weights, by attribute. zones: also tell near from mid, by the
        bundle's bounds on Δ to the best hit or by other absolute ones. exclude_reference: leave out the item of `reference_id`.
        filter: on metadata, see `compile_filter`. Raises InputError; image-only and text-only queries are refused.
        """
        return self.search_batch(
            [one_reference(image, reference_id)],
            [text],
            k=k,
            attribute_weights=attribute_weights,
            zones=zones,
            exclude_reference=exclude_reference,
            filter=filter,
        )[0]

    def search_batch(
        self,
        references: Sequence[Reference],
        texts: Sequence[str],
        *,
        k: int = 10,
        attribute_weights: Mapping[str, float] | None = None,
        zones: bool | ZoneSpec = False,
        exclude_reference: bool = True,
        exclude: Sequence[Collection[str]] | None = None,
        filter: Filter | None = None,
    ) -> tuple[SearchResult, ...]:
        """`search` for many queries in one pass through the graphs and the index, references and texts by pairs.

        references: `ItemId("sku-1")` for an item of the index, else an image. exclude: more ids to leave out, per query.

        The batch is encoded at once: memory grows with it, so evaluations pass some tens to hundreds at a time.
        """
        check_count("k", k, 1)
        if exclude is not None and len(exclude) != len(references):
            raise InputError(f"{len(exclude)} exclusions for {len(references)} queries")
        index = self._index  # pinned: `attach` may swap it meanwhile
        encoded = self._encode_queries(index, references, texts, attribute_weights)
        left_out = [set(ids) for ids in exclude] if exclude is not None else [set[str]() for _ in references]
        if exclude_reference:
            for ids, reference in zip(left_out, references, strict=True):
                if isinstance(reference, ItemId):
                    ids.add(reference.id)
        spec = self._zone_spec(zones)
        clock = _Clock()
        found = index.search(encoded.queries, k, exclude=left_out, filter=filter, zones=spec, picks=k if spec else 0, threads=self._threads)
        clock.lap("search")
        timings = {**encoded.timings_ms, **clock.timings_ms}
        names, overrides = self.bundle.vocabulary.names, {name: float(value) for name, value in (attribute_weights or {}).items()}
        weights, predicted = encoded.weights.tolist(), encoded.predicted_weights.tolist()
        return tuple(
            SearchResult(
                hits=hits,
                weights=dict(zip(names, weights[b], strict=True)),
                predicted_weights=dict(zip(names, predicted[b], strict=True)),
                overrides=dict(overrides),
                truncated=encoded.truncated[b],
                zones=members,
                timings_ms=dict(timings),
            )
            for b, (hits, members) in enumerate(map(build_result_parts, found))
        )

    def _zone_spec(self, zones: bool | ZoneSpec) -> ZoneSpec | None:
        if zones is False:
            return None
        spec = self.bundle.manifest.zones if zones is True else zones
        return msgspec.structs.replace(spec, policy="hardest")  # for people: the best of the mid zone, not a sample of it

    def _encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> EncodedImages:
        image_tokens = self._vision.run(pixel_values=self._normalised(pixels))["image_tokens"]
        return EncodedImages(self._target.run(image_tokens=image_tokens)["target_tokens"], image_tokens)

    def _normalised(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        spec = self.bundle.manifest.preprocessing
        if not pixels:
            return np.empty((0, 3, spec.image_size, spec.image_size), np.float32)
        return normalise(np.stack(pixels), spec)

    def _reference_tokens(self, index: GalleryIndex, references: Sequence[Reference], clock: _Clock) -> NDArray[np.float32]:
        """Image tokens of the references, (B, P, Hv) float32: from the cache where they are items, else by the vision encoder."""
        sizes, spec = self.bundle.sizes, self.bundle.manifest.preprocessing
        tokens = np.empty((len(references), sizes.image_tokens, sizes.vision_width), np.float32)
        rows, pixels = [], []
        for row, reference in enumerate(references):
            if isinstance(reference, ItemId):
                if reference.id not in index:
                    raise InputError(f"{reference.id!r} is not an id of the index; pass an image that is not in it as image=...")
                index.image_tokens(reference.id, out=tokens[row])
                clock.lap("decode")
                continue
            image = open_image(reference, spec, self.image_policy)
            clock.lap("decode")
            rows.append(row)
            pixels.append(fit_image(image, spec))  # at once: a batch of photographs is not held in full size
            clock.lap("preprocess")
        if rows:
            pixel_values = self._normalised(pixels)
            clock.lap("preprocess")
            tokens[rows] = self._vision.run(pixel_values=pixel_values)["image_tokens"]
            clock.lap("vision")
        return tokens


class _Clock:
    """Milliseconds by stage: each `lap` ends a part of one, which began where the last one ended."""

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self.timings_ms = dict.fromkeys(stages, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now
