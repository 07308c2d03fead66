"""Training throughput against an earlier commit: whole trainings of the demo's model by dqe-train, in turns, with the same seeds.

python -m benchmarks.train_versions --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks import machine, pinned, report
from dqe_training.data.garments.dataset import GarmentsSpec, write_garments

_ROOT = Path(__file__).parent
_PACKAGES = ("torch", "transformers", "numpy")
_THREADING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
FIRST = "101f850"
"""The first version: training, export and demo, before kernels and caches were worked on."""
SPEC = GarmentsSpec(train_images=4000, train_triplets=8000, gallery_images=3000)


@dataclass(frozen=True, slots=True)
class Training:
    """One training. `steps_s` is the trainer's own clock: steps and refreshes, without start, image encoding and writing."""

    version: str
    seed: int
    triplets: int
    steps_s: float
    wall_s: float
    recall_at_10: float

    @property
    def rate(self) -> float:
        return self.triplets / self.steps_s


def train(version: str, commands: Path, data: Path, out: Path, seed: int) -> Training:
    """Train and evaluate with the command lines of `commands`, which decide themselves how OpenMP's threads wait."""
    environment = {name: value for name, value in os.environ.items() if name not in _THREADING}
    run, started = out / f"{version}-{seed}", time.perf_counter()
    arguments = ["--config", "garments", "--data", str(data), "--out", str(run), f"optim.seed={seed}", "optim.log_every=1"]
    subprocess.run([str(commands / "dqe-train"), *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    evaluation = [str(commands / "dqe-eval"), str(run / "model"), "--data", str(data), "--json"]
    done = subprocess.run(evaluation, check=True, env=environment, capture_output=True, text=True)
    meta = json.loads((run / "model" / "checkpoint.json").read_text())
    triplets = last["step"] * meta["config"]["optim"]["batch_size"]
    return Training(version, seed, triplets, last["seconds"], wall, json.loads(done.stdout)["recall_at_10"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train_versions", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", default=FIRST, metavar="COMMIT", help="earlier commit (default: %(default)s, the first version)")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each version, seeds 0, 1, ... (default: 5)")
    parser.add_argument("--work", type=Path, default=_ROOT.parent / "build" / "train-versions", help="folder for data and runs")
    parser.add_argument("--out", type=Path, default=_ROOT / "results" / machine.slug(), help="folder for results")
    options = parser.parse_args(arguments)
    earlier = pinned.install(options.against, options.work)
    data = options.work / "garments"
    if not data.exists():
        write_garments(data, SPEC)
    versions = {options.against: earlier, "now": pinned.present()}
    before, started = machine.load_average(), datetime.now(UTC)
    runs = options.work / f"runs-{started:%Y%m%d-%H%M%S}"
    path = options.out / "train.json"
    done: list[Training] = []
    for seed, version, commands in pinned.turns(versions, options.rounds):
        done.append(train(version, commands, data, runs, seed))
        print(done[-1], file=sys.stderr)
        if len(done) % len(versions):
            continue
        record = report.load(path, "train")  # after every round: an interruption loses no other
        record["sections"][f"against {options.against}"] = {
            "started": started.isoformat(timespec="seconds"), "load_before": before, "load_after": machine.load_average(),
            "machine": machine.describe(_PACKAGES), "trainings": [asdict(t) for t in done],
        }  # fmt: skip
        report.save_json(path, record)
    pairs = {version: [t for t in done if t.version == version] for version in versions}
    old, new = pairs.values()
    ratios = [b.rate / a.rate for a, b in zip(old, new, strict=True)]
    recall = [100 * (b.recall_at_10 - a.recall_at_10) for a, b in zip(old, new, strict=True)]
    rows = [
        [v, f"{np.median([t.rate for t in ts]):,.0f}", f"{np.median([t.steps_s for t in ts]):.1f}",
         f"{np.median([t.wall_s for t in ts]):.1f}", f"{100 * np.mean([t.recall_at_10 for t in ts]):.1f}"] for v, ts in pairs.items()
    ]  # fmt: skip
    print(report.table(["version", "triplets/s", "steps and refreshes, s", "whole command, s", "R@10"], rows))
    print(f"throughput {np.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"R@10 {np.mean(recall):+.2f} points ({min(recall):+.1f} to {max(recall):+.1f}) with the same seeds")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
