"""Tokens to search: a model's own of garments and of photos, those of a model without training, and synthetic ones of known shape."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dqe_engine import Query, RetrievalEngine
from dqe_engine.bundle import Bundle
from dqe_engine.files import scratch_directory
from dqe_engine.zones.arrays import F32
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.data.garments.catalog import ALL_GARMENTS
from dqe_training.data.garments.render import render
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl
from dqe_training.data.tinted import CATEGORIES, COLOURS, read_cells, texts_for, tint
from dqe_training.evaluation.protocol import evaluation_set
from dqe_training.evaluation.pytorch import encode_gallery_images, evaluate_model
from dqe_training.model import DQEModel

from .galleries import unit

BATCH_IMAGES, KEPT_TOGETHER = 128, 4096
MIXED = 0.3
"""An item between two others has up to this share of the second."""
_CHUNK = 50_000
QUERIES = 1000


@dataclass(frozen=True, eq=False)
class Tokens:
    """`items`: (N, M, D) unit tokens; `queries`: (Q, D). `encoded`: how many items are of images; the others lie between two of these."""

    items: F32
    queries: F32
    encoded: int


@dataclass(frozen=True)
class Source:
    """The demo's folder, and one where encoded tokens are kept: a second run, or one that was interrupted, does not encode them again."""

    demo: Path
    work: Path
    step: Callable[[str], None]

    @property
    def kept(self) -> Path:
        return self.work / Bundle.load(self.demo / "bundle").model_hash[:12]

    def garments(self, count: int, rendered: int) -> Tokens:
        """The demo's images first, then `rendered` that are drawn for this; items beyond lie between."""
        folder = self.demo / "garments"
        files = [folder / "images" / record.image for record in read_jsonl(folder / "images.jsonl", ImageRecord)]
        size = min(count, len(files) + rendered)
        parts = [
            self._encoded(f"garments-{start:06d}-{stop:06d}", (files[at] if at < len(files) else _garment(at) for at in range(start, stop)))
            for start, stop in _ranges(size, len(files) + rendered)
        ]
        encoded = np.concatenate(parts)[:size]
        return Tokens(grown(encoded, count), self._made("garments-queries", self._garment_queries), size)

    def _garment_queries(self) -> F32:
        engine = RetrievalEngine.load(self.demo / "bundle")
        engine.load_index(self.demo / "index")
        asked = read_jsonl(self.demo / "garments" / "test.jsonl", TripletRecord)[:QUERIES]
        return engine.encode_queries([Query(reference_id=record.reference, text=record.text) for record in asked]).queries

    def photos(self, count: int, sprite: Path) -> Tokens:
        """Fashion-MNIST's 900 photos in colours at random, by the model of garments, which has never seen a photo."""
        cells = read_cells(sprite)
        encoded = self._encoded(f"photos-{count:06d}", (_photo(cells, at) for at in range(count)))
        return Tokens(encoded, self._made("photos-queries", lambda: self._photo_queries(cells)), count)

    def _photo_queries(self, cells: NDArray[np.uint8]) -> F32:
        rng = np.random.default_rng(19)
        engine = RetrievalEngine.load(self.demo / "bundle")
        asked = []
        for number in range(QUERIES):
            attribute, values = (("colour", tuple(COLOURS)), ("category", CATEGORIES))[number % 2]
            texts = texts_for(attribute, values[rng.integers(len(values))])
            asked.append(Query(image=_photo(cells, 10_000_000 + number), text=texts[rng.integers(len(texts))]))
        return np.concatenate([engine.encode_queries(asked[start : start + 100]).queries for start in range(0, len(asked), 100)])

    def untrained(self) -> Tokens:
        """The demo's garments and queries by a model of the same sizes with random weights."""
        made = self._made("untrained", self._untrained)
        queries, items = made[:QUERIES, 0], made[QUERIES:]
        return Tokens(np.ascontiguousarray(items), np.ascontiguousarray(queries), len(items))

    def _untrained(self) -> F32:
        import torch

        loaded, folder = load_checkpoint(self.demo / "runs" / "dqe-0" / "model"), self.demo / "garments"
        torch.manual_seed(0)
        sizes, pad = loaded.tokenizer.get_vocab_size(), loaded.meta.tokenizer.pad_id
        model = DQEModel(loaded.meta.config.model, loaded.vocabulary, sizes, pad).eval()
        chosen = evaluation_set(
            read_jsonl(folder / "test.jsonl", TripletRecord)[:QUERIES], read_jsonl(folder / "images.jsonl", ImageRecord), where=str(folder)
        )
        tokens = encode_gallery_images(model, folder / "images", chosen)
        found = evaluate_model(model, loaded.tokenizer, chosen, tokens)[1]
        queries = np.broadcast_to(found.queries[:, None], (len(found.queries), *found.target_tokens.shape[1:]))
        return np.concatenate([queries, found.target_tokens])

    def _encoded(self, name: str, images: Iterator[Path | bytes]) -> F32:
        def encode() -> F32:
            engine, out, some = RetrievalEngine.load(self.demo / "bundle"), [], []
            for image in images:
                some.append(image)
                if len(some) == BATCH_IMAGES:
                    out.append(engine.encode_images(some).target_tokens)
                    some = []
            return np.concatenate([*out, *([engine.encode_images(some).target_tokens] if some else [])])

        return self._made(name, encode)

    def _made(self, name: str, make: Callable[[], F32]) -> F32:
        path = self.kept / f"{name}.npy"
        if not path.is_file():
            self.step(f"encoding {name}")
            made = make()
            with scratch_directory(path) as scratch:
                np.save(scratch / path.name, made)
                (scratch / path.name).rename(path)
        found: F32 = np.load(path)
        return found


def grown(tokens: F32, count: int) -> F32:
    """`tokens`, then items between two of them each, up to `count` in all."""
    items = np.empty((count, *tokens.shape[1:]), np.float32)
    items[: len(tokens)] = tokens[:count]
    for start in range(len(tokens), count, _CHUNK):
        rng = np.random.default_rng((3, start))
        size = min(_CHUNK, count - start)
        one, other = rng.integers(len(tokens), size=(2, size))
        share = rng.random((size, 1, 1), np.float32) * np.float32(MIXED)
        items[start : start + size] = unit((1 - share) * tokens[one] + share * tokens[other])
    return items


def subspace(count: int, tokens: int, width: int, inner: int) -> Tokens:
    """Random directions of an `inner`-dimensional subspace, and noise of norm 0.05 in all dimensions; queries at a cosine of about 0.5."""
    rng = np.random.default_rng(inner)
    axes = np.linalg.qr(rng.standard_normal((width, inner)))[0].T.astype(np.float32)
    items = unit(rng.standard_normal((count, tokens, inner), np.float32)) @ axes
    items += rng.standard_normal(items.shape, np.float32) * np.float32(0.05 / width**0.5)
    near = items[rng.integers(count, size=QUERIES), 0]
    queries = unit(near + np.float32(3**0.5) * unit(rng.standard_normal((QUERIES, inner), np.float32)) @ axes)
    return Tokens(unit(items), queries, 0)


def power_law(count: int, width: int, *, clusters: int = 10_000) -> Tokens:
    """Single vectors around centres, both with variances that fall as 1 / dimension, turned at random; queries at a cosine of about 0.5."""
    rng = np.random.default_rng(7)
    deviations = np.arange(1, width + 1, dtype=np.float32) ** np.float32(-0.5)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    centres = unit(rng.standard_normal((clusters, width), np.float32) * deviations)
    items = np.empty((count, 1, width), np.float32)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        around = unit(rng.standard_normal((size, width), np.float32) * deviations)
        items[start : start + size, 0] = unit(centres[rng.integers(clusters, size=size)] + around) @ turn
    near = items[rng.integers(count, size=QUERIES), 0]
    other = unit(rng.standard_normal((QUERIES, width), np.float32) * deviations) @ turn
    return Tokens(items, unit(near + np.float32(3**0.5) * other), 0)


def _ranges(size: int, most: int) -> list[tuple[int, int]]:
    """Parts that are kept: the same whatever `size`, so that a smaller run takes what a larger one made."""
    return [(start, min(start + KEPT_TOGETHER, most)) for start in range(0, size, KEPT_TOGETHER)]


def _garment(number: int) -> bytes:
    rng = np.random.default_rng([17, number])
    return _written(render(ALL_GARMENTS[rng.integers(len(ALL_GARMENTS))], rng))


def _photo(cells: NDArray[np.uint8], number: int) -> bytes:
    rng = np.random.default_rng([23, number])
    cell = cells[rng.integers(cells.shape[0]), rng.integers(cells.shape[1])]
    colour = tuple(int(value) for value in rng.integers(30, 240, 3))
    return _written(tint(cell, (colour[0], colour[1], colour[2])))


def _written(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()
