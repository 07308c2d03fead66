"""From finished cells to what results.json holds: every arm's figures, and its differences from the first arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import msgspec

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.versioned import Versioned

from ..config import TrainConfig
from ..evaluation.metrics import PerQuery
from .plan import SCHEMA_VERSION, Plan
from .results import CellResult
from .statistics import Difference, Summary, compare, summarise

# Score -> what the table calls it, in its order. These and the zones' are shares; only cells that mine negatives have the zones'.
FIGURES = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "recall_at_50": "R@50",
    "subset_recall_at_1": "Rs@1",
    "subset_recall_at_2": "Rs@2",
    "subset_recall_at_3": "Rs@3",
    "map_at_10": "mAP@10",
    "attribute_precision_at_10": "attribute precision@10",
    "near_confusion": "near confusion",
    "heldout_recall_at_10": "R@10, unseen combinations",
    "valid_above_wrong": "valid above the first wrong",
    "same_reference_overlap": "overlap, same reference",
    "same_text_overlap": "overlap, same text",
    "train_target_ahead": "labelled ahead of unlabelled (train)",
}
# Differences of cosines, shown as they are.
COSINE_FIGURES = {"train_score_gap": "score, labelled over unlabelled (train)"}
ZONE_FIGURES = {
    "zone_false_negatives": "false negatives",
    "zone_near_misses": "one attribute off",
    "zone_pull": "pull σ(−Δ/τ)",
    "batch_is_harder": "easier than the batch's hardest",
    "stale_false_negatives": "last refresh: false negatives",
    "stale_in_near": "last refresh: near by now",
    "stale_in_mid": "last refresh: still mid",
}


class ArmResult(Contract, frozen=True):
    """One row of the table, over its finished seeds. `settings`: the `section.key=value` that its configuration has and the first arm's has
    not; empty in files of before they were told."""

    label: str
    seeds: tuple[int, ...]
    steps: Summary
    seconds: Summary
    refreshes: Summary
    figures: dict[str, Summary]
    differences: dict[str, Difference]
    settings: tuple[str, ...] = ()


class CellFigures(Contract, frozen=True):
    """One training in figures: what `cells/<key>.json` has query by query."""

    arm: str
    seed: int
    steps: int
    seconds: float
    refreshes: int
    figures: dict[str, float | None]


class Comparison(Versioned, frozen=True, kw_only=True):
    """results.json. Figures are shares in [0, 1], but for `COSINE_FIGURES`; differences are from the arm `against`;
    `unfinished` cells are left out of everything else. Schema version 2 had no `kind`."""

    OLDEST_SCHEMA: ClassVar[int] = 2

    kind: Literal["ablation-results"] = "ablation-results"
    schema_version: int = SCHEMA_VERSION
    data: str
    budget: str
    against: str
    machines: tuple[str, ...]
    left_out: tuple[str, ...]
    unfinished: int
    arms: tuple[ArmResult, ...]
    cells: dict[str, CellFigures]


def compare_cells(plan: Plan, results: Mapping[str, CellResult], *, data: str) -> Comparison:
    """What the finished cells of a plan say."""
    by_arm: dict[str, dict[int, CellResult]] = {arm.label: {} for arm in plan.arms}
    cells: dict[str, CellFigures] = {}
    for cell in plan.cells:
        if (result := results.get(cell.key)) is None:
            continue
        by_arm[cell.arm][cell.seed] = result
        values = {name: ratio.figure.value for name, ratio in result.scores.items()}
        figures = {name: None if math.isnan(value) else value for name, value in values.items()}
        cells[cell.key] = CellFigures(
            arm=cell.arm, seed=cell.seed, steps=result.steps, seconds=result.seconds, refreshes=result.refreshes, figures=figures
        )
    against = plan.arms[0].label
    first = by_arm[against]
    configs = {arm.label: arm.config for arm in plan.arms}
    arms = [
        _arm(label, found, {} if found is first else first, settings(configs[label], configs[against]))
        for label, found in by_arm.items()
        if found
    ]
    return Comparison(
        data=data, budget=plan.budget, against=against,
        machines=tuple(sorted({r.machine for r in results.values()})), left_out=plan.left_out,
        unfinished=len(plan.cells) - len(cells), arms=tuple(arms), cells=cells,
    )  # fmt: skip


def settings(config: TrainConfig, first: TrainConfig) -> tuple[str, ...]:
    """What `config` sets otherwise than `first`, but for the seed: `section.key=value`."""
    theirs = _flat("", msgspec.to_builtins(first))
    ours = _flat("", msgspec.to_builtins(config)).items()
    return tuple(f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in ours if v != theirs[key] and key != "optim.seed")


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: v for key, each in value.items() for path, v in _flat(f"{name}.{key}" if name else key, each).items()}


def _arm(label: str, found: Mapping[int, CellResult], first: Mapping[int, CellResult], sets: tuple[str, ...]) -> ArmResult:
    seeds, shared = tuple(sorted(found)), sorted(set(found) & set(first))
    names = [name for name in (*FIGURES, *COSINE_FIGURES, *ZONE_FIGURES) if any(name in found[seed].scores for seed in seeds)]
    figures = {name: summarise([r.scores[name].figure.value for r in found.values() if name in r.scores]) for name in names}
    differences = {
        name: compare(_scores(found, shared, name), _scores(first, shared, name))
        for name in names
        if all(name in cells[seed].scores for cells in (found, first) for seed in shared)
    }
    runs = [found[seed] for seed in seeds]
    return ArmResult(
        label=label, seeds=seeds, steps=_over(r.steps for r in runs), seconds=_over(r.seconds for r in runs),
        refreshes=_over(r.refreshes for r in runs),
        figures={name: figure for name, figure in figures.items() if figure is not None},
        differences={name: difference for name, difference in differences.items() if difference is not None},
        settings=sets,
    )  # fmt: skip


def _over(values: Iterable[float]) -> Summary:
    found = summarise(list(values))
    assert found is not None  # an arm is only made of finished cells
    return found


def _scores(cells: Mapping[int, CellResult], seeds: list[int], name: str) -> list[PerQuery]:
    return [cells[seed].scores[name].figure for seed in seeds]


def shown(comparison: Comparison, names: Mapping[str, str]) -> dict[str, str]:
    """Those of `names` that some arm has."""
    return {name: title for name, title in names.items() if any(name in arm.figures for arm in comparison.arms)}
