"""Least squares with coefficients of at least 0, relative to what is fitted: enough for a cost model of a few terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

Point = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Fit:
    """`seconds` = sum of coefficient × term; terms that do not help have coefficient 0."""

    coefficients: dict[str, float]

    def __call__(self, point: Point) -> float:
        return sum(value * point[name] for name, value in self.coefficients.items())

    def error(self, point: Point, seconds: float) -> float:
        """Signed, relative to what was measured."""
        return self(point) / seconds - 1

    def record(self) -> dict[str, Any]:
        return dict(self.coefficients)


def fit(points: Sequence[Point], seconds: Sequence[float]) -> Fit:
    """The non-negative coefficients with the smallest sum of squared relative errors, by trying each set of terms.

    points: the value of each term, the same terms in all. seconds: positive. A term that is negative in an unconstrained fit of every
    set that holds it is left out, which is what non-negative least squares does.
    """
    terms = list(points[0])
    design = np.array([[point[term] for term in terms] for point in points]) / np.array(seconds)[:, None]
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1.0
    best, found = np.inf, np.zeros(len(terms))
    for count in range(1, min(len(terms), len(points)) + 1):
        for chosen in map(list, combinations(range(len(terms)), count)):
            part = design[:, chosen] / scale[chosen]
            solved = np.linalg.lstsq(part, np.ones(len(points)), rcond=None)[0]
            loss = float(np.square(part @ solved - 1).sum())
            if (solved >= 0).all() and loss < best:
                best, found = loss, np.zeros(len(terms))
                found[chosen] = solved / scale[chosen]
    return Fit({term: float(value) for term, value in zip(terms, found, strict=True)})
