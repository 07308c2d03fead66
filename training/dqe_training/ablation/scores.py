"""What a cell is judged by: every figure by query, so that its uncertainty can be worked out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.records import ImageRecord, allowed_values
from ..evaluation.benchmarks import RankedSet, ranking_figures
from ..evaluation.failures import relevance_suppression, score_rows, semantic_confusion
from ..evaluation.metrics import PerQuery, recalls
from ..evaluation.protocol import Embeddings, EvaluationSet, folder_figures

F64 = NDArray[np.float64]
_OWN_FIGURES = ("subset_recall_at_1", "subset_recall_at_2", "subset_recall_at_3", "map_at_10")
"""Beside recall, what is compared where a dataset's protocol has it."""

Scores = dict[str, PerQuery]


def folder_scores(evaluation: EvaluationSet, ranked: NDArray[np.int64], images: Sequence[ImageRecord]) -> Scores:
    """Figures of a dataset folder's val queries; what its labels do not tell is not among them. ranked: (Q, K >= 50 or
    the gallery) gallery positions, padded with -1, references left out. images: the gallery's records, in its order."""
    scores = {name: figure for name, figure in folder_figures(evaluation, ranked).items() if name != "map_at_50"}
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
    return {name: figure for name, figure in figures.items() if figure.queries}


def near_confusion(evaluation: EvaluationSet, ranked: NDArray[np.int64], images: Sequence[ImageRecord]) -> PerQuery:
    """Of the wrong hits above the target, the share that differ from what was asked in one attribute alone, which the text names.

    ranked, images: as in `folder_scores`. Wrong: an image that is no valid answer, ranked above the labelled target, or anywhere in the
    ranking's depth where that does not hold the target. Asked: the values that the text allows, and the reference's for what it does not
    name.
    """
    assert evaluation.relevant is not None
    near, wrong = np.zeros(len(ranked)), np.zeros(len(ranked))
    for row, (record, relevant) in enumerate(zip(evaluation.records, evaluation.relevant, strict=True)):
        (found,) = np.nonzero(ranked[row] == evaluation.target[row])
        above = ranked[row][: found[0]] if len(found) else ranked[row]
        asked = allowed_values(record, images[evaluation.reference[row]].attributes)
        for item in set(above[above >= 0].tolist()) - set(relevant):
            missed = [name for name, values in asked.items() if images[item].attributes.get(name) not in values]
            wrong[row] += 1
            near[row] += len(missed) == 1 and missed[0] in (record.allowed or {})
    return PerQuery(near, wrong)


def benchmark_scores(dataset: str, sets: Sequence[RankedSet]) -> Scores:
    """Recall of the labelled target, averaged over the sets as the dataset's protocol does; for CIRR within the subset too, for
    CIRCO mAP."""
    found = [recalls(s.ranked, s.queries.target, (1, 5, 10, 50)) for s in sets]
    own = [ranking_figures(dataset, s.queries, s.ranked) for s in sets]
    figures = [recall | {name: of[name] for name in of if name in _OWN_FIGURES} for recall, of in zip(found, own, strict=True)]
    return {name: _over_sets([figure[name].numerator for figure in figures]) for name in figures[0]}


def _over_sets(values: Sequence[F64]) -> PerQuery:
    """The mean over sets of each set's mean, as a mean over all queries: those of small sets count for more."""
    total = sum(map(len, values))
    return PerQuery.of(np.concatenate([v * (total / (len(values) * len(v))) for v in values]))
