"""Means over seeds and paired differences, with intervals that say what can be concluded (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract

_Z = 1.959964  # two-sided 95 % of the normal distribution
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
    2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Verdict = Literal["higher", "lower", "unclear", "one seed"]


class Figure(Protocol):
    """What is compared: a `PerQuery`, or a sum of such of the same queries."""

    @property
    def value(self) -> float: ...
    @property
    def influence(self) -> NDArray[np.float64]: ...


class Summary(Contract, frozen=True):
    """A figure over seeds. `deviation`: the sample standard deviation, None with one seed."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]


class Difference(Contract, frozen=True):
    """An arm minus the first one, over the `seeds` that both have finished.

    `half`: half-width of the 95 % interval; `half_seeds` and `half_queries` are its parts, added in quadrature. None where one
    seed leaves the spread between trainings unknown. `values`: the difference of each seed.
    """

    value: float
    half: float | None
    half_seeds: float | None
    half_queries: float
    seeds: int
    values: tuple[float, ...]
    verdict: Verdict


def student_t(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; within 0.002 above 30 degrees of freedom."""
    return _T[freedom - 1] if freedom <= len(_T) else _Z + 2.46 / freedom


def summarise(values: Sequence[float]) -> Summary | None:
    """None where a value is missing or NaN in every seed."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Summary(mean=float(np.mean(known)), deviation=deviation, values=tuple(known))


def compare(ours: Sequence[Figure], other: Sequence[Figure]) -> Difference | None:
    """The paired difference ours - other; entry s of both is of the same seed, query i of all is the same query.

    Two things vary: the training (seeds), whose share is Student's t interval of the paired differences, and which queries are
    asked, whose share is the normal interval of the seeds' mean influence difference per query. Better or worse is said only
    where both together leave zero outside. None where a figure is NaN.
    """
    values = [a.value - b.value for a, b in zip(ours, other, strict=True)]
    if not values or any(map(math.isnan, values)):
        return None
    per_query = np.mean([a.influence - b.influence for a, b in zip(ours, other, strict=True)], axis=0)  # (Q,)
    half_queries = _Z * float(per_query.std(ddof=1)) / math.sqrt(len(per_query)) if len(per_query) > 1 else math.inf
    value = float(np.mean(values))
    half_seeds = half = None
    verdict: Verdict = "one seed"
    if len(values) > 1:
        half_seeds = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = math.hypot(half_seeds, half_queries)
        verdict = "higher" if value > half else "lower" if -value > half else "unclear"
    return Difference(
        value=value, half=half, half_seeds=half_seeds, half_queries=half_queries, seeds=len(values), values=tuple(values), verdict=verdict
    )
