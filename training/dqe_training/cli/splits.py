"""What dqe-train judges its models by: the options, the splits they name, and the table at the end."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.cli.main import positive
from dqe_engine.errors import InputError

if TYPE_CHECKING:
    from ..evaluation.split import EvaluationSplit
    from ..run.validation import Validation

EPOCH, NEVER = "epoch", "never"


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """`--eval-every`, `--val-triplets` and `--test`."""
    parser.add_argument(
        "--eval-every",
        type=_interval,
        metavar="N|epoch|never",
        help="judge the model by the val queries after every N steps, or every epoch, and keep the best in RUN/best "
        "(default: epoch, where the data has val queries whose images are there)",
    )
    parser.add_argument("--val-triplets", type=Path, metavar="FILE", help="own data: val queries, in the format of --triplets")
    parser.add_argument(
        "--test", action="store_true", help="at the end, figures of RUN/model and RUN/best on the test split (of public datasets: val)"
    )


def _interval(text: str) -> int | str:
    """argparse type: steps, "epoch" or "never"."""
    return text if text in (EPOCH, NEVER) else positive(text)


def open_validation(args: argparse.Namespace) -> Validation | None:
    """What to judge by while training. What was not asked for and cannot be is said on stderr; InputError for what was."""
    from ..run.validation import Validation

    if args.eval_every == NEVER:
        if args.val_triplets is not None:
            raise InputError("--val-triplets are for validation, which --eval-every never turns off; leave out one of them")
        return None
    asked = args.eval_every is not None or args.val_triplets is not None
    try:
        split = _open_split(args, "val")
        split.require_images()
    except InputError as error:
        if asked:
            raise
        print(f"not validated: {error}", file=sys.stderr)
        return None
    return Validation(split, args.eval_every if isinstance(args.eval_every, int) else 0)


def open_test(args: argparse.Namespace) -> EvaluationSplit | None:
    """What to judge the finished models by, where `--test` asks for it. Raises InputError."""
    return _open_split(args, "test") if args.test else None


def _open_split(args: argparse.Namespace, split: str) -> EvaluationSplit:
    from ..data.public.detect import open_benchmark
    from ..evaluation.split import EvaluationSplit

    benchmark = open_benchmark(args.data, args.dataset) if args.data is not None else None
    if args.val_triplets is not None and split == "val":
        if benchmark is not None:
            raise InputError(f"--val-triplets are for data of one's own; {benchmark.name} has val queries")
        return EvaluationSplit.of_triplets(args.val_triplets, args.images or args.data / "images")
    if args.data is None:
        raise InputError(
            "triplets of one's own have no val queries; give some with --val-triplets FILE" if split == "val"
            else "--test: triplets of one's own have no test split; judge RUN/best with dqe-eval"
        )  # fmt: skip
    if benchmark is None:
        return EvaluationSplit.of_folder(args.data, split)
    if "val" not in benchmark.splits:
        raise InputError(f"{args.data}: {benchmark.name} has no val queries")
    return EvaluationSplit.of_benchmark(benchmark, args.images, allow_missing=args.allow_missing)


def figures_table(title: str, headline: str, columns: Mapping[str, Mapping[str, float]]) -> str:
    """Figures by row, models by column; `headline` marked."""
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    width = max(len(title), *(len(name) + 2 for name in names))
    lines = ["  ".join([f"{title:{width}}", *(f"{column:>20}" for column in columns)])]
    for name in names:
        values = (f"{figures[name]:.4f}" if name in figures else "" for figures in columns.values())
        lines.append("  ".join([f"{name + (' *' if name == headline else ''):{width}}", *(f"{value:>20}" for value in values)]))
    return "\n".join(lines)


def print_figures(run: Path, split: EvaluationSplit | None, features: Path | None) -> None:
    """Val figures of RUN/model and RUN/best, as training found them, and, where `split` is given, theirs on it, on stdout.

    Where `split` is what training validated with, its figures are those, printed once.
    """
    from ..checkpointing.checkpoint import read_meta
    from ..evaluation.split import judge_checkpoint
    from ..run.validation import BEST

    progress = read_meta(run / "model").progress
    steps = {"model": progress.step} | ({} if progress.best is None else {BEST: progress.best.step})
    titles = {name: f"{name} (step {step})" for name, step in steps.items()}
    validated, best = progress.validated, progress.best
    again = split is not None and validated is not None and (validated.split, validated.step) == (split.identity, progress.step)
    if validated is not None and best is not None:
        found = {titles["model"]: validated.figures, titles[BEST]: best.figures}
        print(figures_table("val: best was chosen on these queries" if again else "val", best.headline, found), end="\n\n")
    if split is not None and not again:
        found = {titles[name]: judge_checkpoint(run / name, split, features=features) for name in steps}
        title = "val: the answers of test are not public" if split.name == "val" else split.name
        print(figures_table(title, split.headline, found), end="\n\n")


def print_server_hint(args: argparse.Namespace) -> None:
    """Where `--test` was given and a server has the answers of the test split, how to ask it, on stderr."""
    from ..data.public.detect import open_benchmark
    from ..run.validation import BEST

    benchmark = open_benchmark(args.data, args.dataset) if args.test else None
    if benchmark is not None and benchmark.name == "cirr":  # the one that trains and has a server
        model = args.out / (BEST if (args.out / BEST).is_dir() else "model")
        images = [] if args.images is None else ["--images", str(args.images)]
        command = shlex.join(["dqe-eval", str(model), "--data", str(args.data), *images, "--split", "test1", "--submission", "OUT"])
        print(f"the server has the answers of test1: {command}", file=sys.stderr)
