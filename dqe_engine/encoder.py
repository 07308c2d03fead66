"""From queries to vectors: images and texts through a bundle's graphs, and the composition that weights and examples change."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .caches import ArrayCache
from .compose import apply_overrides, compose_query
from .contracts.graphs import GRAPHS, GraphSpec
from .errors import BackendError, InputError
from .image_policy import ImagePolicy
from .index.filters import Combination, compile_filter
from .index.snapshot import Snapshot
from .preprocessing import fit_image, normalise, open_image
from .query import Query
from .results import EncodedImages
from .sessions import GraphSession, text_buckets

F32 = NDArray[np.float32]
STAGES = ("decode", "preprocess", "tokenise", "vision", "query", "attributes", "compose", "search")
UNLIKE = 0.3
"""How much of an unwanted item's best token leaves the query, whose length is 1 (Rocchio's feedback)."""


class Clock:
    """Milliseconds by stage: each `lap` ends a part of one, which began where the last one ended."""

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self.timings_ms = dict.fromkeys(stages, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.timings_ms[stage] = self.timings_ms.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


@dataclass(frozen=True, eq=False)
class Prepared:
    """A query that was read and checked, whatever of it can be done alone: the rest is done for a batch.

    key: of the reference image, where it is known by what is in it. image_tokens: (P, Hv), where they were at hand; else pixels, the image
    fitted to (S, S, 3) uint8; neither for a text alone. target_tokens: (M, D) of an item, for an image alone. ids: of the text's tokens.
    """

    query: Query
    snapshot: Snapshot
    filter: Combination | None = None
    key: Hashable | None = None
    image_tokens: F32 | None = None
    pixels: NDArray[np.uint8] | None = None
    target_tokens: F32 | None = None
    ids: tuple[int, ...] = ()
    truncated: bool = False
    unknown_words: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Composed:
    """A query's vector (D,), unit norm, and what it is made of: base (D,), sub_queries (A, D), predicted and used weights (A,), and
    `unlike` (D,), what examples took out of it."""

    vector: F32
    base: F32
    sub_queries: F32
    predicted: F32
    weights: F32
    unlike: F32


class QueryEncoder:
    """The graphs of a bundle behind `prepare`, for one query, and `compose`, for a batch of them. Threads may share it.

    `kept_bytes`: of image tokens of uploads, by the hash of their bytes, and again of what the query encoder made of an image and a text,
    so that other weights, filters and pages of the same question cost a search alone.
    """

    def __init__(self, bundle: Bundle, open_graph: Callable[[GraphSpec], GraphSession], policy: ImagePolicy, kept_bytes: int) -> None:
        self.bundle, self.policy = bundle, policy
        self.sessions = self._vision, self._query, self._attributes, self._target = tuple(map(open_graph, GRAPHS))
        self.text = bundle.text_encoder()
        self._lengths = text_buckets(self._query, self._attributes)
        self.uploads, self.fused = ArrayCache(kept_bytes), ArrayCache(kept_bytes)

    def encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> EncodedImages:
        """Images fitted to (S, S, 3) uint8."""
        image_tokens = self._vision.run(pixel_values=self._normalised(pixels))["image_tokens"]
        return EncodedImages(self._target.run(image_tokens=image_tokens)["target_tokens"], image_tokens)

    def prepare(self, query: Query, snapshot: Snapshot, clock: Clock) -> Prepared:
        """Read the query's image, text and filter and check them. Raises InputError."""
        if not isinstance(query, Query):
            raise InputError(f"expected a Query, got {type(query).__name__}; such as Query(image=Path('photo.jpg'), text='in red')")
        filter = None if query.filter is None else compile_filter(query.filter)
        key, tokens, pixels, targets = self._reference(query, snapshot, clock)
        for id in query.unlike:
            snapshot.existing(id)
        names = self.bundle.vocabulary.names
        for name in (*query.weights, *query.absolute_weights):
            if name not in names:
                raise InputError(f"unknown attribute {name!r}; this model has {', '.join(names)}")
        if query.text is None:
            return Prepared(query, snapshot, filter, key, tokens, pixels, targets)
        (read,) = self.text.tokenise([query.text])
        clock.lap("tokenise")
        return Prepared(query, snapshot, filter, key, tokens, pixels, None, read.ids, read.truncated, read.unknown_words)

    def compose(self, prepared: Sequence[Prepared], clock: Clock) -> list[Composed]:
        """Vectors of queries of any kinds, each as if it were alone. Raises BackendError for values that are not finite."""
        if not prepared:
            return []
        image_tokens = self._image_tokens(prepared, clock)
        parts = self._fused(prepared, image_tokens, clock)
        parts |= self._similar(prepared, image_tokens, clock)
        base, sub_queries, predicted = (np.stack([parts[b][i] for b in range(len(prepared))]) for i in range(3))
        weights = np.stack([self._weights(one.query, row) for one, row in zip(prepared, predicted, strict=True)])
        vectors = compose_query(base, sub_queries, weights)  # (B, D)
        unlike = np.zeros_like(vectors)
        for b, one in enumerate(prepared):
            if one.query.unlike:
                unlike[b] = self._unlike(one, vectors[b])
                (vectors[b],) = compose_query((vectors[b] - unlike[b])[None], sub_queries[b : b + 1], np.zeros_like(weights[b : b + 1]))
        if not np.isfinite(vectors).all():
            raise BackendError("the query encoder gave values that are not finite; export the bundle in a higher precision")
        composed = [Composed(*rows) for rows in zip(vectors, base, sub_queries, predicted, weights, unlike, strict=True)]
        clock.lap("compose")
        return composed

    def _reference(
        self, query: Query, snapshot: Snapshot, clock: Clock
    ) -> tuple[Hashable | None, F32 | None, NDArray[np.uint8] | None, F32 | None]:
        if query.reference_id is not None:
            if (row := snapshot.row(query.reference_id)) is None:
                raise InputError(f"{query.reference_id!r} is not an id of the index; pass an image that is not in it as image=...")
            key = (snapshot.table.identity, row)
            if query.text is None:
                targets = snapshot.target_tokens(row).astype(np.float32)
                clock.lap("decode")
                return key, None, None, targets
            tokens = np.array(snapshot.image_tokens(row), np.float32)  # from the disk, perhaps
            clock.lap("decode")
            return key, tokens, None, None
        if query.image is None:
            return ("no image",), None, None, None
        return *self._upload(query, clock), None

    def _upload(self, query: Query, clock: Clock) -> tuple[Hashable | None, F32 | None, NDArray[np.uint8] | None]:
        image, key = query.image, None
        assert image is not None
        if isinstance(image, bytes):
            key = hashlib.blake2b(image, digest_size=20).digest()
            if (kept := self.uploads.get(key)) is not None:
                clock.lap("decode")
                return key, kept[0], None
        spec = self.bundle.manifest.preprocessing
        opened = open_image(image, spec, self.policy)
        clock.lap("decode")
        pixels = fit_image(opened, spec)  # at once: a batch of photographs is not held in full size
        clock.lap("preprocess")
        return key, None, pixels

    def _image_tokens(self, prepared: Sequence[Prepared], clock: Clock) -> dict[int, F32]:
        """(P, Hv) of each query that has an image, by its place: what was at hand, and the rest through the vision encoder."""
        found = {b: one.image_tokens for b, one in enumerate(prepared) if one.image_tokens is not None}
        rows = [(b, one.pixels) for b, one in enumerate(prepared) if one.pixels is not None]
        if rows:
            values = self._normalised([pixels for _, pixels in rows])
            clock.lap("preprocess")
            encoded = self._vision.run(pixel_values=values)["image_tokens"]
            clock.lap("vision")
            for (b, _), tokens in zip(rows, encoded, strict=True):
                found[b] = tokens
                if (key := prepared[b].key) is not None:
                    self.uploads.put(key, (tokens,))
        return found

    def _fused(self, prepared: Sequence[Prepared], image_tokens: dict[int, F32], clock: Clock) -> dict[int, tuple[F32, F32, F32]]:
        """Base query, sub-queries and predicted weights of the queries with a text, by their place."""
        sizes, found, rows = self.bundle.sizes, dict[int, tuple[F32, F32, F32]](), list[int]()
        for b, one in enumerate(prepared):
            if one.query.text is not None:
                kept = None if one.key is None else self.fused.get((one.key, _digest(one.ids)))
                if kept is not None:
                    found[b] = (kept[0], kept[1], kept[2])
                else:
                    rows.append(b)
        if not rows:
            return found
        nothing = np.zeros((sizes.image_tokens, sizes.vision_width), np.float32)  # a text alone: an image of which there is nothing
        encoded = self.text.pad([prepared[b].ids for b in rows], lengths=self._lengths)
        tokens = np.stack([image_tokens.get(b, nothing) for b in rows])
        fused = self._query.run(image_tokens=tokens, input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        base = fused.pop("base_query")
        clock.lap("query")
        read = self._attributes.run(**fused, attention_mask=encoded.attention_mask)
        clock.lap("attributes")
        for b, *parts in zip(rows, base, read["sub_queries"], read["attribute_weights"], strict=True):
            found[b] = (parts[0], parts[1], parts[2])
            if (key := prepared[b].key) is not None:
                self.fused.put((key, _digest(prepared[b].ids)), found[b])
        return found

    def _similar(self, prepared: Sequence[Prepared], image_tokens: dict[int, F32], clock: Clock) -> dict[int, tuple[F32, F32, F32]]:
        """The same of images alone: the mean of the tokens by which the gallery is searched, and nothing of the attributes."""
        sizes = self.bundle.sizes
        targets = {b: one.target_tokens for b, one in enumerate(prepared) if one.target_tokens is not None}
        rows = [b for b, one in enumerate(prepared) if one.query.text is None and b not in targets]
        if rows:
            encoded = self._target.run(image_tokens=np.stack([image_tokens[b] for b in rows]))["target_tokens"]
            targets |= dict(zip(rows, encoded, strict=True))
            clock.lap("query")
        none, zeros = np.zeros((sizes.attributes, sizes.embedding_dim), np.float32), np.zeros(sizes.attributes, np.float32)
        return {b: (tokens.mean(axis=0, dtype=np.float64).astype(np.float32), none, zeros) for b, tokens in targets.items()}

    def _weights(self, query: Query, predicted: F32) -> F32:
        """(A,) predicted weights of one query, with its own in their place."""
        if not query.weights and not query.absolute_weights:
            return predicted
        names = self.bundle.vocabulary.names
        weights: F32 = apply_overrides(predicted[None], names, query.weights)[0]
        for name, value in query.absolute_weights.items():
            weights[names.index(name)] = value
        return weights

    def _unlike(self, prepared: Prepared, vector: F32) -> F32:
        """(D,) that unwanted items take out of a query's vector."""
        taken = np.zeros_like(vector)
        for id in prepared.query.unlike:
            tokens = prepared.snapshot.target_tokens(prepared.snapshot.existing(id)).astype(np.float32)
            taken += UNLIKE * tokens[(tokens @ vector).argmax()]
        return taken

    def _normalised(self, pixels: Sequence[NDArray[np.uint8]]) -> F32:
        spec = self.bundle.manifest.preprocessing
        if not pixels:
            return np.empty((0, 3, spec.image_size, spec.image_size), np.float32)
        return normalise(np.stack(pixels), spec)


def _digest(ids: tuple[int, ...]) -> bytes:
    """A key for a text's tokens, of which a long text has kilobytes."""
    return hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=20).digest()
