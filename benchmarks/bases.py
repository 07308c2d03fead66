"""What DQE's parts add to each base query: `mean` (QuRe's) beside `two_pass` (SPRC's), with and without attribute weights and TRNS.

    python -m benchmarks.bases --out runs/bases             # the same again goes on; in a second shell, both share the trainings
    python -m benchmarks.bases --out runs/bases --report    # trains nothing: the tables of what is finished

From scratch, two_pass does not train in as few steps as are affordable here: a text's [CLS] means nothing in a new Q-Former. So all arms
begin with one checkpoint, as those that import a BLIP-2 do: a model whose image and text embeddings were trained apart (`zero_shot`) on
the same triplets. Each base then takes the learning rate with the best mAP@10 over val queries, of the same few, alone, with a seed that
the table does not use. All arms of a base train at it, for the same steps, and are evaluated on test queries.

bases.md has differences between arms, and differences of these: what a part adds to one base beyond what it adds to the other. All are
paired by seed and query, so what a seed draws (batches, new weights that both have) cancels as far as two trainings answer it alike. The
checkpoint that all begin with is the same for all seeds: how another would have come out is in no interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dqe_training.ablation.table import PER_CENT, interval

from .method import MEASURE, PRECISION, TUNING_SEEDS, Assignments, arm, grid, subject, token_cache
from .report import table

if TYPE_CHECKING:
    from dqe_training.ablation.comparison import Comparison
    from dqe_training.ablation.plan import Plan
    from dqe_training.ablation.running import Results
    from dqe_training.ablation.statistics import Difference

BATCH = ("optim.batch_size=32",)
FIRST = ("optim.epochs=2", "optim.learning_rate=1e-3", "model.base_query=zero_shot", "model.attribute_weights=false", "trns.enabled=false")
COMMON = ("optim.epochs=1", "vision_weights=", "trns.warmup_epochs=0")
"""Of the arms; negatives are mined at their start, since what they begin with is trained."""
RATES = grid(optim__learning_rate=(5e-4, 1e-3, 2e-3))
BASES = ("mean", "two_pass")
CONTROL = "+law:unlabelled"
"""As many pools and weights as +law has, without names: no loss reads a label. What +law has beyond it is the labels'."""
PARTS = ("", "+law", CONTROL, "+trns", "+law+trns")
FIGURES = {"recall_at_10": "R@10", "map_at_10": "mAP@10", "heldout_recall_at_10": "R@10, unseen combinations"}

Weights = Mapping[str, int]


def label(base: str, part: str) -> str:
    return base + part


def make_arm(out: Path, base: str, part: str, rate: Assignments, name: str) -> Any:
    begun = (f"start={out / 'start'}", f"model.base_query={base}")
    return arm(name, part or "baseline", (*BATCH, *COMMON, *begun, *rate))


def make_start(out: Path, data: Path) -> None:
    """The checkpoint that all arms begin with, in `out`/start."""
    from dqe_engine.files import directory_lock
    from dqe_training.run.configuration import load_config
    from dqe_training.run.trainer import finish_run
    from dqe_training.run.workflow import train_run

    lock = out / "start-lock"
    lock.mkdir(parents=True, exist_ok=True)
    with directory_lock(lock):
        if not (out / "start").exists():
            config = load_config("garments", (*PRECISION, *BATCH, *FIRST))
            train_run(config, subject(data, "val").source, out / "start-run", features=token_cache(out))
            finish_run(out / "start-run", out / "start")


def contrasts() -> dict[str, Weights]:
    """Label -> how often each arm counts."""
    found: dict[str, Weights] = {"two_pass, from mean": {"two_pass": 1, "mean": -1}}
    for part in PARTS[1:]:
        gains = {base: {label(base, part): 1, label(base, ""): -1} for base in BASES}
        found |= {f"{part} on {base}, from {base}": gain for base, gain in gains.items()}
        found[f"{part}: what two_pass gains beyond mean"] = gains["two_pass"] | {name: -n for name, n in gains["mean"].items()}
    labels = {base: {label(base, "+law"): 1, label(base, CONTROL): -1} for base in BASES}
    found |= {f"the labels on {base}: +law, from {CONTROL}": gain for base, gain in labels.items()}
    found["the labels: what two_pass gains beyond mean"] = labels["two_pass"] | {name: -n for name, n in labels["mean"].items()}
    for part in ("+law", CONTROL, "+law+trns"):
        found[f"two_pass{part}, from mean{part}"] = {label("two_pass", part): 1, label("mean", part): -1}
    return found


class Sum:
    """A sum of figures of the same queries, in the place of a figure."""

    def __init__(self, terms: Sequence[tuple[int, Any]]) -> None:
        self.value: float = sum(n * figure.value for n, figure in terms)
        self.influence = np.sum([n * figure.influence for n, figure in terms], axis=0)


def contrast(plan: Plan, results: Results, weights: Weights, figure: str) -> Difference | None:
    """The interval of `Σ weight · arm`, by seed and query as `compare` makes it, over the seeds that all its arms have finished."""
    from dqe_training.ablation.statistics import compare

    by_seed: dict[int, dict[str, Any]] = {}
    for cell in plan.cells:
        if cell.arm in weights and cell.key in results:
            by_seed.setdefault(cell.seed, {})[cell.arm] = results[cell.key].scores[figure].figure
    whole = [found for found in by_seed.values() if len(found) == len(weights)]
    ours = [Sum([(n, found[name]) for name, n in weights.items() if n > 0]) for found in whole]
    other = [Sum([(-n, found[name]) for name, n in weights.items() if n < 0]) for found in whole]
    return compare(ours, other)


def report(comparison: Comparison, plan: Plan, results: Results, rates: Mapping[str, str]) -> str:
    lines = [f"{comparison.data}; {len(plan.cells) - comparison.unfinished} of {len(plan.cells)} trainings", ""]
    lines += ["Rates chosen on val queries: " + ", ".join(f"{base} {rate}" for base, rate in rates.items()), ""]
    rows = [
        [row.label, str(len(row.seeds)),
         *(f"{100 * row.figures[f].mean:.1f} ± {100 * (row.figures[f].deviation or 0):.1f}" for f in FIGURES),
         f"{row.steps.mean:.0f}", f"{row.seconds.mean:.0f}"]
        for row in comparison.arms
    ]  # fmt: skip
    lines += [table(["arm", "seeds", *FIGURES.values(), "steps", "seconds"], rows), ""]
    rows = []
    for name, weights in contrasts().items():
        found = [contrast(plan, results, weights, figure) for figure in FIGURES]
        rows.append([name, str(found[0].seeds if found[0] else 0), *(interval(difference, PER_CENT) for difference in found)])
    lines.append(table(["difference", "seeds of all its arms", *FIGURES.values()], rows))
    return "\n".join(lines) + "\n"


def train(plan: Plan, asked: Any, out: Path, where: Path, *, only_report: bool = False) -> Results:
    """All results of the plan; with `only_report` those that are there."""
    from dqe_training.ablation.comparison import compare_cells
    from dqe_training.ablation.report import write_report
    from dqe_training.ablation.results import finished
    from dqe_training.ablation.running import run_plan

    if only_report:
        return finished(where, plan.cells)

    @contextmanager
    def watch(label: str) -> Iterator[Any]:
        print(f"{where.name}: {label}", flush=True)
        yield lambda event: None

    results = run_plan(plan, asked, where, features=token_cache(out), watch=watch)
    write_report(where, compare_cells(plan, results, data=asked.name))
    return results


def choose_rates(out: Path, data: Path) -> dict[str, Assignments]:
    """Base -> its rate. All arms of a base train at it."""
    from dqe_training.ablation.comparison import compare_cells
    from dqe_training.ablation.plan import plan_of

    asked = subject(data, "val")
    arms = {(base, rate): make_arm(out, base, "", rate, f"{base} {rate[0]}") for base in BASES for rate in RATES}
    plan = plan_of(tuple(arms.values()), TUNING_SEEDS[:1], budget="steps", identity=asked.identity)
    comparison = compare_cells(plan, train(plan, asked, out, out / "rates"), data=asked.name)
    found = {row.label: row.figures[MEASURE].mean for row in comparison.arms}
    return {base: max(RATES, key=lambda rate: found[arms[base, rate].label]) for base in BASES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="dataset, trainings and tables")
    parser.add_argument("--seeds", type=int, default=5, help="of the table (default: 5)")
    parser.add_argument("--report", action="store_true", help="train nothing: tables of the arms that are finished")
    options = parser.parse_args()
    from dqe_training.ablation.comparison import compare_cells
    from dqe_training.ablation.plan import plan_of
    from dqe_training.data.garments.dataset import GarmentsSpec, write_garments

    spec = GarmentsSpec(train_images=2000, train_triplets=4000, gallery_images=2000)
    data = write_garments(options.out / "garments", spec)
    make_start(options.out, data)
    rates = choose_rates(options.out, data)
    asked = subject(data, "test")
    arms = [make_arm(options.out, base, part, rates[base], label(base, part)) for part in PARTS for base in BASES]
    plan = plan_of(arms, tuple(range(options.seeds)), budget="steps", identity=asked.identity)
    results = train(plan, asked, options.out, options.out / "final", only_report=options.report)
    comparison = compare_cells(plan, results, data=asked.name)
    text = report(comparison, plan, results, {base: rate[0].partition("=")[2] for base, rate in rates.items()})
    (options.out / "bases.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
