"""Arms that join a finished table, whose answers query by query are gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.method_controls import AGAIN, Arms, difference, merge
from dqe_training.ablation.comparison import ArmResult, CellFigures, Comparison
from dqe_training.ablation.statistics import Difference, Summary, compare
from dqe_training.evaluation.metrics import PerQuery

SEEDS, QUERIES = (0, 1, 2), 40
UNIFORM, CONSTANT = "+pool+kl:uniform", "+law:constant"


def drawn(*arms: str) -> dict[tuple[str, int], PerQuery]:
    rng = np.random.default_rng(0)
    return {(arm, seed): PerQuery.of(rng.integers(0, 2, QUERIES).tolist()) for arm in arms for seed in SEEDS}


def test_with_all_answers_it_is_the_ablations_difference() -> None:
    hits = drawn("a", "b")
    (a, b) = ({seed: hits[arm, seed] for seed in SEEDS} for arm in ("a", "b"))
    values = [{seed: figure.value for seed, figure in each.items()} for each in (a, b)]
    whole = compare([a[seed] for seed in SEEDS], [b[seed] for seed in SEEDS])
    assert whole is not None
    assert difference(*values, a, b, None) == whole
    assert difference(*values, a, {}, None) is None
    borrowed = difference(*values, a, {}, 0.25)
    assert borrowed is not None
    assert (borrowed.value, borrowed.half_seeds, borrowed.half_queries) == (whole.value, whole.half_seeds, 0.25)
    one = difference(*values, {0: a[0]}, {0: b[0]}, 0.25)
    alone = compare([a[0]], [b[0]])
    assert one is not None
    assert alone is not None
    assert (one.half_queries, one.half_seeds) == (alone.half_queries, whole.half_seeds)
    assert difference(values[0], {9: 0.5}, a, b, 0.25) is None


def summary() -> Summary:
    return Summary(mean=0.5, deviation=0.1, values=(0.4, 0.6))


def arm(label: str, **differences: Difference) -> ArmResult:
    runs = {"steps": summary(), "seconds": summary(), "refreshes": summary()}
    return ArmResult(label=label, seeds=SEEDS, figures={"recall_at_10": summary()}, differences=differences, **runs)  # type: ignore[arg-type]


def table_of(hits: dict[tuple[str, int], PerQuery], *arms: ArmResult) -> Comparison:
    cells = {
        f"old {name} {seed}": CellFigures(arm=name, seed=seed, steps=1, seconds=1, refreshes=0, figures={"recall_at_10": figure.value})
        for (name, seed), figure in hits.items()
    }
    return Comparison(data="tiny", budget="steps", against="+pool", machines=("one",), left_out=(), unfinished=0, arms=arms, cells=cells)


def trained(hits: dict[tuple[str, int], PerQuery]) -> tuple[Any, Any]:
    plan = SimpleNamespace(cells=[SimpleNamespace(arm=name, seed=seed, key=f"{name} {seed}") for name, seed in hits])
    scores = {key: {"recall_at_10": SimpleNamespace(figure=figure)} for key, figure in hits.items()}
    return plan, {f"{name} {seed}": SimpleNamespace(scores=found) for (name, seed), found in scores.items()}


def test_a_new_arm_joins_and_the_old_ones_stay() -> None:
    hits = drawn("+pool", "+law:unlabelled", CONSTANT)
    known = difference(*({seed: hits[name, seed].value for seed in SEEDS} for name in ("+law:unlabelled", "+pool")), {}, {}, 0.125)
    assert known is not None
    new = {at: hits[at] for at in hits if at[0] == CONSTANT}
    old = table_of({at: hits[at] for at in hits if at not in new}, arm("+pool"), arm("+law:unlabelled", recall_at_10=known))
    results = trained(new | {("+law:unlabelled", 0): hits["+law:unlabelled", 0]})
    arms = Arms(old, *results)
    assert arms.repeated() == [("+law:unlabelled", 0, 0)]
    made = table_of(new, arm(CONSTANT), arm("+law:unlabelled"))
    sets = {"+pool": (), CONSTANT: ("model.weights_from=constant",), "never trained": (), "+law:unlabelled": ("some=other",)}
    merged = merge(old, made, arms, sets)
    assert [each.label for each in merged.arms] == ["+pool", CONSTANT, "+law:unlabelled"]
    assert [each.settings for each in merged.arms] == [sets["+pool"], sets[CONSTANT], sets["+law:unlabelled"]]
    assert msgspec.structs.replace(merged.arms[2], settings=()) == old.arms[1]
    found = merged.arms[1].differences["recall_at_10"]
    assert found.value == pytest.approx(np.mean([hits[CONSTANT, seed].value - hits["+pool", seed].value for seed in SEEDS]))
    assert found.half_queries == 0.125  # no answers of +pool: the interval of +law:unlabelled stands in
    measured = arms.compare("+law:unlabelled", CONSTANT, "recall_at_10")
    alone = compare([hits["+law:unlabelled", 0]], [hits[CONSTANT, 0]])
    assert measured is not None
    assert alone is not None
    assert measured.half_queries == alone.half_queries  # seed 0 has the answers of both
    assert len(merged.cells) == 9
    assert merge(merged, made, Arms(merged, *results), sets) == merged  # once more from what was written: nothing comes twice


def test_an_arm_with_the_pool_is_compared_with_todays_draw_alone() -> None:
    hits = drawn("+pool", "today", UNIFORM)
    old = table_of({at: hits[at] for at in hits if at[0] == "+pool"}, arm("+pool"))
    new = {at: hits[at] for at in hits if at[0] == UNIFORM}
    made = table_of(new, arm("+pool"), arm(UNIFORM))
    sets: dict[str, tuple[str, ...]] = {"+pool": (), UNIFORM: ()}
    assert Arms(old, *trained(new)).from_first(UNIFORM, "recall_at_10") is None
    arms = Arms(old, *trained(new | {("+pool", seed): hits["today", seed] for seed in SEEDS}))
    merged = merge(old, made, arms, sets)
    assert [each.label for each in merged.arms] == ["+pool", f"+pool{AGAIN}", UNIFORM]
    assert (merged.arms[0], merged.arms[1].differences) == (old.arms[0], {})
    wanted = compare(*([hits[name, seed] for seed in SEEDS] for name in (UNIFORM, "today")))
    assert merged.arms[2].differences["recall_at_10"] == wanted
    assert arms.repeated() == []


def test_another_figure_is_seen() -> None:
    hits = drawn("+pool", "+law")
    old = table_of(hits, arm("+pool"), arm("+law"))
    other = PerQuery.of((1 - np.asarray(hits["+law", 1].numerator)).tolist())
    ((name, seed, distance),) = Arms(old, *trained({("+law", 1): other})).repeated()
    assert (name, seed) == ("+law", 1)
    assert distance == pytest.approx(abs(other.value - hits["+law", 1].value))
