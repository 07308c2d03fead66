"""A refresh of the mined negatives, of FashionIQ's size: ours against materialise + argsort + Python.

The peers follow the published mining of QuRe (ICML 2025): all queries x items x tokens dot products in float32 at once, their
maximum over the tokens, then for each query an argsort and lists. Both sides are measured on a slice of the queries against all
items; cost is linear in the queries, so the whole is extrapolated from the slice.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones.arrays import I64
from dqe_engine.zones.mining import MinedNegatives, mine_negatives

from ..harness import Agreement, Contender
from .checks import ATOL, SearchCheck
from .vectors import Vectors, VectorSpec, vectors

ZONES = ZoneSpec(lo=0.002, hi=0.02, bounds="rank", policy="uniform")
PICKS = 16
"""Zones by rank: every query has one of the same size, and so the same work for all. Training's default is the pooled bounds."""
OURS, PEER, QURE = "ours", "materialise + argsort + Python", "materialise + argsort + QuRe's score drops"
_CATEGORIES = 3
"""FashionIQ's; QuRe ranks within the category of the query."""


@dataclass(frozen=True, slots=True, eq=False)
class RefreshInputs:
    data: Vectors
    references: I64  # (Q,)
    threads: int


@dataclass(frozen=True, slots=True, eq=False)
class RefreshAnswer:
    anchors: NDArray[Any]  # (Q,) the targets' scores
    lo: NDArray[Any] | None = None  # (Q,) bounds of Δ
    hi: NDArray[Any] | None = None
    picks: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class RefreshCase:
    """Mine for `spec.queries` of the training queries; `peers`: with those that hold all dot products at once."""

    spec: VectorSpec
    threads: int
    peers: bool = True

    @property
    def label(self) -> str:
        return f"refresh, {self.spec.queries:,} queries × {self.spec.items:,} items × {self.spec.tokens} tokens"

    def describe(self) -> dict[str, Any]:
        zones = {"lo": ZONES.lo, "hi": ZONES.hi, "bounds": ZONES.bounds, "policy": ZONES.policy, "picks": PICKS}
        return dataclasses.asdict(self.spec) | zones | {"threads": self.threads}

    def small(self) -> RefreshCase:
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, items=2000, queries=2))

    def inputs(self) -> RefreshInputs:
        data = vectors(self.spec)
        references = (data.targets + 1) % self.spec.items
        return RefreshInputs(data, references, self.threads)

    def contenders(self) -> Sequence[Contender]:
        ours = Contender(OURS, _ours, _our_answer)
        return [ours, Contender(PEER, _peer, package="torch"), Contender(QURE, _qure, package="torch")] if self.peers else [ours]

    def checker(self, inputs: RefreshInputs) -> Callable[[RefreshAnswer], Agreement]:
        return _RefreshCheck(inputs)


def _ours(inputs: RefreshInputs) -> Callable[[], MinedNegatives]:
    data = inputs.data
    return lambda: mine_negatives(
        data.queries,
        data.items,
        data.targets,
        zones=ZONES,
        picks=PICKS,
        exclude=inputs.references[:, None],
        threads=inputs.threads,
        backend="cpu",
    )


def _our_answer(found: MinedNegatives) -> RefreshAnswer:
    return RefreshAnswer(found.anchor_scores, found.lo, found.hi, [[i for i in row if i >= 0] for row in found.picks.tolist()])


def _scores(inputs: RefreshInputs) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(inputs.threads)
    queries, items = torch.from_numpy(inputs.data.queries), torch.from_numpy(inputs.data.items)
    return lambda: torch.einsum("ik,jlk->ijl", queries, items).max(-1)[0]


def _peer(inputs: RefreshInputs) -> Callable[[], RefreshAnswer]:
    """The same zones as ours: candidates between two ranks of the query's list without its target and its reference."""
    import torch

    all_scores = _scores(inputs)
    targets, references = inputs.data.targets.tolist(), inputs.references.tolist()

    def run() -> RefreshAnswer:
        scores = all_scores()
        anchors, lows, highs, picks = [], [], [], []
        rng = random.Random(0)
        for row, (target, reference) in enumerate(zip(targets, references, strict=True)):
            order = torch.argsort(scores[row], dim=-1, descending=True).tolist()
            order = [item for item in order if item != target and item != reference]
            first, last = (math.floor(fraction * (len(order) - 1)) for fraction in (ZONES.lo, ZONES.hi))
            candidates = order[first : last + 1]
            anchor = scores[row, target].item()
            anchors.append(anchor)
            lows.append(anchor - scores[row, candidates[0]].item())
            highs.append(anchor - scores[row, candidates[-1]].item())
            picks.append(rng.sample(candidates, min(PICKS, len(candidates))))
        return RefreshAnswer(np.array(anchors), np.array(lows), np.array(highs), picks)

    return run


def _qure(inputs: RefreshInputs) -> Callable[[], RefreshAnswer]:
    """QuRe's own zone: from the largest to the second largest score drop after the target, within the category."""
    import torch

    all_scores = _scores(inputs)
    size = len(inputs.data.items)
    members = [list(range(start, size, _CATEGORIES)) for start in range(_CATEGORIES)]
    names = [[f"B{item:09d}" for item in category] for category in members]
    targets = inputs.data.targets.tolist()

    def run() -> RefreshAnswer:
        scores = all_scores()
        anchors, hard = [], []
        for row, target in enumerate(targets):
            category = target % _CATEGORIES
            own = scores[row][members[category]]
            order = torch.argsort(own, dim=-1, descending=True)
            ranked = order.tolist()
            place = names[category].index(f"B{target:09d}")
            after = ranked.index(place) + 1
            drops = np.argsort(np.diff(own[order].numpy()[after:])) + after
            first, last = after, len(ranked) - 1
            for one, other in pairwise(drops.tolist()):
                if abs(one - other) > 1:
                    first, last = min(one, other), max(one, other)
                    break
            anchors.append(own[place].item())
            hard.append(list({names[category][item] for item in ranked[first + 1 : last + 1]}))
        return RefreshAnswer(np.array(anchors))

    return run


class _RefreshCheck:
    """Targets' scores and zone bounds as in float64, picks in the mid zone and neither target nor reference."""

    def __init__(self, inputs: RefreshInputs) -> None:
        search = SearchCheck(inputs.data.queries, inputs.data.items, 1)
        self.rows = search.rows
        truth = search.truth("float32")
        targets, places = inputs.data.targets[self.rows], np.arange(len(self.rows))
        self.anchors = truth[places, targets]
        truth[places, targets] = truth[places, inputs.references[self.rows]] = -np.inf
        self.delta = self.anchors[:, None] - truth  # (b, N); infinite: no candidate
        ranked = np.sort(self.delta, axis=1)
        n = truth.shape[1] - 2
        self.bounds = [ranked[:, math.floor(fraction * (n - 1))] for fraction in (ZONES.lo, ZONES.hi)]

    def __call__(self, answer: RefreshAnswer) -> Agreement:
        errors = [np.abs(answer.anchors[self.rows] - self.anchors).max()]
        if answer.lo is None or answer.hi is None:
            return self._verdict(float(errors[0]), "")
        errors += [np.abs(found[self.rows] - true).max() for found, true in zip((answer.lo, answer.hi), self.bounds, strict=True)]
        for place, row in enumerate(self.rows):
            picks = list(answer.picks[row])
            delta = self.delta[place, picks]
            if len(set(picks)) < PICKS or (delta < self.bounds[0][place] - ATOL).any() or (delta > self.bounds[1][place] + ATOL).any():
                return self._verdict(float(max(errors)), f"query {row}: picks outside the mid zone, or not {PICKS} different ones")
        return self._verdict(float(max(errors)), "")

    @staticmethod
    def _verdict(error: float, detail: str) -> Agreement:
        detail = detail or ("" if error <= 2 * ATOL else f"bounds or target scores off by {error:.2g}, above {2 * ATOL:g}")
        return Agreement(not detail, error, 1.0 if not detail else 0.0, detail)
