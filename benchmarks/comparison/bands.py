"""Ratios of figures, and how far from 1 they lie where nothing changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..statistics import LEAST_BLOCKS, Samples, student_95
from .figures import Figure

_RESAMPLES = 1000
Basis = Literal["blocks", "samples", "none"]
Verdict = Literal["better", "worse", "within noise"]


@dataclass(frozen=True, slots=True)
class Change:
    """`ratio` = new / old. `band`: where the ratio lies in 95 % of cases if nothing changed, as far as `basis` can tell.

    "blocks": from the variation between blocks of a run, so another run's state of the machine is in it; "samples": from the spread
    within each run alone; "none": one sample a side, or a zero, so no band and no verdict.
    """

    name: str
    unit: str
    old: float
    new: float
    ratio: float
    band: tuple[float, float]
    basis: Basis
    lower_is_better: bool

    @property
    def verdict(self) -> Verdict:
        if self.basis == "none" or self.band[0] <= self.ratio <= self.band[1]:
            return "within noise"
        return "better" if (self.ratio < 1) == self.lower_is_better else "worse"

    def regressed(self, factor: float) -> bool:
        """Beyond the band and worse by more than `factor`."""
        worse = self.ratio if self.lower_is_better else 1 / self.ratio if self.ratio else math.inf
        return self.verdict == "worse" and worse > factor


def change(old: Figure, new: Figure) -> Change:
    """Of two runs' figures of the same name."""
    before, after = old.value, new.value
    if before > 0 and after == 0 and not new.lower_is_better:  # nothing is left of it, and no ratio says how much worse that is
        return Change(new.name, new.unit, before, after, 0.0, (1.0, 1.0), "samples", new.lower_is_better)
    if min(old.samples.size, new.samples.size) < 2 or before <= 0 or after <= 0:
        ratio = after / before if before > 0 else math.nan
        return Change(new.name, new.unit, before, after, ratio, (math.nan, math.nan), "none", new.lower_is_better)
    band = _sample_band(old, new)
    basis: Basis = "samples"
    if (between := _block_spread(old, new)) is not None:
        band, basis = (min(band[0], math.exp(-between)), max(band[1], math.exp(between))), "blocks"
    return Change(new.name, new.unit, before, after, after / before, band, basis, new.lower_is_better)


def paired_change(name: str, old: Sequence[float], new: Sequence[float]) -> Change:
    """Of medians measured in turns: entry r of both is of round r. The band is Student's, of the rounds' log ratios about 1."""
    logs = np.log(np.asarray(new) / np.asarray(old))
    half = student_95(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    basis: Basis = "blocks" if len(logs) > 1 else "none"
    ratio = math.exp(float(logs.mean()))
    return Change(name, "s", float(np.median(old)), float(np.median(new)), ratio, (math.exp(-half), math.exp(half)), basis, True)


def _sample_band(old: Figure, new: Figure) -> tuple[float, float]:
    """About 1; the ratio lies outside of it where its 95 % bootstrap interval leaves out 1."""
    rng = np.random.default_rng(0)
    if old.paired and new.paired and old.samples.size == new.samples.size:
        drawn = rng.integers(0, old.samples.size, (_RESAMPLES, old.samples.size))
        before, after = old.samples[drawn].mean(axis=1), new.samples[drawn].mean(axis=1)
    else:
        before, after = (_drawn(rng, figure) for figure in (old, new))
    tiny = np.finfo(np.float64).tiny
    low, high = np.quantile(np.maximum(after, tiny) / np.maximum(before, tiny), (0.025, 0.975))
    ratio = new.value / old.value
    return float(ratio / high), float(ratio / low)


def _drawn(rng: np.random.Generator, figure: Figure) -> Samples:
    drawn = rng.choice(figure.samples, (_RESAMPLES, figure.samples.size))
    found: Samples = np.median(drawn, axis=1) if figure.unit == "s" else drawn.mean(axis=1)
    return found


def _block_spread(old: Figure, new: Figure) -> float | None:
    """Half-width, in logarithms: each run differs from the truth as one block more would. None for too few blocks."""
    if min(len(old.blocks), len(new.blocks)) < LEAST_BLOCKS:
        return None
    logs = [np.log([np.median(block) for block in figure.by_block]) for figure in (old, new)]
    freedom = sum(len(values) - 1 for values in logs)
    return student_95(freedom) * math.sqrt(sum(float(values.var(ddof=1)) for values in logs))
