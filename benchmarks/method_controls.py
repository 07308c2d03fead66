"""Adds arms that were trained later to a finished table of `benchmarks.method`, whose own trainings are not repeated.

    python -m benchmarks.method --out runs/method --regimes garments --stage final --arms +law:constant …     # with rate- and tune-garments
    python -m benchmarks.method_controls --out runs/method --table benchmarks/results/<machine>/method-garments    # its three files anew

A committed table has every training's figures, but not its answers query by query. So the share of the seeds in a difference between
an old arm and a new one is exact (they are paired), and that of the queries comes from the seeds of which both have answers in `--out`,
or else from the committed interval of a similar arm (`LIKE`). Old arms and their differences stay to the digit. Trainings in `--out` of
old arms check that the code of today still gives the committed figures. It does for arms without the nameless pool. That pool's first
weights are drawn in another order since, so new arms with it (`+pool…`) are compared, by seed and query, with old arms trained again, which
join the table under a name of their own, and not at all without these.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from dqe_engine.contracts.versioned import read_document
from dqe_engine.errors import InputError
from dqe_training.ablation.comparison import FIGURES, Comparison, compare_cells, settings
from dqe_training.ablation.plan import Plan, plan_of
from dqe_training.ablation.results import CellResult, finished
from dqe_training.ablation.statistics import Difference, student_t
from dqe_training.ablation.table import PER_CENT, interval
from dqe_training.evaluation.metrics import PerQuery

from .method import REGIMES, SEEDS, final_arms, read_tuned, subject
from .report import table

ADDED = ("+law:constant", "+pool+kl:uniform", "+pool+trns:random, weight 0.5", "+pool+trns:filtered, weight 0.5")
AGAIN = ", drawn as today"
LIKE = {"+law:constant": "+law:unlabelled", f"+pool{AGAIN}": "baseline"}
"""New arm -> the old one whose interval over queries stands in for its own."""
PAIRS = (
    ("+law:unlabelled", "+law:constant"),
    ("+law", "+law:constant"),
    ("full", "+law:constant"),
    (f"+pool{AGAIN}", "baseline"),
    ("+law:constant", f"+pool{AGAIN}"),
    ("+law:unlabelled", f"+pool{AGAIN}"),
    ("+law", f"+pool{AGAIN}"),
    ("full", f"+pool{AGAIN}"),
    (f"+pool+kl{AGAIN}", f"+pool{AGAIN}"),
    ("+pool+kl:uniform", f"+pool{AGAIN}"),
    ("+pool+trns:random, weight 0.5", f"+pool{AGAIN}"),
    (f"+pool+trns:pooled{AGAIN}", f"+pool{AGAIN}"),
    (f"+pool+kl{AGAIN}", "+pool+kl:uniform"),
    (f"+pool+trns:pooled{AGAIN}", "+pool+trns:random, weight 0.5"),
    ("+pool+trns:filtered, weight 0.5", "+pool+trns:random, weight 0.5"),
)
SHOWN = ("recall_at_10", "map_at_10")

Values = Mapping[int, float]
Answers = Mapping[int, PerQuery]


def difference(ours: Values, other: Values, our_answers: Answers, other_answers: Answers, stand_in: float | None) -> Difference | None:
    """`ours` less `other` over the seeds of both, from values by seed. The queries' share: of the seeds of which both have answers, else
    `stand_in`; None without either, or with no seed of both."""
    seeds = sorted(set(ours) & set(other))
    both = sorted(set(our_answers) & set(other_answers) & set(seeds))
    if not seeds or (not both and stand_in is None):
        return None
    values = [ours[seed] - other[seed] for seed in seeds]
    value, half_queries = float(np.mean(values)), stand_in or 0.0
    if both:
        by_query = np.mean([our_answers[seed].influence - other_answers[seed].influence for seed in both], axis=0)  # (Q,)
        half_queries = 1.959964 * float(by_query.std(ddof=1)) / math.sqrt(len(by_query))
    half_seeds = half = None
    verdict = "one seed"
    if len(values) > 1:
        half_seeds = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = math.hypot(half_seeds, half_queries)
        verdict = "higher" if value > half else "lower" if -value > half else "unclear"
    return Difference(
        value=value, half=half, half_seeds=half_seeds, half_queries=half_queries, seeds=len(values), values=tuple(values),
        verdict=verdict,  # type: ignore[arg-type]
    )  # fmt: skip


def label_of(arm: str) -> str:
    """What the table calls an arm that was trained now."""
    return arm + AGAIN if arm.startswith("+pool") and arm not in ADDED else arm


class Arms:
    """The arms of a committed table and of new trainings, by label: figures by seed, and the answers that are there."""

    def __init__(self, committed: Comparison, plan: Plan, results: Mapping[str, CellResult]) -> None:
        trained = {label_of(cell.arm) for cell in plan.cells if cell.key in results}
        self.new = {label for label in trained if label in ADDED or label.endswith(AGAIN)}
        self.old = {arm.label: arm for arm in committed.arms if arm.label not in self.new}
        self.cells = {key: cell for key, cell in committed.cells.items() if cell.arm in self.old}
        self.against = committed.against
        self.values: dict[tuple[str, str], dict[int, float]] = {}
        self.answers: dict[tuple[str, str], dict[int, PerQuery]] = {}
        for cell in plan.cells:
            label = label_of(cell.arm)
            for name, ratio in results[cell.key].scores.items() if cell.key in results else ():
                if math.isnan(value := ratio.figure.value):
                    continue
                self.answers.setdefault((label, name), {})[cell.seed] = ratio.figure
                if label in self.new:
                    self.values.setdefault((label, name), {})[cell.seed] = value
        for figures in self.cells.values():
            for name, known in figures.figures.items():
                if known is not None:
                    self.values.setdefault((figures.arm, name), {})[figures.seed] = known

    def compare(self, ours: str, other: str, name: str) -> Difference | None:
        values = [self.values.get((label, name), {}) for label in (ours, other)]
        answers = [self.answers.get((label, name), {}) for label in (ours, other)]
        like = next((self.old[LIKE[label]] for label in (ours, other) if LIKE.get(label) in self.old), None)
        known = None if like is None else like.differences.get(name)
        return difference(values[0], values[1], answers[0], answers[1], None if known is None else known.half_queries)

    def from_first(self, label: str, name: str) -> Difference | None:
        """A new arm's difference from the first arm: as it is drawn today, for one that has its pool."""
        if label == self.against + AGAIN:
            return None
        return self.compare(label, self.against + AGAIN if label.startswith("+pool") else self.against, name)

    def repeated(self) -> list[tuple[str, int, float]]:
        """Trainings of the committed arms that were made again: arm, seed, the largest distance from a committed figure."""
        found = []
        for cell in self.cells.values():
            both = [
                abs(again[cell.seed].value - value)
                for name, value in cell.figures.items()
                if value is not None and cell.seed in (again := self.answers.get((cell.arm, name), {}))
            ]
            if both:
                found.append((cell.arm, cell.seed, max(both)))
        return found


def merge(committed: Comparison, made: Comparison, arms: Arms, sets: Mapping[str, tuple[str, ...]]) -> Comparison:
    """`committed` with the new arms of `made`, in the order of `sets`, which says what each arm sets."""
    every = dict(arms.old)
    for arm in made.arms:
        if (label := label_of(arm.label)) in arms.new:
            found = {name: arms.from_first(label, name) for name in arm.figures}
            differences = {name: each for name, each in found.items() if each is not None}
            every[label] = msgspec.structs.replace(arm, label=label, differences=differences)
    order = [(label, sets[arm]) for arm in sets for label in dict.fromkeys((arm, label_of(arm))) if label in every]
    cells = {key: msgspec.structs.replace(cell, arm=label_of(cell.arm)) for key, cell in made.cells.items()}
    return msgspec.structs.replace(
        committed,
        machines=tuple(sorted({*committed.machines, *made.machines})),
        arms=tuple(msgspec.structs.replace(every[label], settings=told) for label, told in order),
        cells=arms.cells | {key: cell for key, cell in cells.items() if cell.arm in arms.new},
    )


def pairs_table(arms: Arms) -> str:
    rows = []
    for ours, other in PAIRS:
        found = [arms.compare(ours, other, name) for name in SHOWN]
        if found[0] is not None:
            rows.append([f"{ours}, from {other}", str(found[0].seeds), *(interval(each, PER_CENT) for each in found)])
    return table(["other pairs", "seeds", *(FIGURES[name] for name in SHOWN)], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="of benchmarks.method, with its new trainings")
    parser.add_argument("--table", type=Path, required=True, help="the committed table, without its ending; written anew")
    options = parser.parse_args()
    from dqe_engine.contracts.parsing import to_json
    from dqe_training.ablation.plot import plot
    from dqe_training.ablation.table import table as page

    regime = REGIMES["garments"]
    where = {ending: options.table.with_name(f"{options.table.name}.{ending}") for ending in ("json", "md", "png")}
    committed = read_document(Comparison, where["json"], remedy="take it from the repository", error=InputError)
    asked = subject(options.out / regime.data, "test")
    planned = final_arms(regime, read_tuned(options.out, regime.tuned_on))
    plan = plan_of(planned, SEEDS, budget="steps", identity=asked.identity)
    results = finished(options.out / "final-garments", plan.cells)
    first = planned[0].config
    arms = Arms(committed, plan, results)
    merged = merge(
        committed, compare_cells(plan, results, data=asked.name), arms, {arm.label: settings(arm.config, first) for arm in planned}
    )
    again = "; ".join(f"{arm}, seed {seed}: within {distance:.1e}" for arm, seed, distance in arms.repeated())
    text = f"{page(merged)}\nArms that were added later; benchmarks/method_controls.py says what their intervals are. "
    text += f"Differences of those with the pool are from {planned[0].label}{AGAIN}, above, too.\n\n"
    text += (
        f"{pairs_table(arms)}\n\nTrained again with the code of the added arms, distance from the committed figures: {again or 'none'}.\n"
    )
    where["json"].write_bytes(to_json(merged))
    where["md"].write_text(text)
    plot(merged, where["png"])
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
