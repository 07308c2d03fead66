"""Queries of every kind over an index of twelve images, whose metadata number them (tests/engine/test_query.py, test_query_batcher.py)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from support.samples import noise_image

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query
from dqe_engine.results import SearchResult

IDS = tuple(sorted(f"{'sub/' if n % 2 else ''}{n:02}.png" for n in range(12)))
RED = Query(reference_id="00.png", text="in red", k=11)


def numbered_engine(bundle: Path, images: Path) -> RetrievalEngine:
    made = RetrievalEngine.load(bundle, provider="cpu", threads=1)
    made.new_index(image_storage="f32")
    made.index_images(images, metadata={id: {"n": n} for n, id in enumerate(IDS)})
    return made


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise_image(seed).save(stream, "PNG")
    return stream.getvalue()


def ids(result: SearchResult) -> list[str]:
    return [hit.id for hit in result.hits]


def same(found: SearchResult, expected: SearchResult) -> None:
    assert ids(found) == ids(expected)
    np.testing.assert_allclose([h.score for h in found.hits], [h.score for h in expected.hits], rtol=0, atol=1e-6)
    assert (found.mode, found.overrides, found.truncated) == (expected.mode, expected.overrides, expected.truncated)
    assert [h.zone for h in found.hits] == [h.zone for h in expected.hits]


MIXED: list[Callable[[Path], Query]] = [
    lambda folder: RED,
    lambda folder: Query(image=folder / "02.png", text="the same but round with long sleeves", k=3, filter={"n": {"<": 9}}),
    lambda folder: Query(text="less", k=2, zones=True),
    lambda folder: Query(reference_id="04.png", k=5, offset=2),
    lambda folder: Query(image=png(3), k=5, exclude=["02.png"]),
    lambda folder: Query(image=noise_image(7), text="in blue", weights={"colour": 0}, zones=ZoneSpec(lo=0.1, hi=0.3), explain=True),
    lambda folder: Query(reference_id="00.png", text="in red", filter={"n": {"<": 9}}, minimum_score=0.0, unlike=["02.png"]),
    lambda folder: Query(text="less " * 100, filter={"n": 99}),
]
"""A query of each kind, made of the folder of images."""
