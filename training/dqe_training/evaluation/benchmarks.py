"""The public datasets' protocols: rankings in, figures out; and one evaluation for checkpoint and bundle alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract
from dqe_engine.errors import InputError
from dqe_engine.zones.reference import max_sim

from ..data.damage import Progress, require_readable
from ..data.public.base import Benchmark, Options
from ..data.public.placing import Coverage, open_images, place_queries
from ..data.queries import QuerySet
from .metrics import PerQuery, filter_ranking, mean_average_precisions, negative_recalls, preference_accuracy, preference_ratio, recalls
from .probe_report import ProbeReport
from .protocol import Embeddings


class AspectFigure(Contract, frozen=True):
    """mAP@10 of the queries that have one semantic aspect, and its 95 % bootstrap interval over them."""

    queries: int
    map_at_10: float
    interval: tuple[float, float]


class SetReport(Contract, frozen=True):
    """One query set. `figures` are in [0, 1]; none where the targets are secret. `aspects`: CIRCO val, whose queries say what kinds of
    change they ask for, several each."""

    name: str
    coverage: Coverage
    figures: dict[str, float]
    aspects: dict[str, AspectFigure] = msgspec.field(default_factory=dict)
    probes: ProbeReport | None = None


class BenchmarkReport(Contract, frozen=True):
    """`protocol`: what was computed, in words. `summary`: the dataset's headline over its sets, in [0, 1]."""

    dataset: str
    split: str
    protocol: str
    sets: tuple[SetReport, ...]
    summary: dict[str, float]


@dataclass(frozen=True)
class RankedSet:
    """A query set and its rankings (Q, depth) of gallery positions, padded with -1."""

    queries: QuerySet
    ranked: NDArray[np.int64]


class Ranker(Protocol):
    """A model: query set and image files (of the gallery, in its order, relative to the folder) in, rankings out."""

    def __call__(self, queries: QuerySet, folder: Path, names: Sequence[str]) -> Embeddings: ...


Probing = Callable[[QuerySet, Path, Sequence[str], Embeddings], ProbeReport]
"""Probes of one ranked query set: it, the image folder, the gallery's files in it, and what the model made of the set."""


def fashioniq_figures(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """Recall@10 and @50 of the labelled target. ranked: (Q, K >= 50 or the gallery) gallery positions, padded with -1; as in all figures
    below."""
    return recalls(ranked, queries.target, (10, 50))


def cirr_figures(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """Recall@1, 5, 10, 50, and recall@1, 2, 3 of the ranking filtered to the other five members of the image set."""
    subset = filter_ranking(ranked, [queries.positions(query.subset) for query in queries.queries])
    within = recalls(subset, queries.target, (1, 2, 3))
    return recalls(ranked, queries.target, (1, 5, 10, 50)) | {f"subset_{name}": figure for name, figure in within.items()}


def circo_figures(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """mAP@5, 10, 25, 50 over all ground truths, and recall at the same depths of the target alone."""
    depths = (5, 10, 25, 50)
    return mean_average_precisions(ranked, queries.relevant, depths) | recalls(ranked, queries.target, depths)


def pinpoint_figures(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """As the authors' `evaluate.py`: mAP over all positives, precision@10, negative recall, mAP@10 of the ranking without its negatives,
    and the range of precision@10 over the texts of one image. A positive that the file lists twice counts twice in min(positives, K)."""
    depths = (1, 5, 10, 50)
    negatives = [[queries.position[id] for id in query.negatives if id in queries.position] for query in queries.queries]
    precision = np.asarray([np.isin(row[:10], valid).sum() / 10 for row, valid in zip(ranked, queries.relevant, strict=True)])
    figures = _map_over_listed(queries, ranked, depths) | {"precision_at_10": PerQuery.of(precision)}
    figures |= negative_recalls(ranked, negatives, [len(query.negatives) for query in queries.queries], depths)
    without = np.full_like(ranked, -1)
    for row, wrong in enumerate(negatives):
        kept = ranked[row][~np.isin(ranked[row], wrong)]
        without[row, : len(kept)] = kept
    figures["map_at_10_without_negatives"] = _map_over_listed(queries, without, (10,))["map_at_10"]
    texts: dict[int, list[int]] = {}
    for row, reference in enumerate(queries.reference.tolist()):
        texts.setdefault(reference, []).append(row)
    figures["range_of_precision_at_10"] = PerQuery.of([float(np.ptp(precision[rows])) for rows in texts.values() if len(rows) > 1])
    return figures


def _map_over_listed(queries: QuerySet, ranked: NDArray[np.int64], depths: Sequence[int]) -> dict[str, PerQuery]:
    listed, distinct = (np.asarray([len(kind(query.targets)) for query in queries.queries]) for kind in (tuple, set))
    figures = mean_average_precisions(ranked, queries.relevant, depths)
    for k in depths:
        figure = figures[f"map_at_{k}"]
        scale = np.minimum(distinct, k) / np.maximum(np.minimum(listed, k), 1)
        figures[f"map_at_{k}"] = PerQuery(figure.numerator * scale, figure.denominator)
    return figures


def aspect_figures(queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, AspectFigure]:
    """mAP@10 by semantic aspect, the most frequent first; empty where the queries have none."""
    counts = Counter(aspect for query in queries.queries for aspect in query.aspects)
    out = {}
    for aspect, _ in counts.most_common():
        rows = [row for row, query in enumerate(queries.queries) if aspect in query.aspects]
        relevant = [queries.positions(queries.queries[row].targets) for row in rows]
        figure = mean_average_precisions(ranked[rows], relevant, (10,))["map_at_10"]
        out[aspect] = AspectFigure(queries=figure.queries, map_at_10=figure.value, interval=figure.interval())
    return out


RANKING_PROTOCOLS: Mapping[str, Callable[[QuerySet, NDArray[np.int64]], dict[str, PerQuery]]] = {
    "fashioniq": fashioniq_figures,
    "cirr": cirr_figures,
    "circo": circo_figures,
    "pinpoint": pinpoint_figures,
}
"""By the dataset's name; HP-FashionIQ compares given sets (`preference_figures`) and ranks nothing."""


def ranking_figures(dataset: str, queries: QuerySet, ranked: NDArray[np.int64]) -> dict[str, PerQuery]:
    """The figures by query of a dataset in `RANKING_PROTOCOLS`. ranked: (Q, K >= 50 or the gallery), padded with -1. Raises InputError for
    another dataset."""
    if dataset not in RANKING_PROTOCOLS:
        raise InputError(f"{dataset!r}: no protocol for rankings; expected {', '.join(RANKING_PROTOCOLS)}")
    return RANKING_PROTOCOLS[dataset](queries, ranked)


def preference_figures(queries: QuerySet, found: Embeddings) -> dict[str, float]:
    """How often the set of higher mean score s(q, i) is the one that the person preferred, over all questions (equal means
    count half), and QuRe's preference ratio, which looks at the questions whose first set scores higher."""
    means = np.empty((2, len(queries)))
    preferred = np.empty(len(queries), np.int64)
    for row, query in enumerate(queries.queries):
        assert query.preference is not None
        preferred[row] = query.preference.preferred
        for side, images in enumerate((query.preference.first, query.preference.second)):
            tokens = found.target_tokens[queries.positions(images)]  # (5, M, D)
            means[side, row] = max_sim(found.queries[row][None], tokens).mean()
    return {
        "preference_accuracy": preference_accuracy(means[0], means[1], preferred),
        "preference_ratio": preference_ratio(means[0], means[1], preferred),
    }


def figures(dataset: str, queries: QuerySet, found: Embeddings) -> dict[str, float]:
    """The dataset's figures of one query set; none where its targets are secret."""
    if queries.secret:
        return {}
    if dataset == "hp-fashioniq":
        return preference_figures(queries, found)
    return {name: figure.value for name, figure in ranking_figures(dataset, queries, found.ranked).items()}


def summary(dataset: str, sets: Sequence[dict[str, float]]) -> dict[str, float]:
    """FashionIQ: the means over the categories, and their mean. CIRR: (R@5 + Rs@1) / 2. Others have none."""
    if not all(sets):
        return {}
    if dataset == "fashioniq":
        means = {f"recall_at_{k}": float(np.mean([s[f"recall_at_{k}"] for s in sets])) for k in (10, 50)}
        return means | {"mean": (means["recall_at_10"] + means["recall_at_50"]) / 2}
    (only,) = sets
    if dataset == "cirr":
        return {"mean_of_recall_at_5_and_subset_recall_at_1": (only["recall_at_5"] + only["subset_recall_at_1"]) / 2}
    return {}


def evaluate_benchmark(
    benchmark: Benchmark,
    rank: Ranker,
    *,
    split: str,
    options: Options | None = None,
    images: Path | None = None,
    allow_missing: bool = False,
    prepared: Callable[[QuerySet, Coverage], None] = lambda queries, coverage: None,
    checked: Progress = lambda done, total: None,
    probe: Probing | None = None,
) -> tuple[BenchmarkReport, tuple[RankedSet, ...]]:
    """Rank every query set of a split and work out its figures.

    `prepared` is told of each query set before the first is ranked, `checked` of the images looked at; `probe` looks at each query set
    once it is ranked. Raises InputError, for
    images that are missing or damaged, too, before any is encoded.
    """
    options = options or Options()
    folder = open_images(benchmark, images)
    placed = [place_queries(q, folder, allow_missing=allow_missing) for q in benchmark.query_sets(split, options, folder)]
    for queries, coverage in placed:
        prepared(queries, coverage)
    names = dict.fromkeys(folder.names[id] for queries, _ in placed for id in queries.gallery)
    require_readable(folder.root, list(names), progress=checked)  # all of them at once, and before the hours of work
    sets, ranked = [], []
    for queries, coverage in placed:
        files = [folder.names[id] for id in queries.gallery]
        found = rank(queries, folder.root, files)
        sets.append(SetReport(
            name=queries.name, coverage=coverage, figures=figures(benchmark.name, queries, found),
            aspects=aspect_figures(queries, found.ranked),
            probes=None if probe is None else probe(queries, folder.root, files, found),
        ))  # fmt: skip
        ranked.append(RankedSet(queries, found.ranked))
    report = BenchmarkReport(
        dataset=benchmark.name, split=split, protocol=benchmark.describe(options), sets=tuple(sets),
        summary=summary(benchmark.name, [s.figures for s in sets]),
    )  # fmt: skip
    return report, tuple(ranked)
