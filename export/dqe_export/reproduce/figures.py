"""A dataset's columns as sums over queries, so that values, intervals and paired differences come out of the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract
from dqe_training.data.public.fashioniq import CATEGORIES
from dqe_training.evaluation.metrics import PerQuery

F64 = NDArray[np.float64]
Interval = tuple[float, float]
_ROUNDS, _LEVEL = 1000, 0.95


class Figure(Contract, frozen=True):
    """In [0, 1], a difference in [-1, 1]. `interval`: 95 %, percentile bootstrap over the queries of each set."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Measure:
    """A column: the weighted sum of figures of query sets. `parts`: name of the set ("" for the only one), of the figure, weight."""

    name: str
    title: str
    parts: tuple[tuple[str, str, float], ...]


def measures_of(dataset: str) -> tuple[Measure, ...]:
    """In the order of the table's columns; `evaluation.benchmarks` has the same values under the same names."""
    if dataset == "fashioniq":
        each = [Measure(f"{c}/recall_at_{k}", f"{c} R@{k}", ((c, f"recall_at_{k}", 1.0),)) for c in CATEGORIES for k in (10, 50)]
        mean = tuple((c, f"recall_at_{k}", 1 / 6) for c in CATEGORIES for k in (10, 50))
        return (*each, Measure("mean", "mean", mean))
    if dataset == "cirr":
        recalls = [Measure(f"recall_at_{k}", f"R@{k}", (("", f"recall_at_{k}", 1.0),)) for k in (1, 5, 10, 50)]
        within = [Measure(f"subset_recall_at_{k}", f"Rs@{k}", (("", f"subset_recall_at_{k}", 1.0),)) for k in (1, 2, 3)]
        name, half = "mean_of_recall_at_5_and_subset_recall_at_1", (("", "recall_at_5", 0.5), ("", "subset_recall_at_1", 0.5))
        return (*recalls, *within, Measure(name, "(R@5 + Rs@1) / 2", half))
    return tuple(Measure(f"map_at_{k}", f"mAP@{k}", (("", f"map_at_{k}", 1.0),)) for k in (5, 10, 25, 50))


Rows = Mapping[str, F64]
"""By query set, (Q, measures): what each query adds to each measure; the means over Q, summed over the sets, are the measures."""


def rows_of(measures: Sequence[Measure], figures: Mapping[str, Mapping[str, PerQuery]]) -> Rows:
    """`figures`: of each query set, by name, as `ranking_figures` gives them."""
    rows = {}
    for name, by_name in figures.items():
        columns = []
        for measure in measures:
            parts = [weight * _shares(by_name[figure]) for at, figure, weight in measure.parts if at in ("", name)]
            columns.append(np.sum(parts, axis=0) if parts else np.zeros_like(next(iter(by_name.values())).numerator))
        rows[name] = np.stack(columns, axis=1)
    return rows


def _shares(figure: PerQuery) -> F64:
    return figure.numerator / figure.denominator.mean()


def summarise(measures: Sequence[Measure], rows: Rows) -> dict[str, Figure]:
    """Value and interval of each measure. Of two rows' difference, they are those of the paired difference."""
    values = np.sum([part.mean(axis=0) for part in rows.values()], axis=0)
    drawn = np.sum([_draws(len(part), seed) @ part / len(part) for seed, part in enumerate(rows.values())], axis=0)
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return {
        m.name: Figure(value=float(values[i]), interval=(float(low[i]), float(high[i]))) for i, m in enumerate(measures)
    }  # fmt: skip


def difference(one: Rows, other: Rows) -> Rows:
    """Of the same queries, in the same order."""
    return {name: one[name] - other[name] for name in one}


@lru_cache(maxsize=8)
def _draws(queries: int, seed: int) -> F64:
    """(rounds, Q): how often each query is drawn. The same for every row and view, so that differences are paired."""
    return np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), _ROUNDS).astype(np.float64)
