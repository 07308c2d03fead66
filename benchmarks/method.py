"""The ablation that docs/method.md reports: every part tuned with the same budget on val, then five seeds of every arm on test queries.

    python -m benchmarks.method --out runs/method --sprite fashion-mnist-sprite.png      # tuned.json, then a folder with a table per regime

Tuning, on garments with batches of 64: each part has four points, two seeds each (not those of the tables), and takes the point with the
best mAP@10 over val queries; the learning rate has as many, is chosen first, for the baseline with the pool, and is the same for all arms.
The other regimes take the same points. Every stage goes on where it was interrupted. `--workers` trains that many models at a time,
`--on-gpu` of them on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dqe_engine.contracts.versioned import read_document
from dqe_engine.errors import InputError
from dqe_engine.processors import available_cpus

TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
MEASURE = "map_at_10"
Assignments = tuple[str, ...]


def grid(**axes: Sequence[float]) -> list[Assignments]:
    """All points of a grid; two underscores stand for a dot."""
    keys = [key.replace("__", ".") for key in axes]
    return [tuple(f"{k}={v}" for k, v in zip(keys, point, strict=True)) for point in itertools.product(*axes.values())]


def zones(bounds: str, lo: Sequence[float], hi: Sequence[float]) -> list[Assignments]:
    return [(f"trns.zones.bounds={bounds}", *point) for point in grid(trns__zones__lo=lo, trns__zones__hi=hi)]


PRECISION = ("optim.vision_precision=float32",)  # the same tokens whatever a worker runs on
WEIGHTS = grid(loss__rank_weight=(0.1, 0.3, 1.0, 2.0))
RATES = grid(optim__learning_rate=(5e-4, 1e-3, 2e-3, 3e-3))
GRIDS: dict[str, tuple[str, list[Assignments]]] = {
    "kl": ("+pool+kl", grid(loss__relevance_share=(0.1, 0.3), loss__relevance_temperature=(0.05, 0.2))),
    "law": ("+pool+law", grid(loss__attribute_weight=(0.1, 0.5), loss__presence_weight=(0.1, 0.5))),
    "trns:pooled": ("+pool+trns", zones("pooled", (0.0, 0.002), (0.02, 0.1))),
    "trns:absolute": ("+pool+trns", zones("absolute", (0.0, 0.1), (0.2, 0.4))),
    "trns:rank": ("+pool+trns", zones("rank", (0.0, 0.002), (0.01, 0.05))),
    "trns:random": ("+pool+trns:random", WEIGHTS),
    "trns:filtered": ("+pool+trns:filtered", WEIGHTS),
    "trns:two-drops": ("+pool+trns:two-drops", WEIGHTS),
}
"""Part -> the variant that it is tuned in, and its points."""
FIXED: dict[str, Assignments] = {"weight of the zones": ("loss.rank_weight=0.5",)}
"""Points that nothing chooses: the `rank_weight` at which zones were tuned, and random and filtered negatives are compared as well."""


@dataclass(frozen=True)
class Regime:
    """One table: a dataset, what every training there has, and the arms: label -> (variant, parts whose tuned points it takes).

    `tuned_on`: the regime whose val queries the points were chosen by.
    """

    data: str
    common: Assignments
    arms: dict[str, tuple[str, tuple[str, ...]]]
    tuned_on: str = "garments"


NEGATIVES = {f"+pool+{part}": (GRIDS[part][0], (part,)) for part in GRIDS if part.startswith("trns")}
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "+pool": ("+pool", ()),
    "baseline": ("baseline", ()),
    "+pool+kl": ("+pool+kl", ("kl",)),
    "+pool+kl:uniform": ("+pool+kl:uniform", ("kl",)),
    "+law": ("+law", ("law",)),
    "+law:image": ("+law:image", ("law",)),
    "+law:unlabelled": ("+law:unlabelled", ()),
    "+law:constant": ("+law:constant", ()),
    **NEGATIVES,
    "+pool+trns:random, weight 0.5": ("+pool+trns:random", ("weight of the zones",)),
    "+pool+trns:filtered, weight 0.5": ("+pool+trns:filtered", ("weight of the zones",)),
    "full": ("full", ("kl", "law", "trns:pooled")),
}


def arms(*labels: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {label: ARMS[label] for label in labels}


SMALL = arms("+pool", "+pool+trns:pooled", "+pool+trns:rank", "+pool+trns:random")
PHOTOS = arms("+pool", "baseline", "+pool+kl", "+law", "+law:unlabelled", "+pool+trns:pooled")
LONG = arms("+pool", "+pool+kl", "+law", "+law:unlabelled", "+pool+trns:pooled", "full")
REGIMES = {
    "garments": Regime("garments", ("optim.epochs=2", "optim.batch_size=64"), ARMS),
    "garments-16": Regime("garments", ("optim.epochs=2", "optim.batch_size=16"), SMALL),
    "garments-long": Regime("garments", ("optim.epochs=8", "optim.batch_size=64"), LONG),
    "tinted": Regime("tinted", ("optim.epochs=8", "optim.batch_size=64"), PHOTOS),
}


def make_data(out: Path, sprite: Path | None) -> dict[str, Path]:
    """The datasets, drawn where they are missing."""
    from dqe_training.data.garments.dataset import GarmentsSpec, write_garments
    from dqe_training.data.tinted import TintedSpec, write_tinted

    made = {"garments": write_garments(out / "garments", GarmentsSpec(train_images=4000, train_triplets=8000, gallery_images=3000))}
    if sprite is not None:
        made["tinted"] = out / "tinted"
        if not made["tinted"].exists():
            write_tinted(made["tinted"], sprite, TintedSpec(val_queries=1000, gallery_products=30))
    return made


def fill_features(out: Path, regimes: Sequence[str]) -> None:
    """The frozen tower's image tokens, by all processors at once: workers would wait for one of them to make them."""
    from dqe_training.features import image_token_blocks
    from dqe_training.run.configuration import load_config
    from dqe_training.run.workflow import build_model

    model = build_model(load_config("garments", PRECISION), subject(out / "garments", "val").source.read_vocabulary(), 8).eval()
    for data in sorted({REGIMES[name].data for name in regimes}):
        asked = subject(out / data, "val")
        for names in (asked.source.read(asked.source.read_vocabulary()).images, asked.evaluation.gallery):
            for _ in image_token_blocks(model, asked.source.images, names, features=token_cache(out)):
                pass


def token_cache(out: Path) -> Path:
    """One for every version of the code: other code makes other tokens."""
    from dqe_training.ablation.source_hash import source_hash

    return out / "features" / source_hash()[:12]


@cache
def subject(data: Path, split: str) -> Any:
    from dqe_training.ablation.subjects import FolderSubject

    return FolderSubject.open(data, split=split)


def tuning_arms(name: str, regime: Regime, rate: Assignments | None) -> list[Any]:
    """The rates first; all other points when the rate is known."""
    if rate is None:
        return [arm(f"+pool {point[0]}", "+pool", (*regime.common, *point)) for point in RATES]
    parts = {part: GRIDS[part] for part in GRIDS if part in {p for _, needed in regime.arms.values() for p in needed}}
    return [
        arm(f"{part} {' '.join(point)}", variant, (*regime.common, *rate, *point))
        for part, (variant, points) in parts.items()
        for point in points
    ]


def final_arms(regime: Regime, tuned: dict[str, Assignments]) -> list[Any]:
    return [
        arm(label, variant, (*regime.common, *tuned["rate"], *itertools.chain(*(tuned[part] for part in parts))))
        for label, (variant, parts) in regime.arms.items()
    ]


def arm(label: str, variant: str, assignments: Assignments) -> Any:
    from dqe_training.ablation.plan import Arm
    from dqe_training.ablation.variants import apply_variant, parse_variant
    from dqe_training.run.configuration import load_config

    return Arm(label, apply_variant(load_config("garments", (*PRECISION, *assignments)), parse_variant(variant), name=variant))


def choose(out: Path, regime: str, stage: str) -> dict[str, Assignments]:
    """Part -> the point with the best mean `MEASURE`."""
    from dqe_training.ablation.comparison import Comparison

    where = out / f"{stage}-{regime}" / "results.json"
    found = read_document(Comparison, where, remedy=f"run the stage {stage} again", error=InputError)
    best: dict[str, tuple[float, Assignments]] = {}
    for row in found.arms:
        part, _, point = row.label.partition(" ")
        best[part] = max(best.get(part, (-1.0, ())), (row.figures[MEASURE].mean, tuple(point.split())))
    return {("rate" if part == "+pool" else part): point for part, (_, point) in best.items()}


STAGES = ("rate", "tune", "final")


def jobs(out: Path, stage: str, regimes: Sequence[str], seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Output folder, plan and subject of each of a stage's regimes; of the last stage's arms `only` these, unless empty."""
    from dqe_training.ablation.plan import plan_of

    for name in regimes if stage == "final" else sorted({REGIMES[name].tuned_on for name in regimes}):
        regime = REGIMES[name]
        asked = subject(out / regime.data, "test" if stage == "final" else "val")
        if stage == "final":
            arms = [each for each in final_arms(regime, read_tuned(out, regime.tuned_on)) if not only or each.label in only]
        else:
            arms = tuning_arms(name, regime, None if stage == "rate" else choose(out, name, "rate")["rate"])
        chosen = seeds if stage == "final" else TUNING_SEEDS
        yield out / f"{stage}-{name}", plan_of(arms, chosen, budget="steps", identity=asked.identity), asked


def read_tuned(out: Path, regime: str) -> dict[str, Assignments]:
    return choose(out, regime, "rate") | choose(out, regime, "tune") | FIXED


def work(
    out: Path, stage: str, regimes: Sequence[str], seeds: Sequence[int], rotation: int, *, alone: bool, only: Sequence[str] = ()
) -> None:
    """One worker: the cells that nobody else has."""
    import torch

    from dqe_training.ablation.comparison import compare_cells
    from dqe_training.ablation.report import write_report
    from dqe_training.ablation.running import run_plan

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    todo = list(jobs(out, stage, regimes, seeds, only))
    first = rotation % max(len(todo), 1)
    for folder, plan, asked in todo[first:] + todo[:first]:

        @contextmanager
        def watch(label: str, where: str = folder.name) -> Iterator[Any]:
            print(f"{where}: {label}", flush=True)
            yield lambda event: None

        results = run_plan(plan, asked, folder, features=token_cache(out), watch=watch, wait=alone)
        if len(results) == len(plan.cells):
            write_report(folder, compare_cells(plan, results, data=asked.name))


def run_stage(options: argparse.Namespace, stage: str) -> None:
    """Workers in processes of their own, then the report of what they finished."""
    command = [sys.executable, "-m", "benchmarks.method", "--out", str(options.out), "--stage", stage, "--regimes", *options.regimes]
    command += ["--seeds", *map(str, options.seeds), "--arms", *options.arms]
    threads = max(1, available_cpus() // options.workers)
    running = []
    for worker in range(options.workers if options.workers > 1 else 0):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if worker >= options.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        running.append(subprocess.Popen([*command, "--rotation", str(worker)], env=environment))
    for process in running:
        process.wait()
    work(options.out, stage, options.regimes, options.seeds, 0, alone=True, only=options.arms)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="datasets, cells and tables; the same again goes on")
    parser.add_argument("--sprite", type=Path, help="Fashion-MNIST's fashion-mnist-sprite.png, for the regime tinted")
    parser.add_argument("--regimes", nargs="+", choices=tuple(REGIMES), default=list(REGIMES), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the tables (default: 0 to 4)")
    parser.add_argument("--arms", nargs="*", default=[], help="of the tables, for example +pool +law:constant (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--on-gpu", type=int, default=0, help="how many of the workers see the GPU")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--rotation", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rotation is not None:
        work(options.out, options.stage, options.regimes, options.seeds, options.rotation, alone=False, only=options.arms)
        return 0
    make_data(options.out, options.sprite)
    fill_features(options.out, options.regimes)
    for stage in (options.stage,) if options.stage else STAGES:
        run_stage(options, stage)
    tuned = {name: read_tuned(options.out, name) for name in {REGIMES[name].tuned_on for name in options.regimes}}
    (options.out / "tuned.json").write_text(json.dumps(tuned, indent=1))
    for name in options.regimes:
        print((options.out / f"final-{name}" / "table.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
