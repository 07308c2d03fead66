"""The two failures that DQE-CIR is meant to mend (arXiv 2603.04037), measured: relevance suppression and semantic confusion.

The paper names both and measures neither; what is counted here is ours. All figures are kept by query (`PerQuery`), so that models can
be compared query by query. See `docs/datasets.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones.arrays import F32, I64
from dqe_engine.zones.reference import max_sim

from .metrics import F64, PerQuery, average_precision_at_k, jaccard


@dataclass(frozen=True, eq=False)
class RelevanceSuppression:
    """Valid images that were not the labelled target, against it. Ranks begin with 1; a query counts where the figure has something
    to look at: an unlabelled valid image, or for `valid_above_wrong` and `average_precision` any valid one.

    target_rank, unlabelled_rank: of the labelled target, and the mean of the unlabelled valid images' ranks.
    median_ranks: over queries, of the target's ranks and of the unlabelled images' ranks, every query weighing the same.
    target_ahead: share of the unlabelled valid images that rank below the target; 0.5 where the label makes no difference.
    score_gap: the target's score minus the mean score of the unlabelled valid images. Above 0: the label lifted one of the equals.
    valid_above_wrong: share of the valid images that rank above the first image that is none.
    average_precision: over all valid images and the whole ranking.
    """

    target_rank: PerQuery
    unlabelled_rank: PerQuery
    target_ahead: PerQuery
    score_gap: PerQuery
    valid_above_wrong: PerQuery
    average_precision: PerQuery
    median_ranks: tuple[float, float]


def relevance_suppression(
    scores: Iterable[F32], target: I64, relevant: Sequence[Sequence[int]], *, excluded: Sequence[Sequence[int]] | None = None
) -> RelevanceSuppression:
    """How valid images fare beside the one that the triplet labels.

    scores: by query, the scores (G,) of the whole gallery: the rows of a (Q, G) array, or of `score_rows`, which holds one at a time.
    target: (Q,) gallery positions. relevant: by query, the positions of every valid image, the target among them or not; empty where
    none is known. excluded: by query, positions that are no candidates, the reference say.

    Where targets are drawn evenly from the valid images, as in garments, nothing sets a *held-out* target apart from the others: there
    the gap is 0, the ranks are equal and the target is ahead of half of the others for any model, whatever it learned. These figures tell
    something on triplets that were trained on, and where the labelled image is the better answer (tinted: the same product). The share
    above the first wrong image and average precision need no label, and hold anywhere.
    """
    count = len(target)
    target_rank, other_rank, ahead, gaps, above, precision = np.full((6, count), np.nan)
    pooled: list[I64] = []  # ranks of the unlabelled valid images, by query
    for row, row_scores in enumerate(scores):
        out = [] if excluded is None else list(excluded[row])
        order = np.argsort(-row_scores, kind="stable")  # score descending, position ascending
        order = order[~np.isin(order, out)] if out else order
        rank = np.full(len(row_scores), 0)
        rank[order] = np.arange(1, len(order) + 1)
        answers = np.asarray(relevant[row], np.int64)
        valid = np.setdiff1d(np.union1d(answers, target[row : row + 1]) if len(answers) else answers, out)
        others = valid[valid != target[row]]
        if len(others) and rank[target[row]]:
            target_rank[row], other_rank[row] = rank[target[row]], rank[others].mean()
            ahead[row] = (rank[others] > rank[target[row]]).mean()
            pooled.append(rank[others])
            gaps[row] = row_scores[target[row]] - row_scores[others].mean()
        if len(valid):
            wrong = np.flatnonzero(~np.isin(order, valid))
            first = wrong[0] + 1 if len(wrong) else len(order) + 1
            above[row] = (rank[valid] < first).mean()
            precision[row] = average_precision_at_k(order.tolist(), valid.tolist(), len(order))
    return RelevanceSuppression(
        target_rank=_where_known(target_rank),
        unlabelled_rank=_where_known(other_rank),
        target_ahead=_where_known(ahead),
        score_gap=_where_known(gaps),
        valid_above_wrong=_where_known(above),
        average_precision=_where_known(precision),
        median_ranks=(_median([np.asarray([rank]) for rank in target_rank[~np.isnan(target_rank)]]), _median(pooled)),
    )


def _median(groups: Sequence[NDArray[np.number]]) -> float:
    """Of all values, those of a group sharing the weight of one: a median of medians would not compare with a median of single values."""
    if not groups:
        return float("nan")
    values, weights = np.concatenate(groups), np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) >= weights.sum() / 2 - 1e-9
    return float(values[order][int(reached.argmax())])


def score_rows(queries: F32, target_tokens: F32) -> Iterable[F32]:
    """The scores (G,) of `target_tokens` (G, M, D) for each of `queries` (Q, D): s(q, i) = max_m <q, t_im>."""
    for query in queries:
        yield max_sim(query[None], target_tokens)[0]


@dataclass(frozen=True, eq=False)
class SemanticConfusion:
    """How alike the answers to different requests are: Jaccard overlap of the first ten, and cosine of the composed queries, each the
    mean over a query's partners. A query without a partner does not count.

    same_reference: partners share the reference, and have another text; high: the text is not heard. same_text: the reverse; high: the
    image is not seen. unrelated: both differ, one partner for each query; what chance and the embedding's spread give.
    """

    same_reference_overlap: PerQuery
    same_reference_cosine: PerQuery
    same_text_overlap: PerQuery
    same_text_cosine: PerQuery
    unrelated_overlap: PerQuery
    unrelated_cosine: PerQuery


def semantic_confusion(
    queries: F32,
    ranked: I64,
    reference: I64,
    texts: Sequence[str],
    *,
    relevant: Sequence[Sequence[int]] | None = None,
    depth: int = 10,
    seed: int = 0,
) -> SemanticConfusion:
    """Whether different modification intents collapse.

    queries: (Q, D) unit norm. ranked: (Q, K >= depth) gallery positions, padded with -1. reference: (Q,) positions, or any id. texts: Q.
    relevant: by query, every valid image, where known: pairs that share one are then no partners, since they should share answers.

    A set in which no reference and no text comes twice has nothing to count: ask several texts of each reference, and the same text of
    several references.
    """
    first = [set(row) - {-1} for row in ranked[:, :depth].tolist()]
    valid = None if relevant is None else [set(answers) for answers in relevant]
    text_id = np.unique(np.asarray(texts, object).astype(str), return_inverse=True)[1].reshape(-1)
    rng = np.random.default_rng(seed)
    count = len(texts)
    figures = {name: np.full((2, count), np.nan) for name in ("same_reference", "same_text", "unrelated")}
    for row in range(count):
        same_image, same_text = reference == reference[row], text_id == text_id[row]
        strangers = np.flatnonzero(~same_image & ~same_text)
        partners = {
            "same_reference": np.flatnonzero(same_image & ~same_text),
            "same_text": np.flatnonzero(~same_image & same_text),
            "unrelated": strangers[[int(rng.integers(len(strangers)))]] if len(strangers) else strangers,
        }
        for name, others in partners.items():
            alike = [at for at in others.tolist() if valid is None or not valid[row] & valid[at]]
            if alike:
                figures[name][0, row] = np.mean([jaccard(first[row], first[at]) for at in alike])
                figures[name][1, row] = float((queries[alike] @ queries[row]).mean())
    return SemanticConfusion(*(_where_known(values) for pair in figures.values() for values in pair))


def _where_known(values: F64) -> PerQuery:
    return PerQuery.of(values, ~np.isnan(values))
