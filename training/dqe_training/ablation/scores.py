"""What a cell is judged by: every figure as a ratio of two sums over queries, so that its uncertainty can be worked out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract

from ..data.records import ImageRecord, TripletRecord
from ..evaluation.benchmarks import RankedSet, ranking_figures
from ..evaluation.failures import relevance_suppression, score_rows, semantic_confusion
from ..evaluation.metrics import PerQuery, recalls
from ..evaluation.protocol import Embeddings, EvaluationSet, folder_figures

F64 = NDArray[np.float64]


class Ratio(Contract, frozen=True):
    """Sum of `numerator` over sum of `denominator`, both (Q,); query i of one cell is query i of every other."""

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]

    @classmethod
    def of(
        cls, numerator: NDArray[np.generic] | Sequence[float], denominator: NDArray[np.generic] | Sequence[float] | float = 1.0
    ) -> Ratio:
        above = np.asarray(numerator, np.float64)
        below = np.broadcast_to(np.asarray(denominator, np.float64), above.shape)
        return cls(numerator=tuple(np.round(above, 6).tolist()), denominator=tuple(np.round(below, 6).tolist()))

    @classmethod
    def of_figure(cls, figure: PerQuery) -> Ratio:
        """An evaluation's figure, as a cell keeps it."""
        return cls.of(figure.numerator, figure.denominator)

    @property
    def value(self) -> float:
        """NaN where nothing counts."""
        below = sum(self.denominator)
        return sum(self.numerator) / below if below else float("nan")

    @property
    def influence(self) -> F64:
        """(Q,): what each query adds to the figure beyond its share; their variance over Q is the figure's (delta method)."""
        above, below = np.asarray(self.numerator), np.asarray(self.denominator)
        return (above - self.value * below) / below.mean() if below.any() else np.full(len(above), np.nan)


Scores = dict[str, Ratio]


def folder_scores(evaluation: EvaluationSet, ranked: NDArray[np.int64], images: Sequence[ImageRecord]) -> Scores:
    """Figures of a dataset folder's val queries; what its labels do not tell is not among them. `images` as the gallery."""
    scores = {name: Ratio.of_figure(figure) for name, figure in folder_figures(evaluation, ranked).items() if name != "map_at_50"}
    if evaluation.relevant is not None:
        scores["near_confusion"] = near_confusion(evaluation, ranked, images)
    return scores


def failure_scores(evaluation: EvaluationSet, found: Embeddings) -> Scores:
    """The two failures that the paper names, on a folder's queries. valid_above_wrong: the share of the valid images that rank above the
    first that is none (relevance suppression). same_reference_overlap, same_text_overlap: what the first ten of two requests with the
    same reference, or text, have in common, where no image answers both (semantic confusion)."""
    if evaluation.relevant is None:
        return {}
    hidden = [[reference] for reference in evaluation.reference.tolist()]
    rows = score_rows(found.queries, found.target_tokens)
    suppressed = relevance_suppression(rows, evaluation.target, evaluation.relevant, excluded=hidden)
    texts = [record.text for record in evaluation.records]
    confused = semantic_confusion(found.queries, found.ranked, evaluation.reference, texts, relevant=evaluation.relevant)
    figures = {
        "valid_above_wrong": suppressed.valid_above_wrong,
        "same_reference_overlap": confused.same_reference_overlap,
        "same_text_overlap": confused.same_text_overlap,
    }
    return {name: Ratio.of_figure(figure) for name, figure in figures.items() if figure.queries}


def near_confusion(evaluation: EvaluationSet, ranked: NDArray[np.int64], images: Sequence[ImageRecord]) -> Ratio:
    """Of the wrong hits above the target, the share that differ from what was asked in one attribute alone, which the text names.

    Wrong: an image that is no valid answer, ranked above the labelled target, or anywhere in the ranking's depth where that
    does not hold the target. Asked: the values that the text allows, and the reference's for what it does not name.
    """
    assert evaluation.relevant is not None
    near, wrong = np.zeros(len(ranked)), np.zeros(len(ranked))
    for row, (record, relevant) in enumerate(zip(evaluation.records, evaluation.relevant, strict=True)):
        (found,) = np.nonzero(ranked[row] == evaluation.target[row])
        above = ranked[row][: found[0]] if len(found) else ranked[row]
        asked = _asked(record, images[evaluation.reference[row]].attributes)
        for item in set(above[above >= 0].tolist()) - set(relevant):
            missed = [name for name, values in asked.items() if images[item].attributes.get(name) not in values]
            wrong[row] += 1
            near[row] += len(missed) == 1 and missed[0] in (record.allowed or {})
    return Ratio.of(near, wrong)


def _asked(record: TripletRecord, reference: dict[str, str]) -> dict[str, set[str]]:
    return {name: {value} for name, value in reference.items()} | {name: set(values) for name, values in (record.allowed or {}).items()}


def benchmark_scores(dataset: str, sets: Sequence[RankedSet]) -> Scores:
    """Recall of the labelled target, averaged over the sets as the dataset's protocol does; for CIRR within the subset too, for
    CIRCO mAP."""
    asked = {"fashioniq": (), "cirr": tuple(f"subset_recall_at_{k}" for k in (1, 2, 3)), "circo": ("map_at_10",)}[dataset]
    figures = [recalls(s.ranked, s.queries.target, (1, 5, 10, 50)) | ranking_figures(dataset, s.queries, s.ranked) for s in sets]
    names = [*(f"recall_at_{k}" for k in (1, 5, 10, 50)), *asked]
    return {name: _over_sets([figure[name].numerator for figure in figures]) for name in names}


def _over_sets(values: Sequence[F64]) -> Ratio:
    """The mean over sets of each set's mean, as a mean over all queries: those of small sets count for more."""
    total = sum(map(len, values))
    return Ratio.of(np.concatenate([v * (total / (len(values) * len(v))) for v in values]))
