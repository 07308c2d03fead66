"""From queries to vectors: images and texts through a bundle's graphs, and the composition that weights and examples change."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .caches import ArrayCache, SharedArrays
from .compose import apply_overrides, compose_query, unknown_attribute
from .contracts.graphs import ATTRIBUTE_HEADS, QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER, GraphSpec, graphs_of
from .device_tokens import Tokens, stacked, to_host
from .errors import BackendError, InputError, UnknownItemError
from .image_policy import ImagePolicy
from .index.filters import Combination, compile_filter, described
from .index.searched import SearchedSnapshot
from .preprocessing import fit_image, normalise, open_image
from .query import Query
from .results import EncodedImages
from .sessions import GraphSession, Resident, common_device, text_buckets
from .zones.arrays import F32

Rows = NDArray[Any]
PASSED_ON = tuple(tensor.name for tensor in ATTRIBUTE_HEADS.inputs if tensor in QUERY_ENCODER.outputs)
"""Outputs of the query encoder that only the attribute heads read."""
Parts = tuple[F32, F32, F32]
"""Of a query: the base query (D,), the sub-queries (A, D) and the predicted weights (A,)."""
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
    """A query that was checked, with what of it can be made alone: the rest is made for a batch.

    key: of the reference image, where it is known by what is in it. image_tokens: (P, Hv), where they are at hand; else pixels, the image
    fitted to (S, S, 3) uint8; neither for a text alone. target_tokens: (M, D) of an item, for an image alone. Tokens of items are views of
    the index, float32 or float16 and perhaps still on the disk: the batch reads them. Those of an upload may lie on the graphs' device.
    ids: of the text's tokens.
    """

    query: Query
    snapshot: SearchedSnapshot
    filter: Combination | None = None
    key: Hashable | None = None
    image_tokens: Tokens | None = None
    pixels: NDArray[np.uint8] | None = None
    target_tokens: Rows | None = None
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

    Where all graphs run on one CUDA device, what one hands to the next stays there, and so do the image tokens that are kept.
    """

    def __init__(self, bundle: Bundle, open_graph: Callable[[GraphSpec], GraphSession], policy: ImagePolicy, kept_bytes: int) -> None:
        self.bundle, self.policy = bundle, policy
        opened = {graph.name: open_graph(graph) for graph in graphs_of(bundle.sizes)}
        self.sessions = tuple(opened.values())
        self._vision, self._query, self._target = (opened[graph.name] for graph in (VISION_ENCODER, QUERY_ENCODER, TARGET_ENCODER))
        self._attributes = opened.get(ATTRIBUTE_HEADS.name)
        self.text = bundle.text_encoder()
        self._lengths = text_buckets(*(session for session in (self._query, self._attributes) if session is not None))
        self._on_device = common_device(*self.sessions) is not None
        self.uploads, self.fused = ArrayCache[Tokens](kept_bytes), ArrayCache[F32](kept_bytes)
        self._pixels = SharedArrays()  # of uploads that are decoded, and not yet encoded

    def encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> EncodedImages:
        """Images fitted to (S, S, 3) uint8."""
        image_tokens = self._run(self._vision, "image_tokens", pixel_values=self._normalised(pixels))["image_tokens"]
        targets = self._run(self._target, image_tokens=image_tokens)["target_tokens"]
        return EncodedImages(to_host(targets), to_host(image_tokens))

    def prepare(self, query: Query, snapshot: SearchedSnapshot, clock: Clock) -> Prepared:
        """Read the query's upload, text and filter and check everything. Nothing is read of the index's files. Raises InputError."""
        if not isinstance(query, Query):
            raise InputError(f"expected a Query, got {type(query).__name__}; such as Query(image=Path('photo.jpg'), text='in red')")
        filter = None if query.filter is None else compile_filter(query.filter)
        key, tokens, pixels, targets = self._reference(query, snapshot, clock)
        snapshot.require(tuple(query.unlike))
        names = self.bundle.vocabulary.names
        for name in (*query.weights, *query.absolute_weights):
            if name not in names:
                raise unknown_attribute(name, names)
        if query.text is None:
            return Prepared(query, snapshot, filter, key, tokens, pixels, targets)
        (read,) = self.text.tokenise([query.text])
        clock.lap("tokenise")
        return Prepared(query, snapshot, filter, key, tokens, pixels, None, read.ids, read.truncated, read.unknown_words)

    def compose(self, prepared: Sequence[Prepared], clock: Clock) -> list[Composed]:
        """Vectors of queries of any kinds, each as if it were alone. Raises BackendError for values that are not finite."""
        keys = [_question(one) for one in prepared]
        parts = self._remembered(keys)
        new = {b: one for b, one in enumerate(prepared) if b not in parts}
        image_tokens = self._image_tokens(new, clock)
        parts |= self._fused(new, keys, image_tokens, clock)
        parts |= self._similar(new, image_tokens, clock)
        composed = self._composed(prepared, [parts[b] for b in range(len(prepared))])
        if not all(np.isfinite(one.vector).all() for one in composed):
            raise BackendError("the query encoder gave values that are not finite; export the bundle in a higher precision")
        clock.lap("compose")
        return composed

    def _reference(
        self, query: Query, snapshot: SearchedSnapshot, clock: Clock
    ) -> tuple[Hashable | None, Tokens | None, NDArray[np.uint8] | None, Rows | None]:
        if query.reference_id is not None:
            if (row := snapshot.row(query.reference_id)) is None:
                raise UnknownItemError(f"{described(query.reference_id)} is not an id of the index; pass the image of what is not in it")
            key = snapshot.key(row)
            if query.text is None:
                return key, None, None, snapshot.target_tokens(row)
            return key, snapshot.image_tokens(row), None, None
        if query.image is None:
            return ("no image",), None, None, None
        return *self._upload(query, clock), None

    def _upload(self, query: Query, clock: Clock) -> tuple[Hashable | None, Tokens | None, NDArray[np.uint8] | None]:
        image, spec = query.image, self.bundle.manifest.preprocessing
        assert image is not None

        def pixels() -> NDArray[np.uint8]:
            opened = open_image(image, spec, self.policy)
            clock.lap("decode")
            fitted = fit_image(opened, spec)  # at once: a batch of photographs is not held in full size
            clock.lap("preprocess")
            return fitted

        if not isinstance(image, bytes):
            return None, None, pixels()
        key = hashlib.blake2b(image, digest_size=20).digest()
        if (kept := self.uploads.get(key)) is not None:
            clock.lap("decode")
            return key, kept[0], None
        shared = self._pixels.get(key, pixels)
        clock.lap("decode")  # what was waited for who decodes the same bytes
        return key, None, shared

    def _remembered(self, keys: Sequence[Hashable | None]) -> dict[int, Parts]:
        """What the query encoder made of the same questions before, by their place."""
        found: dict[int, Parts] = {}
        for b, key in enumerate(keys):
            if key is not None and (kept := self.fused.get(key)) is not None:
                found[b] = (kept[0], kept[1], kept[2])
        return found

    def _image_tokens(self, prepared: Mapping[int, Prepared], clock: Clock) -> dict[int, Tokens]:
        """(P, Hv) of each query that has an image, by its place: what is at hand, and the rest through the vision encoder, equal uploads
        once."""
        found = {b: one.image_tokens for b, one in prepared.items() if one.image_tokens is not None}
        same: dict[Hashable, list[int]] = {}
        for b, one in prepared.items():
            if one.pixels is None:
                continue
            if one.key is not None and (kept := self.uploads.peek(one.key)) is not None:  # of a batch since it was decoded
                found[b] = kept[0]
            else:
                same.setdefault(b if one.key is None else one.key, []).append(b)
        if same:
            values = self._normalised([pixels for rows in same.values() if (pixels := prepared[rows[0]].pixels) is not None])
            clock.lap("preprocess")
            encoded = self._run(self._vision, "image_tokens", pixel_values=values)["image_tokens"]
            clock.lap("vision")
            for rows, tokens in zip(same.values(), encoded, strict=True):
                found |= dict.fromkeys(rows, tokens)
                if (key := prepared[rows[0]].key) is not None:
                    self.uploads.put(key, (tokens,))
        return found

    def _fused(
        self, prepared: Mapping[int, Prepared], keys: Sequence[Hashable | None], image_tokens: Mapping[int, Tokens], clock: Clock
    ) -> dict[int, Parts]:
        """Of the queries with a text, by their place; equal questions are encoded once."""
        same: dict[Hashable, list[int]] = {}
        for b, one in prepared.items():
            if one.query.text is not None:
                same.setdefault(b if keys[b] is None else keys[b], []).append(b)
        if not same:
            return {}
        firsts, sizes = [rows[0] for rows in same.values()], self.bundle.sizes
        encoded = self.text.pad([prepared[b].ids for b in firsts], lengths=self._lengths)
        # A text alone has an image of nothing.
        tokens = stacked([image_tokens.get(b) for b in firsts], (sizes.image_tokens, sizes.vision_width))
        clock.lap("decode")
        fused = self._run(self._query, *PASSED_ON, image_tokens=tokens, input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        base = to_host(fused.pop("base_query"))
        clock.lap("query")
        read = self._read_attributes(fused, encoded.attention_mask)
        clock.lap("attributes")
        found: dict[int, Parts] = {}
        for rows, *parts in zip(same.values(), base, read["sub_queries"], read["attribute_weights"], strict=True):
            made = (parts[0], parts[1], parts[2])
            found |= dict.fromkeys(rows, made)
            if (key := keys[rows[0]]) is not None:
                self.fused.put(key, made)
        return found

    def _read_attributes(self, fused: Mapping[str, Tokens], attention_mask: NDArray[np.int64]) -> Mapping[str, F32]:
        """Sub-queries (B, A, D) and weights (B, A), with A = 0 for a model without attribute heads."""
        if self._attributes is not None:
            return {name: to_host(value) for name, value in self._run(self._attributes, **fused, attention_mask=attention_mask).items()}
        none = np.zeros((len(attention_mask), 0, self.bundle.sizes.embedding_dim), np.float32)
        return {"sub_queries": none, "attribute_weights": none[:, :, 0]}

    def _run(self, session: GraphSession, /, *keep: str, **inputs: Tokens) -> dict[str, Tokens]:
        """The session's outputs, of which those named in `keep` stay on the device if all graphs run on one. The others are NumPy's."""
        if self._on_device and isinstance(session, Resident):
            return session.run_keeping(keep, **inputs)
        return {**session.run(**{name: to_host(value) for name, value in inputs.items()})}

    def _similar(self, prepared: Mapping[int, Prepared], image_tokens: Mapping[int, Tokens], clock: Clock) -> dict[int, Parts]:
        """The same of images alone: the mean of the tokens by which the gallery is searched, and nothing of the attributes."""
        sizes = self.bundle.sizes
        targets = {b: one.target_tokens.astype(np.float32) for b, one in prepared.items() if one.target_tokens is not None}
        rows = [b for b, one in prepared.items() if one.query.text is None and b not in targets]
        if rows:
            tokens = stacked([image_tokens[b] for b in rows], (sizes.image_tokens, sizes.vision_width))
            targets |= dict(zip(rows, to_host(self._run(self._target, image_tokens=tokens)["target_tokens"]), strict=True))
            clock.lap("query")
        none, zeros = np.zeros((sizes.attributes, sizes.embedding_dim), np.float32), np.zeros(sizes.attributes, np.float32)
        return {b: (tokens.mean(axis=0, dtype=np.float64).astype(np.float32), none, zeros) for b, tokens in targets.items()}

    def _composed(self, prepared: Sequence[Prepared], parts: Sequence[Parts]) -> list[Composed]:
        if not prepared:
            return []
        base, sub_queries, predicted = (np.stack(arrays) for arrays in zip(*parts, strict=True))  # (B, D), (B, A, D), (B, A)
        weights = np.stack([self._weights(one.query, own) for one, own in zip(prepared, predicted, strict=True)])
        vectors = compose_query(base, sub_queries, weights)
        return [
            self._away(one, Composed(vectors[b], base[b], sub_queries[b], predicted[b], weights[b], np.zeros_like(vectors[b])))
            for b, one in enumerate(prepared)
        ]

    def _weights(self, query: Query, predicted: F32) -> F32:
        """(A,), as a query has them."""
        names = self.bundle.vocabulary.names
        weights = apply_overrides(predicted[None], names, query.weights)[0] if query.weights else predicted.copy()
        for name, value in query.absolute_weights.items():
            weights[names.index(name)] = value
        return weights

    @staticmethod
    def _away(prepared: Prepared, one: Composed) -> Composed:
        """The same query, turned away from the items that it does not want."""
        if not prepared.query.unlike:
            return one
        snapshot, unlike = prepared.snapshot, np.zeros_like(one.vector)
        for stored in snapshot.tokens_of(tuple(prepared.query.unlike)):
            tokens = stored.astype(np.float32)
            unlike += UNLIKE * tokens[(tokens @ one.vector).argmax()]
        vector = compose_query((one.vector - unlike)[None], one.sub_queries[None], np.zeros_like(one.weights)[None])[0]
        return replace(one, vector=vector, unlike=unlike)

    def _normalised(self, pixels: Sequence[NDArray[np.uint8]]) -> F32:
        spec = self.bundle.manifest.preprocessing
        if not pixels:
            return np.empty((0, 3, spec.image_size, spec.image_size), np.float32)
        return normalise(np.stack(pixels), spec)


def _question(prepared: Prepared) -> Hashable | None:
    """What the query encoder reads of a query, as a key; None where the image is not known by what is in it, or there is no text."""
    return None if prepared.key is None or prepared.query.text is None else (prepared.key, _digest(prepared.ids))


def _digest(ids: tuple[int, ...]) -> bytes:
    """A key for a text's tokens, of which a long text has kilobytes."""
    return hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=20).digest()
