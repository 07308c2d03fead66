"""Evaluation of a bundle: the torch-free runtime searches, the same protocol summarises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.engine import RetrievalEngine

from .protocol import DEPTH, Embeddings, EvaluationSet, Report, summarise


def index_gallery(
    engine: RetrievalEngine, images: Path, evaluation: EvaluationSet, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Index the evaluation set's gallery under its names, image tokens kept in float32 (no rounding against PyTorch)."""
    engine.new_index(image_storage="f32")
    engine.index_images({name: images / name for name in evaluation.gallery}, progress=progress)


def evaluate_engine(
    engine: RetrievalEngine, evaluation: EvaluationSet, *, batch_size: int = 64, advance: Callable[[int], None] = lambda n: None
) -> tuple[Report, Embeddings]:
    """Search the engine's index with every query (references by id) and summarise.

    The rankings are the engine's own answers; the embeddings beside them are what it searched with and in.
    """
    position = {name: i for i, name in enumerate(evaluation.gallery)}
    names = engine.bundle.vocabulary.names
    ranked = np.full((len(evaluation.records), DEPTH), -1, np.int64)
    scores = np.full((len(evaluation.records), DEPTH), -np.inf, np.float32)
    queries: list[NDArray[np.float32]] = []
    weights = np.zeros((len(evaluation.records), len(names)), np.float32)
    for start in range(0, len(evaluation.records), batch_size):
        records = evaluation.records[start : start + batch_size]
        references, texts = [r.reference for r in records], [r.text for r in records]
        queries.append(engine.encode_queries(references, texts).queries)
        for row, result in enumerate(engine.search_batch(references, texts, k=DEPTH), start=start):
            ranked[row, : len(result.hits)] = [position[hit.id] for hit in result.hits]
            scores[row, : len(result.hits)] = [hit.score for hit in result.hits]
            weights[row] = [result.predicted_weights[name] for name in names]
        advance(len(records))
    report = summarise(evaluation, ranked, weights=weights if weights.any() else None, attributes=names)
    targets = np.stack([engine.index.target_tokens(name) for name in evaluation.gallery])
    return report, Embeddings(np.concatenate(queries), targets, weights, ranked, scores)


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
