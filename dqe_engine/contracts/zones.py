"""The Δ-score zones: near, mid and easy, by bounds on Δ = anchor score - candidate score (paper section on TRNS)."""

from __future__ import annotations

import math
from typing import Literal

from .parsing import Contract

Policy = Literal["hardest", "uniform", "softmax"]


class ZoneSpec(Contract, frozen=True):
    """near: Δ < lo; mid: lo <= Δ <= hi (both inclusive); easy: Δ > hi.

    `bounds`: "absolute" gives lo and hi in score units; "quantile" gives them as fractions in [0, 1] of the query's
    own Δ distribution over the candidates. Picks are the top P of a key over the mid zone: `hardest` the score,
    `uniform` a uniform variate, `softmax` score / temperature + Gumbel noise (sampling without replacement).
    """

    lo: float
    hi: float
    bounds: Literal["absolute", "quantile"] = "absolute"
    policy: Policy = "uniform"
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.lo) or math.isnan(self.hi) or self.lo > self.hi:
            raise ValueError(f"zone bounds must satisfy lo <= hi, got lo={self.lo}, hi={self.hi}")
        if self.bounds == "quantile" and not 0 <= self.lo <= self.hi <= 1:
            raise ValueError(f"quantile bounds must lie in [0, 1], got lo={self.lo}, hi={self.hi}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must fit 64 bits unsigned, got {self.seed}")
