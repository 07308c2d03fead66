"""Evaluation of a bundle: the torch-free runtime searches, the same protocol summarises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex
from dqe_engine.index.filters import Filter
from dqe_engine.query import Query

from ..data.queries import QuerySet
from .protocol import Embeddings, EvaluationSet, Report, summarise


def index_gallery(
    engine: RetrievalEngine,
    images: Path,
    evaluation: EvaluationSet,
    *,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Index the evaluation set's gallery under its names, image tokens kept in float32 (no rounding against PyTorch). `metadata`: by
    name, for whoever uses the index afterwards; evaluation searches without a filter and reads none of it."""
    engine.new_index(image_storage="f32")
    engine.index_images({name: images / name for name in evaluation.gallery}, metadata=metadata, progress=progress)


def search_queries(
    engine: RetrievalEngine,
    queries: QuerySet,
    *,
    files: Mapping[str, Path] | None = None,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> Embeddings:
    """Encode every query and search the engine's index, which holds the gallery in its order, to the protocol's depth.

    References are items of the index, or read from `files` (by id) where the index keeps no image tokens. The rankings are
    the index's own answers; the embeddings beside them are what it searched with and in.
    """
    width, names = engine.bundle.sizes.embedding_dim, engine.bundle.vocabulary.names
    embedded = np.empty((len(queries), width), np.float32)
    weights = np.zeros((len(queries), len(names)), np.float32)
    for start in range(0, len(queries), batch_size):
        asked = queries.queries[start : start + batch_size]
        texts = queries.texts[start : start + batch_size]
        encoded = engine.encode_queries(
            [
                Query(text=text, reference_id=q.reference) if files is None else Query(text=text, image=files[q.reference])
                for q, text in zip(asked, texts, strict=True)
            ]
        )
        embedded[start : start + len(asked)] = encoded.queries
        weights[start : start + len(asked)] = encoded.predicted_weights
        advance(len(asked))
    ranked, scores = search_index(engine.index, queries, embedded, batch_size=batch_size)
    targets = np.stack([engine.index.target_tokens(name) for name in queries.gallery])
    return Embeddings(embedded, targets, weights, ranked, scores)


def search_index(
    index: GalleryIndex, queries: QuerySet, embedded: NDArray[np.float32], *, filter: Filter | None = None, batch_size: int = 64
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rankings and scores (Q, depth) of embedded queries (Q, D), as `Embeddings` has them. `filter`: what of the index the gallery is,
    where it holds more; the index has it in the gallery's order."""
    depth = min(queries.depth, len(queries.gallery))
    ranked = np.full((len(queries), queries.depth), -1, np.int64)
    scores = np.full((len(queries), queries.depth), -np.inf, np.float32)
    for start in range(0, len(queries), batch_size):
        asked = queries.queries[start : start + batch_size]
        found = index.search(embedded[start : start + batch_size], depth, exclude=[q.exclude for q in asked], filter=filter)
        for row, result in enumerate(found, start=start):
            ranked[row, : len(result.matches)] = [queries.position[match.id] for match in result.matches]
            scores[row, : len(result.matches)] = [match.score for match in result.matches]
    return ranked, scores


def evaluate_engine(
    engine: RetrievalEngine, evaluation: EvaluationSet, *, batch_size: int = 64, advance: Callable[[int], None] = lambda n: None
) -> tuple[Report, Embeddings]:
    """Search the engine's index with every query (references by id) and summarise."""
    found = search_queries(engine, evaluation.queries, batch_size=batch_size, advance=advance)
    weights = found.weights if found.weights.any() else None
    return summarise(evaluation, found.ranked, weights=weights, attributes=engine.bundle.vocabulary.names), found


def agreement(checkpoint: tuple[Report, Embeddings], bundle: tuple[Report, Embeddings]) -> tuple[float, float, bool]:
    """Runtime against PyTorch on the same queries.

    Returns the share of queries whose top 10 are the same ids in the same order, the largest absolute difference of any
    query or target embedding element, and whether recall@1/5/10/50 are identical.
    """
    (report, ours), (other_report, theirs) = checkpoint, bundle
    same = (ours.ranked[:, :10] == theirs.ranked[:, :10]).all(axis=1).mean()
    difference = max(np.abs(ours.queries - theirs.queries).max(), np.abs(ours.target_tokens - theirs.target_tokens).max())
    recalls = [(getattr(report, f"recall_at_{k}"), getattr(other_report, f"recall_at_{k}")) for k in (1, 5, 10, 50)]
    return float(same), float(difference), all(a == b for a, b in recalls)
