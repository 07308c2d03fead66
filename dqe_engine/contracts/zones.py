"""The Δ-score zones: near, mid and easy, by bounds on Δ = anchor score - candidate score (paper section on TRNS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

from .parsing import Contract

Bounds = Literal["absolute", "pooled", "rank"]
Policy = Literal["hardest", "uniform", "softmax"]


class ZoneSpec(Contract, frozen=True):
    """near: Δ < lo; mid: lo <= Δ <= hi (both inclusive); easy: Δ > hi.

    `bounds`, what lo and hi are:
    "absolute": scores.
    "pooled": fractions in [0, 1] of all Δ >= 0 of a call, its queries and candidates taken together. They become absolute
        bounds (at least 0) once for the whole call (`dqe_engine.zones.resolve_pooled`). So bounds follow the scale of the scores, and an
        item that scores above the target is never mid.
    "rank": fractions in [0, 1] of the query's own list, best first. The anchor cancels: the mid zone is the same ranks of the
        list whatever the target is. A baseline (negatives by rank, as ANCE takes them), not target relative.

    Picks are the top P of a key over the mid zone: `hardest` the score, `uniform` a uniform variate, `softmax` score /
    temperature + Gumbel noise (sampling without replacement).
    """

    retired: ClassVar[Mapping[str, str]] = {
        "quantile": "it is called 'rank' now and does not depend on the target; take 'pooled' for zones that do"
    }

    lo: float
    hi: float
    bounds: Bounds = "absolute"
    policy: Policy = "uniform"
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        # For zones made in Python; where they are parsed, `parse` says the same.
        for name, value, allowed in (("bounds", self.bounds, get_args(Bounds)), ("policy", self.policy, get_args(Policy))):
            if value not in allowed:
                advice = f"; {self.retired[value]}" if value in self.retired else ""
                raise ValueError(f"zone {name} {value!r}: expected {', '.join(allowed[:-1])} or {allowed[-1]}{advice}")
        if math.isnan(self.lo) or math.isnan(self.hi) or self.lo > self.hi:
            raise ValueError(f"zone bounds must satisfy lo <= hi, got lo={self.lo}, hi={self.hi}")
        if self.bounds != "absolute" and not 0 <= self.lo <= self.hi <= 1:
            raise ValueError(f"{self.bounds} bounds must lie in [0, 1], got lo={self.lo}, hi={self.hi}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must fit 64 bits unsigned, got {self.seed}")
