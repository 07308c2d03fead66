"""The evaluation of one query set over one gallery: rankings in, figures out. Checkpoint and bundle share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract
from dqe_engine.errors import InputError

from ..data.queries import DEPTH, Query, QuerySet
from ..data.records import ImageRecord, TripletRecord, check_texts, read_jsonl
from .metrics import bootstrap_interval, mean_average_precision_at_k, precision_at_k, recall_at_k, roc_auc

__all__ = ["DEPTH", "Embeddings", "EvaluationSet", "Report", "evaluation_set", "load_evaluation_set", "summarise"]


@dataclass(frozen=True)
class EvaluationSet:
    """Queries over a gallery. The reference, where the gallery holds it, is left out of its own ranking.

    relevant: per query, positions of every valid gallery image; None where a dataset knows only the labelled target.
    """

    gallery: tuple[str, ...]
    records: tuple[TripletRecord, ...]
    reference: NDArray[np.int64]
    target: NDArray[np.int64]
    relevant: tuple[tuple[int, ...], ...] | None
    held_out: NDArray[np.bool_]

    @property
    def queries(self) -> QuerySet:
        """What a model is asked to rank; ids are image names."""
        asked = (Query(str(row), r.reference, r.text, (r.target,), exclude=(r.reference,)) for row, r in enumerate(self.records))
        return QuerySet("val", tuple(asked), self.gallery)


@dataclass(frozen=True)
class Embeddings:
    """What a model made of a query set: queries (Q, D), target tokens (G, M, D), weights (Q, A), rankings (Q, depth).

    Rankings hold gallery positions, score descending and position ascending, padded with -1.
    """

    queries: NDArray[np.float32]
    target_tokens: NDArray[np.float32]
    weights: NDArray[np.float32]
    ranked: NDArray[np.int64]
    scores: NDArray[np.float32]


class Report(Contract, frozen=True):
    """Figures in [0, 1]. `interval` bounds recall_at_10 (95 %, bootstrap over queries).

    `attribute_precision_at_10` is the share of the top 10 that satisfies text and reference, over the most that any
    ranking could reach (`attainable_precision_at_10`). `weight_auc`: do predicted weights separate the texts that name
    an attribute from those that do not.
    """

    queries: int
    gallery: int
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    recall_at_50: float
    recall_at_10_interval: tuple[float, float]
    heldout_queries: int = 0
    heldout_recall_at_10: float | None = None
    map_at_10: float | None = None
    map_at_50: float | None = None
    attribute_precision_at_10: float | None = None
    attainable_precision_at_10: float | None = None
    attainable_recall_at_1: float | None = None
    weight_auc: dict[str, float] | None = None


def load_evaluation_set(directory: Path, *, triplets: str = "val.jsonl", gallery_prefix: str = "gallery/") -> EvaluationSet:
    """Read a dataset folder: `images.jsonl` names the gallery, `triplets` the queries.

    Relevant images come from `allowed` (every attribute not named stays as in the reference); without it, none.
    """
    records = read_jsonl(directory / triplets, TripletRecord)
    check_texts(records, where=str(directory / triplets))
    images = [r for r in read_jsonl(directory / "images.jsonl", ImageRecord) if r.image.startswith(gallery_prefix)]
    return evaluation_set(records, images, where=str(directory))


def evaluation_set(records: Sequence[TripletRecord], images: Sequence[ImageRecord], *, where: str = "evaluation set") -> EvaluationSet:
    """Resolve names to gallery positions and work out each query's relevant images."""
    gallery = tuple(r.image for r in images)
    position = {name: i for i, name in enumerate(gallery)}
    absent = [name for r in records for name in (r.reference, r.target) if name not in position]
    if absent:
        raise InputError(f"{where}: {len(absent)} query images are not in the gallery, for example {absent[0]}")
    relevant = None
    if all(r.allowed is not None for r in records):
        relevant = tuple(_relevant(r, images, position[r.reference]) for r in records)
    return EvaluationSet(
        gallery=gallery,
        records=tuple(records),
        reference=np.asarray([position[r.reference] for r in records], np.int64),
        target=np.asarray([position[r.target] for r in records], np.int64),
        relevant=relevant,
        held_out=np.asarray([r.held_out for r in records], bool),
    )


def _relevant(record: TripletRecord, images: Sequence[ImageRecord], reference: int) -> tuple[int, ...]:
    kept = images[reference].attributes
    allowed = {name: {value} for name, value in kept.items()} | {name: set(v) for name, v in (record.allowed or {}).items()}
    return tuple(i for i, image in enumerate(images) if i != reference and all(image.attributes.get(n) in v for n, v in allowed.items()))


def summarise(
    evaluation: EvaluationSet, ranked: NDArray[np.int64], *, weights: NDArray[np.float32] | None = None, attributes: Sequence[str] = ()
) -> Report:
    """Figures from `ranked` (Q, K >= 50 or the gallery) gallery positions, padded with -1, references left out.

    `weights` (Q, A) predicted attribute weights for the `attributes` named.
    """
    target, held = evaluation.target, evaluation.held_out
    hits = (ranked[:, :10] == target[:, None]).any(axis=1)
    figures: dict[str, object] = {f"recall_at_{k}": recall_at_k(ranked, target, k) for k in (1, 5, 10, 50)}
    if held.any():
        figures |= {"heldout_queries": int(held.sum()), "heldout_recall_at_10": recall_at_k(ranked[held], target[held], 10)}
    if evaluation.relevant is not None:
        found, attainable = precision_at_k(ranked, evaluation.relevant, 10)
        figures |= {
            "map_at_10": mean_average_precision_at_k(ranked, evaluation.relevant, 10),
            "map_at_50": mean_average_precision_at_k(ranked, evaluation.relevant, 50),
            "attribute_precision_at_10": found / attainable if attainable else float("nan"),
            "attainable_precision_at_10": attainable,
            "attainable_recall_at_1": float(np.mean([1 / max(len(r), 1) for r in evaluation.relevant])),
        }
    if weights is not None and all(r.attributes is not None for r in evaluation.records):
        figures["weight_auc"] = {
            name: roc_auc(weights[:, a], np.asarray([name in (r.attributes or {}) for r in evaluation.records]))
            for a, name in enumerate(attributes)
        }
    return Report(
        queries=len(target),
        gallery=len(evaluation.gallery),
        recall_at_10_interval=bootstrap_interval(hits.astype(float)),
        **figures,  # type: ignore[arg-type]
    )
