"""`dqe-mine`: mid-zone negatives for every query over a whole gallery, to a folder; interrupted or killed, it goes on."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .long_work import mining_bars
from .main import EXIT_INTERRUPTED, positive, run

if TYPE_CHECKING:
    from dqe_engine.contracts.zones import ZoneSpec
    from dqe_engine.zones.mining_files import MiningFiles

_EPILOG = """\
From a checkpoint, with its training set:
  dqe-data encode runs/garments/model --data data/garments --out mining-inputs
  dqe-mine mining-inputs --out mined

INPUTS holds what the options name otherwise: queries.npy (T, D) float32; gallery.npy, or gallery/*.npy in natural order
(2 before 10), (N, D) or (N, M, D) float32 or float16; targets.npy (T,) integer positions in the gallery; and, where there
is one, exclude.npy (T, E) integers, padded with -1. Δ = s(query, target) - s(query, item). The target itself is never picked.

OUT holds picks.npy (T, P) int64, padded with -1; pick_scores.npy; counts.npy (T, 3), candidates in near, mid and easy; lo.npy
and hi.npy, the absolute bounds that applied; anchor_scores.npy, the targets' scores; and mined.json, which says what was mined from
what. Until it is complete, finished blocks lie in OUT.partial, and the same command goes on from there.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-mine",
        description="Mine negatives from the mid zone of Δ for every query over a whole gallery. Files are mapped, not loaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", type=Path, nargs="?", metavar="INPUTS", help="folder that dqe-data encode wrote")
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder for the result; an interrupted run goes on there")
    parser.add_argument("--show", type=Path, metavar="OUT", help="print the statistics and the first rows of a finished folder")
    parser.add_argument("--rows", type=positive, default=5, metavar="N", help="rows that --show prints (default: 5)")
    files = parser.add_argument_group("files, where they are not INPUTS' own")
    files.add_argument("--queries", type=Path, metavar="NPY")
    files.add_argument("--gallery", type=Path, nargs="+", metavar="NPY|DIR", help="one file, shards in order, or a folder of shards")
    files.add_argument("--targets", type=Path, metavar="NPY")
    files.add_argument("--anchor-scores", type=Path, metavar="NPY", help="(T,) float32 scores that Δ is measured from, instead of targets")
    files.add_argument("--exclude", type=Path, metavar="NPY")
    zones = parser.add_argument_group("zones (defaults: those of dqe-train)")
    zones.add_argument("--lo", type=float, default=0.002, metavar="X", help="least Δ of the mid zone (default: 0.002)")
    zones.add_argument("--hi", type=float, default=0.02, metavar="X", help="largest Δ of the mid zone (default: 0.02)")
    zones.add_argument(
        "--bounds",
        choices=("pooled", "absolute", "rank"),
        default="pooled",
        help="what --lo and --hi are. pooled: fractions of all Δ >= 0 of all queries together; absolute: values of Δ; rank: fractions of "
        "each query's own ranking, whatever its target (default: pooled)",
    )
    zones.add_argument(
        "--policy",
        choices=("uniform", "hardest", "softmax"),
        default="uniform",
        help="which items of the mid zone are picked (default: uniform)",
    )
    zones.add_argument("--temperature", type=float, default=0.05, metavar="X", help="temperature of the policy softmax (default: 0.05)")
    zones.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the policies uniform and softmax (default: 0)")
    zones.add_argument("--picks", type=positive, default=16, metavar="P", help="negatives per query (default: 16)")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--block",
        type=positive,
        default=1024,
        metavar="N",
        help="queries per pass over the gallery; take more if the gallery is larger than the memory (default: 1024)",
    )
    work.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: one per processor)")
    work.add_argument(
        "--backend", choices=("auto", "cpu", "cuda", "reference"), default="auto", help="kernels that score and select (default: auto)"
    )
    work.add_argument("--allow-nan", action="store_true", help="accept NaN and infinities in the inputs; such rows get no picks")
    work.add_argument("--force", action="store_true", help="replace the result in OUT when the new one is complete")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.out is None) == (args.show is None):
        parser.error("give either --out OUT, to mine, or --show OUT")
    return _show(args) if args.show else _mine(args)


def _mine(args: argparse.Namespace) -> int:
    from dqe_engine.zones.mined_folder import read_mined
    from dqe_engine.zones.mining import summarise
    from dqe_engine.zones.mining_files import open_job
    from dqe_engine.zones.mining_folder import mine_to_folder

    from .mining_text import print_summary

    started = time.perf_counter()
    job = open_job(_files(args), zones=_zones(args), picks=args.picks, block=args.block, threads=args.threads or 0, backend=args.backend)
    done: int | None = None
    with mining_bars() as (reading, mining):

        def progress(count: int, total: int) -> None:
            nonlocal done
            done = count
            mining(count, total)

        try:
            outcome = mine_to_folder(args.out, job, force=args.force, allow_nonfinite=args.allow_nan, progress=progress, reading=reading)
        except KeyboardInterrupt:
            where = "while reading the inputs" if done is None else f"{done} of {len(job.queries)} queries are done"
            print(f"interrupted: {where}; run the same command to go on", file=sys.stderr)
            return EXIT_INTERRUPTED
    seconds = time.perf_counter() - started
    plan = outcome.manifest.plan
    if outcome.damaged_blocks:
        print(f"damaged blocks of the interrupted run, mined again: {outcome.damaged_blocks}", file=sys.stderr)
    for name, count in plan.nonfinite.items():
        print(f"rows with NaN or infinities in {name}: {count:,}", file=sys.stderr)
    _, mined = read_mined(args.out, verify=False)
    rate = f" ({outcome.mined / seconds:,.0f} queries/s)" if outcome.mined else ""
    print(f"gallery          {plan.items:,} items × {plan.tokens} × {plan.width}, shards: {len(job.shards)}")
    print(
        f"queries          {plan.queries:,}: {outcome.mined:,} mined, {plan.queries - outcome.mined:,} were there; backend {plan.backend}"
    )
    print_summary(summarise(mined), plan.picks)
    print(f"time             {seconds:.1f} s{rate}")
    print(f"peak memory      {_peak_memory() / 2**20:,.0f} MiB, mapped files included")
    print(args.out)
    return 0


def _show(args: argparse.Namespace) -> int:
    from dqe_engine.zones.mined_folder import read_mined

    from .mining_text import print_mined

    print_mined(*read_mined(args.show), args.rows)
    return 0


def _zones(args: argparse.Namespace) -> ZoneSpec:
    from dqe_engine.contracts.zones import ZoneSpec
    from dqe_engine.errors import InputError

    try:
        return ZoneSpec(lo=args.lo, hi=args.hi, bounds=args.bounds, policy=args.policy, temperature=args.temperature, seed=args.seed)
    except ValueError as error:
        raise InputError(str(error)) from error


def _files(args: argparse.Namespace) -> MiningFiles:
    """The files that the options name, and INPUTS' own for the others."""
    from dqe_engine.errors import InputError
    from dqe_engine.zones.mining_files import MiningFiles, exclude_within, gallery_within

    if args.targets and args.anchor_scores:
        raise InputError("give either --targets or --anchor-scores, not both")
    targets = args.anchor_scores or args.targets
    if args.inputs is None:
        for name, given in (("queries", args.queries), ("gallery", args.gallery), ("targets", targets)):
            if not given:
                raise InputError(f"--{name} FILE is missing; add it, or give a folder INPUTS that holds {name}.npy")
        return MiningFiles(
            queries=args.queries, gallery=args.gallery, targets=targets, targets_are_scores=bool(args.anchor_scores), exclude=args.exclude
        )
    return MiningFiles(
        queries=args.queries or args.inputs / "queries.npy",
        gallery=args.gallery or [gallery_within(args.inputs)],
        targets=targets or args.inputs / "targets.npy",
        targets_are_scores=bool(args.anchor_scores),
        exclude=args.exclude or exclude_within(args.inputs),
    )


def _peak_memory() -> int:
    """Largest resident size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
