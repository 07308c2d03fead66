"""dqe-ablate: variants x seeds, trained alike and compared in pairs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.errors import InputError

from .runner import run_torch
from .sources import TRAINING_DATASET_HELP, open_source, read_config

if TYPE_CHECKING:
    from ..ablation.running import Results
    from ..ablation.subjects import Subject
    from ..encoding import Listener

_EPILOG = """\
variants: baseline (InfoNCE on the mean of the query outputs), full (+kl+law+trns), combinations: +pool+kl, full-trns+trns:random. Parts:
  pool, cls, twopass  another base query: one nameless attention pool more, the text's [CLS], that of a second pass (SPRC)
  kl    the KL relevance loss; kl:uniform spreads its share evenly (label smoothing)
  law   attribute weights; law:unlabelled reads no label, law:constant not the text either, law:text and law:image say what the weights see
  trns  mined negatives, from the configuration's zones; trns:pooled, :absolute, :rank, :random, :filtered, :two-drops from others
  pairwise  no in-batch loss: the target over its mined negative alone (QuRe: +pairwise+trns:two-drops)
  sprc  SPRC's two auxiliary losses; sprc:prompt and sprc:align one of them
  gist  in-batch negatives near the target's score left out (GISTEmbed); gist:absolute, gist:relative say which margin
The first variant is what the others are compared with. Start the same command in more shells to share the work: each takes other cells.

examples:
  dqe-ablate --data data/garments --out runs/ablation --seeds 5
  dqe-ablate --data data/garments --out runs/ablation-60s --budget seconds optim.seconds=60
  dqe-ablate --data data/garments --out runs/zones --variants baseline,+trns --sweep trns.zones.lo=0,0.002 --sweep trns.zones.hi=0.02,1
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-ablate",
        description="Train variants x seeds, evaluate them and write a table. Run the same command again to go on after an interruption.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the configuration")
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="dataset folder: of dqe-data garments, FashionIQ or CIRR")
    parser.add_argument("--dataset", default="auto", metavar="NAME", help=TRAINING_DATASET_HELP)
    parser.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="queries to compare on: val to choose settings by, test to report (default: val)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="public data: folder of its images")
    parser.add_argument("--allow-missing", action="store_true", help="public data: go on without the triplets whose images are missing")
    parser.add_argument("--config", metavar="PRESET|FILE", help="preset or YAML file (default: as dqe-train)")
    parser.add_argument(
        "--variants",
        default="baseline,+kl,+law,+trns,full",
        metavar="NAME,...",
        help="what to compare, +PART adds one to the baseline (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(0, 1, 2), metavar="N|A,B,...", help="number of seeds, or the seeds themselves (default: 3)"
    )
    parser.add_argument(
        "--budget",
        choices=("steps", "seconds"),
        default="steps",
        help="give every training the same steps (optim.epochs) or the same time (optim.seconds) (default: steps)",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="section.key=v,...",
        help="train every variant with each of these values; twice for a grid of two keys",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder for results.json, table.md, plot.png, cells/")
    parser.add_argument(
        "--features",
        type=Path,
        metavar="CACHE",
        help="feature cache of the frozen tower (default: one in OUT for this version of the code)",
    )
    parser.add_argument("--keep-models", action="store_true", help="keep every trained model in OUT/models")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    """argparse type: a count, or seeds with commas between them."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts if part) or not any(parts):
        raise argparse.ArgumentTypeError(f"expected how many seeds, or seeds such as 0,1,5; got {text!r}")
    seeds = tuple(int(part) for part in parts if part)
    if len(parts) == 1:
        seeds = tuple(range(seeds[0]))
    if not seeds:
        raise argparse.ArgumentTypeError("0 seeds: at least one is needed")
    return seeds


def _open_subject(args: argparse.Namespace) -> Subject:
    from ..ablation.subjects import BenchmarkSubject, FolderSubject
    from ..data.public.detect import open_benchmark

    benchmark = open_benchmark(args.data, args.dataset)
    if benchmark is not None:
        if args.split != "val":
            raise InputError(f"--split {args.split}: the test answers of {benchmark.name} are not public; its variants are compared on val")
        return BenchmarkSubject.open(benchmark, open_source(args), args.images, allow_missing=args.allow_missing)
    open_source(args)  # refuses the options of public datasets
    return FolderSubject.open(args.data, args.split)


def _ablate(args: argparse.Namespace) -> int:
    from ..ablation.variants import parse_sweep, parse_variant

    config, points = read_config(args), parse_sweep(args.sweep)
    variants = args.variants.split(",")
    for name in variants:
        parse_variant(name)
    from ..ablation.comparison import compare_cells  # imports torch: a mistake above is told before that
    from ..ablation.plan import make_plan
    from ..ablation.report import write_report
    from ..ablation.results import others_code
    from ..ablation.running import run_plan
    from ..ablation.source_hash import source_hash
    from .progress import TrainingProgress

    subject = _open_subject(args)
    plan = make_plan(config, variants, args.seeds, budget=args.budget, identity=subject.identity, points=points)

    @contextmanager
    def watch(label: str) -> Iterator[Listener]:
        with TrainingProgress(label) as listener:
            yield listener

    def report(results: Results) -> None:
        write_report(args.out, compare_cells(plan, results, data=subject.name))

    if others := others_code(args.out, plan.cells):
        print(f"{others} finished cells in {args.out / 'cells'} are of other code and not used", file=sys.stderr)
    run_plan(
        plan,
        subject,
        args.out,
        features=args.features or args.out / "features" / source_hash()[:12],
        watch=watch,
        after=report,
        keep_models=args.keep_models,
    )
    print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _ablate(build_parser().parse_intermixed_args(argv)))  # options between overrides, too
