"""`dqe-mine`: mid-zone negatives for every query over a whole gallery, to a folder; interrupted or killed, it goes on."""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .main import EXIT_INTERRUPTED, positive, run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dqe_engine.zones.mining import MinedNegatives, MiningJob, MiningSummary

SHOWN_PICKS = 6

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
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder of the result, made or continued")
    parser.add_argument("--show", type=Path, metavar="OUT", help="print statistics of a finished folder, and its first rows")
    parser.add_argument("--rows", type=positive, default=5, metavar="N", help="rows that --show prints (default: 5)")
    files = parser.add_argument_group("files, where they are not INPUTS' own")
    files.add_argument("--queries", type=Path, metavar="NPY")
    files.add_argument("--gallery", type=Path, nargs="+", metavar="NPY|DIR", help="the shards in order, or a folder of them")
    files.add_argument("--targets", type=Path, metavar="NPY")
    files.add_argument("--anchor-scores", type=Path, metavar="NPY", help="instead of targets: (T,) float32 scores that Δ starts from")
    files.add_argument("--exclude", type=Path, metavar="NPY")
    zones = parser.add_argument_group("zones (defaults: those of dqe-train)")
    zones.add_argument("--lo", type=float, default=0.002, metavar="X", help="least Δ of the mid zone (default: 0.002)")
    zones.add_argument("--hi", type=float, default=0.02, metavar="X", help="largest Δ of the mid zone (default: 0.02)")
    zones.add_argument(
        "--bounds",
        choices=("pooled", "absolute", "rank"),
        default="pooled",
        help="lo and hi are fractions of all Δ >= 0, over all queries; scores; or fractions of each query's own list, which do not "
        "depend on the target (default: pooled)",
    )
    zones.add_argument("--policy", choices=("uniform", "hardest", "softmax"), default="uniform", help="(default: uniform)")
    zones.add_argument("--temperature", type=float, default=0.05, metavar="X", help="of softmax (default: 0.05)")
    zones.add_argument("--seed", type=int, default=0, metavar="N", help="of uniform and softmax (default: 0)")
    zones.add_argument("--picks", type=positive, default=16, metavar="P", help="negatives per query (default: 16)")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--block",
        type=positive,
        default=1024,
        metavar="N",
        help="queries per pass over the gallery; take more where it is larger than the memory (default: 1024)",
    )
    work.add_argument("--threads", type=positive, metavar="N", help="(default: one per processor)")
    work.add_argument("--backend", choices=("auto", "cpu", "cuda", "reference"), default="auto", help="(default: auto)")
    work.add_argument("--allow-nan", action="store_true", help="go on where inputs hold NaN or infinities; such rows get no picks")
    work.add_argument("--force", action="store_true", help="replace what OUT holds, when the new result is complete")
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
    from dqe_engine.zones.mining import summarise
    from dqe_engine.zones.mining_folder import mine_to_folder, read_mined

    started = time.perf_counter()
    job = _job(args)
    done: int | None = None
    with _progress_bars() as (reading, mining):

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
    _print_summary(summarise(mined), plan.picks)
    print(f"time             {seconds:.1f} s{rate}")
    print(f"peak memory      {_peak_memory() / 2**20:,.0f} MiB, mapped files included")
    print(args.out)
    return 0


def _show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dqe_engine.zones.mining import summarise
    from dqe_engine.zones.mining_folder import read_mined

    manifest, mined = read_mined(args.show)
    plan, zones, console = manifest.plan, manifest.plan.zones, Console()
    softmax = f", temperature {zones.temperature}" if zones.policy == "softmax" else ""
    print(f"gallery          {plan.items:,} items × {plan.tokens} × {plan.width}; backend {plan.backend}")
    applied = f" (Δ {manifest.resolved.lo:.4f} to {manifest.resolved.hi:.4f})" if manifest.resolved else ""
    print(
        f"zones            {zones.bounds} {zones.lo} to {zones.hi}{applied}; {plan.picks} picks, {zones.policy}{softmax}, seed {zones.seed}"
    )
    for name, count in plan.nonfinite.items():
        print(f"not finite       rows of {name}: {count:,}")
    print(f"queries          {plan.queries:,}")
    summary = summarise(mined)
    _print_summary(summary, plan.picks)
    console.print(_quantile_table(summary))
    console.print(_row_table(mined, min(args.rows, plan.queries)))
    return 0


def _print_summary(summary: MiningSummary, picks: int) -> None:
    print(f"all {picks} picks".ljust(16), f"{summary.full:,} queries")
    print(f"empty mid zone   {summary.empty:,} queries")
    medians = ", ".join(f"{name} {summary.quantiles[name][3]:,}" for name in ("near", "mid", "easy") if name in summary.quantiles)
    print(f"zones, median    {medians or 'none'}")
    if "Δ of picks" in summary.quantiles:
        print(f"Δ of picks       {summary.quantiles['Δ of picks'][3]:.4f} (median)")


def _quantile_table(summary: MiningSummary) -> Any:
    from rich.table import Table

    from dqe_engine.zones.mining import QUANTILES

    table = Table(title="over the queries", title_justify="left")
    table.add_column("quantile", no_wrap=True)
    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    for quantile in QUANTILES:
        table.add_column(names.get(quantile, f"{quantile:.0%}"), justify="right")
    for name, values in summary.quantiles.items():
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values))
    return table


def _row_table(mined: MinedNegatives, rows: int) -> Any:
    from rich.table import Table

    table = Table(title=f"first {rows} queries", title_justify="left")
    for column in ("query", "target score", "near", "mid", "easy"):
        table.add_column(column, justify="right")
    table.add_column("picks (Δ)", overflow="fold")
    for row in range(rows):
        anchor = float(mined.anchor_scores[row])
        pairs = zip(mined.picks[row].tolist(), mined.pick_scores[row].tolist(), strict=True)
        picks = [f"{item} ({anchor - score:.4f})" for item, score in pairs if item >= 0]
        shown = "  ".join(picks[:SHOWN_PICKS]) + (f"  and {len(picks) - SHOWN_PICKS} more" if len(picks) > SHOWN_PICKS else "")
        table.add_row(str(row), f"{anchor:.4f}", *(f"{count:,}" for count in mined.counts[row].tolist()), shown or "none")
    return table


# -- the files ---------------------------------------------------------------------------------------------------------


def _job(args: argparse.Namespace) -> MiningJob:
    """The arrays that the options name, mapped. Raises InputError naming the file that does not fit."""
    from dqe_engine.contracts.zones import ZoneSpec
    from dqe_engine.errors import InputError
    from dqe_engine.zones.mining import MiningJob

    if args.targets and args.anchor_scores:
        raise InputError("give either --targets or --anchor-scores, not both")
    try:
        zones = ZoneSpec(lo=args.lo, hi=args.hi, bounds=args.bounds, policy=args.policy, temperature=args.temperature, seed=args.seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    queries = _mapped(_path(args, "queries"), ("float32",), (2,))
    shards = [(path, _mapped(path, ("float32", "float16"), (2, 3))) for path in _shards(args)]
    for path, shard in shards:
        if shard.shape[-1] != queries.shape[1]:
            raise InputError(f"{path}: shape {shard.shape}, D={shard.shape[-1]}; the queries have D={queries.shape[1]}")
        if (shard.dtype, shard.shape[1:]) != (shards[0][1].dtype, shards[0][1].shape[1:]):
            first = shards[0][1]
            raise InputError(f"{path}: {shard.dtype} {shard.shape[1:]} per item, but {shards[0][0]} has {first.dtype} {first.shape[1:]}")
    if args.anchor_scores:
        targets = _mapped(args.anchor_scores, ("float32",), (1,))
    else:
        targets = _mapped(_path(args, "targets"), ("integers",), (1,)).astype("int64")
    exclude = args.exclude or (args.inputs and args.inputs / "exclude.npy")
    excluded = None
    if exclude and (args.exclude or exclude.exists()):
        excluded = _mapped(exclude, ("integers",), (2,)).astype("int64")
    return MiningJob(
        queries=queries, items=[shard for _, shard in shards], targets=targets, zones=zones, picks=args.picks, exclude=excluded,
        block=args.block, threads=args.threads or 0, backend=args.backend,
    )  # fmt: skip


def _path(args: argparse.Namespace, name: str) -> Path:
    from dqe_engine.errors import InputError

    given: Path | None = getattr(args, name)
    if given is None and args.inputs is None:
        raise InputError(f"no {name}: give --{name} FILE, or a folder that holds {name}.npy")
    return given or args.inputs / f"{name}.npy"


def _shards(args: argparse.Namespace) -> list[Path]:
    """The gallery's files, in order."""
    from dqe_engine.errors import InputError

    given: list[Path] | None = args.gallery
    if not given:
        folder = None if args.inputs is None else args.inputs / "gallery"
        given = [folder] if folder and folder.is_dir() else [_path(args, "gallery")]
    paths = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(
            path.glob("*.npy"), key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name)]
        )
        if not inside:
            raise InputError(f"{path}: no .npy files in this folder")
        paths += inside
    return paths


def _mapped(path: Path, dtypes: tuple[str, ...], ranks: tuple[int, ...]) -> NDArray[Any]:
    """The array in a file, mapped read-only."""
    import numpy as np

    from dqe_engine.errors import InputError
    from dqe_engine.files import describe_os_error, require_regular

    try:
        require_regular(path)
        array = np.load(path, mmap_mode="r")
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole .npy file of numbers ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: an .npz archive, expected a .npy file, which can be mapped")
    kind = "integers" if array.dtype.kind in "iu" else array.dtype
    if kind not in dtypes:
        raise InputError(f"{path}: dtype {array.dtype}, expected {' or '.join(dtypes)}; convert with astype and save again")
    if array.ndim not in ranks:
        raise InputError(f"{path}: shape {array.shape}, expected {' or '.join(map(str, ranks))} dimensions")
    if not array.flags.c_contiguous:
        raise InputError(f"{path}: in Fortran order; save np.ascontiguousarray of it")
    return np.asarray(array)


# -- what is seen ------------------------------------------------------------------------------------------------------


@contextmanager
def _progress_bars() -> Iterator[tuple[Callable[[int, int], None], Callable[[int, int], None]]]:
    """Two functions that move bars on stderr, for bytes read and for queries mined; no bars where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            if not task.speed:
                return Text("")
            return Text(f"{task.speed / 2**20:,.0f} MiB/s" if task.fields["bytes"] else f"{task.speed:,.1f} queries/s")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), Rate())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bars:
        tasks: dict[str, Any] = {}

        def mover(name: str) -> Callable[[int, int], None]:
            def move(done: int, total: int) -> None:
                if name not in tasks:  # with what is done, which would else count as speed
                    tasks[name] = bars.add_task(name, total=total, completed=done, bytes=name == "reading inputs")
                bars.update(tasks[name], completed=done)

            return move

        yield mover("reading inputs"), mover("mining")


def _peak_memory() -> int:
    """Largest resident size of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
