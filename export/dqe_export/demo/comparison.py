"""Whether one model beats another, from the figures alone: what the page says in words is computed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dqe_training.evaluation.protocol import Report

from .report_data import ModelResult

# Report key → what the page calls it, in the order of the table.
FIGURES: dict[str, str] = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "recall_at_50": "R@50",
    "heldout_recall_at_10": "held-out R@10",
    "attribute_precision_at_10": "attribute precision@10",
    "map_at_10": "mAP@10",
    "map_at_50": "mAP@50",
}
_Z = 1.959964  # two-sided 95 % of the normal distribution

Outcome = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, half the width of its 95 % interval over queries, and the lowest and highest seed."""

    value: float
    half: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """`value` = ours − other; `margin` = half-width of its 95 % interval, None where it is not known; all shares in [0, 1]."""

    label: str
    value: float
    margin: float | None
    outcome: Outcome


def figure(model: ModelResult, key: str) -> Figure | None:
    """One figure of a model with its interval; None where the reports lack it or it is NaN."""
    values = [value for r in model.reports if (value := getattr(r, key)) is not None and not math.isnan(value)]
    if not values:
        return None
    halves = [model.halves[key]] if key in model.halves else [_half_width(r, key) for r in model.reports]
    return Figure(sum(values) / len(values), sum(halves) / len(halves), min(values), max(values))


def _half_width(report: Report, key: str) -> float:
    """Of the 95 % interval of one model's figure: the bootstrap's for R@10, else Wilson's, which for means of per-query shares is an upper
    bound, and so too wide for mAP."""
    if key == "recall_at_10" and not any(map(math.isnan, report.recall_at_10_interval)):
        low, high = report.recall_at_10_interval
        return (high - low) / 2
    value = getattr(report, key)
    queries = report.heldout_queries if key.startswith("heldout") else report.queries
    if key == "attribute_precision_at_10" and report.attainable_precision_at_10:
        # a ratio whose denominator is known: the interval of the share found, scaled
        return _wilson(value * report.attainable_precision_at_10, queries) / report.attainable_precision_at_10
    return _wilson(value, queries)


def _wilson(share: float, count: int) -> float:
    if count < 1 or math.isnan(share):
        return 1.0
    spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
    return _Z * math.sqrt(max(spread, 0.0)) / (1 + _Z**2 / count)


def compare(ours: ModelResult, other: ModelResult) -> tuple[Difference, ...]:
    """Differences on every figure that both have.

    Better or worse only if the difference is larger than its margin and, with several seeds, every seed of the one is above every seed
    of the other. Margins are of paired differences (`ModelResult.margins`). Two separate intervals are no substitute: added up they are
    wider, so they would call a loss unclear that the same queries show.
    """
    found = []
    for key, label in FIGURES.items():
        a, b = figure(ours, key), figure(other, key)
        if a is None or b is None:
            continue
        value, margin = a.value - b.value, other.margins.get(key)
        outcome: Outcome = "unclear"
        if margin is None:
            pass
        elif value > margin and a.low > b.high:
            outcome = "better"
        elif -value > margin and a.high < b.low:
            outcome = "worse"
        found.append(Difference(label, value, margin, outcome))
    return tuple(found)


def points(value: float) -> str:
    """A difference of shares in percentage points, signed: 0.061 → "+6.1"."""
    return f"{100 * value:+.1f}".replace("-", "−")


def verdict(ours: ModelResult, other: ModelResult) -> tuple[str, ...]:
    """Plain sentences: where `ours` beats `other`, where it does not, and what the comparison rests on."""
    differences = compare(ours, other)
    if not differences:
        return (f"{ours.name} and {other.name} share no figure, so they cannot be compared.",)
    by: dict[Outcome, list[Difference]] = {"better": [], "worse": [], "unclear": []}
    for difference in differences:
        by[difference.outcome].append(difference)
    sentences = []
    if by["better"]:
        where = f"all {len(differences)} figures" if len(by["better"]) == len(differences) > 1 else _listed(by["better"])
        sentences.append(f"{ours.name} beats the {other.name} on {where}.")
    else:
        sentences.append(f"{ours.name} does not beat the {other.name} on any figure.")
    if by["unclear"]:
        sentences.append(f"No measurable difference on {_listed(by['unclear'], margins=True)}.")
    if by["worse"]:
        sentences.append(f"{ours.name} is worse on {_listed(by['worse'], margins=True)}.")
    return (*sentences, _basis(ours, other))


def _basis(ours: ModelResult, other: ModelResult) -> str:
    seeds = f"{_count(ours)} each"
    if len(ours.reports) != len(other.reports):
        seeds = f"{_count(ours)} of {ours.name} and {_count(other).lower()} of {other.name}"
    over = f"{ours.reports[0].queries:,} queries over {ours.reports[0].gallery:,} images"
    text = f"{seeds}, {over}; differences in percentage points, paired by query"
    if min(len(ours.reports), len(other.reports)) == 1:
        return f"{text}. With one seed the spread between trainings is not measured."
    return f"{text}, counted only where every seed agrees."


def _count(model: ModelResult) -> str:
    return "One seed" if len(model.reports) == 1 else f"{len(model.reports)} seeds"


def _listed(differences: Sequence[Difference], *, margins: bool = False) -> str:
    items = [f"{d.label} ({points(d.value)}{'' if d.margin is None or not margins else f' ± {100 * d.margin:.1f}'})" for d in differences]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
