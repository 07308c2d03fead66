"""The evaluation of one query set over one gallery: rankings in, figures out. Checkpoint and bundle share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract
from dqe_engine.errors import InputError

from ..data.queries import DEPTH, Query, QuerySet
from ..data.records import ImageRecord, TripletRecord, allowed_values, check_texts, read_jsonl
from .metrics import PerQuery, hits_at_k, mean_average_precisions, recalls, relative_precision, roc_auc
from .probe_report import ProbeReport

__all__ = ["DEPTH", "Embeddings", "EvaluationSet", "Report", "evaluation_set", "folder_figures", "load_evaluation_set", "summarise"]


@dataclass(frozen=True)
class EvaluationSet:
    """Queries over a gallery. The reference, where the gallery holds it, is left out of its own ranking.

    reference, target: (Q,) gallery positions. held_out: (Q,), whether the target's combination of attributes was kept out of training.
    relevant: per query, positions of every valid gallery image; None where a dataset knows only the labelled target.
    attributes: per gallery image, what it is labelled with; empty where nothing is known. notes: what a reader of the figures must know.
    """

    gallery: tuple[str, ...]
    records: tuple[TripletRecord, ...]
    reference: NDArray[np.int64]
    target: NDArray[np.int64]
    relevant: tuple[tuple[int, ...], ...] | None
    held_out: NDArray[np.bool_]
    attributes: tuple[dict[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def queries(self) -> QuerySet:
        """What a model is asked to rank; ids are image names."""
        asked = (Query(str(row), r.reference, r.text, (r.target,), exclude=(r.reference,)) for row, r in enumerate(self.records))
        return QuerySet("val", tuple(asked), self.gallery)


@dataclass(frozen=True)
class Embeddings:
    """What a model made of a query set: queries (Q, D), target tokens (G, M, D), weights (Q, A), rankings and their scores (Q, depth).

    Rankings hold gallery positions, score descending and position ascending, padded with -1; `scores` are padded with -inf.
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
    an attribute from those that do not. `notes`: what a reader must know of the figures, and why some are not there.
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
    notes: tuple[str, ...] = ()
    probes: ProbeReport | None = None


def load_evaluation_set(directory: Path, *, triplets: str = "val.jsonl", gallery_prefix: str = "gallery/") -> EvaluationSet:
    """Read a dataset folder: `images.jsonl` names the gallery, `triplets` the queries.

    Relevant images come from `allowed` (every attribute not named stays as in the reference); without it, none.
    """
    records = read_jsonl(directory / triplets, TripletRecord)
    check_texts(records, where=str(directory / triplets))
    images = [r for r in read_jsonl(directory / "images.jsonl", ImageRecord) if r.image.startswith(gallery_prefix)]
    return evaluation_set(records, images, where=str(directory))


def evaluation_set(records: Sequence[TripletRecord], images: Sequence[ImageRecord], *, where: str = "evaluation set") -> EvaluationSet:
    """Resolve names to gallery positions and work out each query's relevant images, where the labels tell them: every triplet has
    `allowed`, and every image all the attributes. Raises InputError for a query image that `images` lack."""
    gallery = tuple(r.image for r in images)
    position = {name: i for i, name in enumerate(gallery)}
    absent = [name for r in records for name in (r.reference, r.target) if name not in position]
    if absent:
        raise InputError(f"{where}: {len(absent)} query images are not in the gallery, for example {absent[0]}")
    unknown = _why_unknown(records, images)
    relevant = None if unknown else tuple(_relevant(r, images, position[r.reference]) for r in records)
    return EvaluationSet(
        gallery=gallery,
        records=tuple(records),
        reference=np.asarray([position[r.reference] for r in records], np.int64),
        target=np.asarray([position[r.target] for r in records], np.int64),
        relevant=relevant,
        held_out=np.asarray([r.held_out for r in records], bool),
        attributes=tuple(image.attributes for image in images),
        notes=tuple(_notes(records, position, relevant, unknown)),
    )


def _why_unknown(records: Sequence[TripletRecord], images: Sequence[ImageRecord]) -> str:
    """Why valid answers beside the target are not known; empty where they are."""
    if lacking := sum(record.allowed is None for record in records):
        return f"{lacking} of {len(records)} triplets have no `allowed`"
    names = {name for image in images for name in image.attributes} | {name for record in records for name in record.allowed or ()}
    if partly := sum(not names <= image.attributes.keys() for image in images):
        return f"{partly} of {len(images)} images lack labels of {', '.join(sorted(names))}"
    return ""


def _notes(
    records: Sequence[TripletRecord], position: dict[str, int], relevant: Sequence[Sequence[int]] | None, unknown: str
) -> Iterator[str]:
    if unknown:
        yield f"no mAP and no attribute precision: {unknown}"
    if relevant is not None:
        foreign = [at for at, (record, valid) in enumerate(zip(records, relevant, strict=True)) if position[record.target] not in valid]
        if foreign:
            yield f"{len(foreign)} targets do not satisfy their own labels, the first that of triplet {foreign[0] + 1}; mend the labels"


def _relevant(record: TripletRecord, images: Sequence[ImageRecord], reference: int) -> tuple[int, ...]:
    allowed = allowed_values(record, images[reference].attributes)
    return tuple(i for i, image in enumerate(images) if i != reference and all(image.attributes.get(n) in v for n, v in allowed.items()))


def folder_figures(evaluation: EvaluationSet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """Recall, and where they are known, of held-out combinations and over all valid answers. What a dataset does not tell is not there.

    ranked: (Q, K >= 50 or the gallery) gallery positions, padded with -1, references left out.
    """
    figures = recalls(ranked, evaluation.target, (1, 5, 10, 50))
    if evaluation.held_out.any():
        figures["heldout_recall_at_10"] = PerQuery.of(hits_at_k(ranked, evaluation.target, 10), evaluation.held_out)
    if evaluation.relevant is not None:
        figures |= mean_average_precisions(ranked, evaluation.relevant, (10, 50))
        figures["attribute_precision_at_10"] = relative_precision(ranked, evaluation.relevant, 10)
    return figures


def summarise(
    evaluation: EvaluationSet, ranked: NDArray[np.int64], *, weights: NDArray[np.float32] | None = None, attributes: Sequence[str] = ()
) -> Report:
    """Figures from `ranked`, see `folder_figures`.

    `weights` (Q, A) predicted attribute weights for the `attributes` named.
    """
    scored = folder_figures(evaluation, ranked)
    figures: dict[str, object] = {name: figure.value for name, figure in scored.items()}
    if "heldout_recall_at_10" in scored:
        figures["heldout_queries"] = scored["heldout_recall_at_10"].queries
    if evaluation.relevant is not None:
        figures |= {
            "attainable_precision_at_10": float(np.mean(scored["attribute_precision_at_10"].denominator)),
            "attainable_recall_at_1": float(np.mean([1 / max(len(r), 1) for r in evaluation.relevant])),
        }
    if weights is not None and all(r.attributes is not None for r in evaluation.records):
        figures["weight_auc"] = {
            name: roc_auc(weights[:, a], np.asarray([name in (r.attributes or {}) for r in evaluation.records]))
            for a, name in enumerate(attributes)
        }
    return Report(
        queries=len(evaluation.records),
        gallery=len(evaluation.gallery),
        recall_at_10_interval=scored["recall_at_10"].interval(),
        notes=evaluation.notes,
        **figures,  # type: ignore[arg-type]
    )
