"""dqe-eval: one dataset's figures for a checkpoint (PyTorch) or a bundle (runtime)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqe_engine.errors import InputError

from .runner import run_torch
from .sources import DATASET_HELP

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..data.public.base import Benchmark
    from ..evaluation.benchmarks import BenchmarkReport

_EPILOG = """\
examples:
  dqe-eval runs/garments/model --data data/garments
  dqe-eval bundle --data data/fashioniq --dataset fashioniq --gallery val
  dqe-eval bundle --data data/cirr --dataset cirr --split test1 --submission out/
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-eval",
        description="A dataset's figures by its own protocol: FashionIQ, CIRR, CIRCO, HP-FashionIQ, or a folder of dqe-data garments.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a checkpoint directory (dqe-train) or a bundle (dqe-export)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder; docs/datasets.md shows the layouts")
    parser.add_argument("--dataset", default="auto", metavar="NAME", help=DATASET_HELP)
    parser.add_argument("--features", type=Path, metavar="CACHE", help="feature cache for a checkpoint; filled with what it lacks")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    public = parser.add_argument_group("public datasets")
    public.add_argument("--split", metavar="SPLIT", help="default: val; also test1 of CIRR and test of CIRCO, with --submission")
    public.add_argument("--images", type=Path, metavar="DIR", help="where the images are, if not where the authors put them")
    public.add_argument(
        "--gallery", choices=("original", "val"), help="FashionIQ: the split's image list (default), or the union of queries"
    )
    public.add_argument("--shared-concept", action="store_true", help="CIRCO: put the shared concept before the relative caption")
    public.add_argument("--allow-missing", action="store_true", help="leave out images that are missing, and the queries that name them")
    public.add_argument("--submission", type=Path, metavar="OUT", help="CIRR and CIRCO: write the server's files to this folder")
    public.add_argument("--force", action="store_true", help="replace submission files that exist")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    if not args.model.is_dir():
        raise InputError(f"{args.model}: no such directory; expected a checkpoint (dqe-train) or a bundle (dqe-export)")
    from dqe_engine.contracts.manifest import MANIFEST_FILE

    from ..data.public.detect import open_benchmark

    if args.features is not None and (args.model / MANIFEST_FILE).is_file():
        raise InputError("--features is for checkpoints; a bundle encodes the gallery with its own graphs")
    benchmark = open_benchmark(args.data, args.dataset)
    if benchmark is not None:
        return _evaluate_benchmark(args, benchmark)
    options = {
        "--split": args.split, "--images": args.images, "--gallery": args.gallery, "--shared-concept": args.shared_concept,
        "--allow-missing": args.allow_missing, "--submission": args.submission, "--force": args.force,
    }  # fmt: skip
    if given := [name for name, value in options.items() if value]:
        raise InputError(f"{given[0]} is for public datasets, and {args.data} holds none; docs/datasets.md shows their folders")
    return _evaluate_folder(args)


def _evaluate_folder(args: argparse.Namespace) -> int:
    """A folder of JSON lines, as dqe-data garments writes it."""
    from dqe_engine.contracts.manifest import MANIFEST_FILE

    from ..data.damage import require_readable
    from ..evaluation.protocol import load_evaluation_set
    from .progress import simple_progress

    evaluation = load_evaluation_set(args.data)
    images = args.data / "images"
    with simple_progress() as progress:
        checked = progress.add_task("looking at images", total=len(evaluation.gallery))
        require_readable(images, evaluation.gallery, progress=lambda done, total: progress.update(checked, completed=done))
        gallery = progress.add_task("gallery", total=len(evaluation.gallery))
        queries = progress.add_task("queries", total=len(evaluation.records))
        if (args.model / MANIFEST_FILE).is_file():
            from dqe_engine.engine import RetrievalEngine

            from ..evaluation.runtime import evaluate_engine, index_gallery

            engine = RetrievalEngine.load(args.model)
            index_gallery(engine, images, evaluation, progress=lambda done, total: progress.update(gallery, completed=done))
            report, _ = evaluate_engine(engine, evaluation, advance=lambda n: progress.advance(queries, n))
        else:
            from ..checkpoint import load_checkpoint
            from ..evaluation.pytorch import encode_gallery_images, evaluate_model

            checkpoint = load_checkpoint(args.model)
            tokens = encode_gallery_images(
                checkpoint.model,
                images,
                evaluation,
                features=args.features,
                advance=lambda n: progress.advance(gallery, n),
                listener=lambda event: _say(progress, event),
            )
            report, _ = evaluate_model(
                checkpoint.model, checkpoint.tokenizer, evaluation, tokens, advance=lambda n: progress.advance(queries, n)
            )
    _print(report, as_json=args.json)
    return 0


def _evaluate_benchmark(args: argparse.Namespace, benchmark: Benchmark) -> int:
    from ..data.public.base import Options
    from ..data.public.placing import Coverage
    from ..data.queries import QuerySet
    from ..evaluation.benchmarks import evaluate_benchmark
    from ..evaluation.rankers import open_ranker
    from ..evaluation.submission import planned_files, submission, write_submission
    from .progress import simple_progress

    split = args.split or benchmark.splits[0]
    if args.submission is not None:
        if args.allow_missing:
            raise InputError("--submission needs every query and image; leave out --allow-missing")
        existing = [path for path in planned_files(args.submission, benchmark.name, split) if path.exists()]
        if existing and not args.force:
            raise InputError(f"{existing[0]}: exists already; choose another folder, or replace it with --force")
    with simple_progress() as progress:
        tasks = {what: progress.add_task(what, total=0) for what in ("looking at images", "gallery", "queries")}

        def prepared(queries: QuerySet, coverage: Coverage) -> None:
            if args.submission is None and queries.secret:
                raise InputError(f"{benchmark.name} {split}: its targets are secret; write the server's files with --submission OUT")
            if not coverage.complete:
                print(f"{queries.name}: {coverage.describe('queries')}", file=sys.stderr)
            for what, count in (("gallery", coverage.images), ("queries", coverage.queries)):
                progress.update(tasks[what], total=(progress.tasks[tasks[what]].total or 0) + count)

        ranker = open_ranker(
            args.model,
            lambda what, n: progress.advance(tasks[what], n),
            features=args.features,
            listener=lambda event: _say(progress, event),
        )
        report, ranked = evaluate_benchmark(
            benchmark, ranker, split=split,
            options=Options(args.gallery, args.shared_concept), images=args.images, allow_missing=args.allow_missing, prepared=prepared,
            checked=lambda done, total: progress.update(tasks["looking at images"], completed=done, total=total),
        )  # fmt: skip
    written: list[Path] = []
    if args.submission is not None:
        (only,) = ranked
        written = write_submission(args.submission, submission(benchmark.name, split, only.queries, only.ranked))
    _print_benchmark(report, as_json=args.json)
    for path in written:
        print(path, file=sys.stderr if args.json else sys.stdout)
    return 0


def _say(progress: Progress, event: dict[str, Any]) -> None:
    """What a feature cache has to say."""
    if "text" in event:
        progress.console.print(event["text"], highlight=False, soft_wrap=True)


def _print(report: object, *, as_json: bool) -> None:
    import msgspec

    from dqe_engine.contracts.parsing import to_json

    if as_json:
        print(to_json(report).decode(), end="")
        return
    for name, value in msgspec.to_builtins(report).items():
        if isinstance(value, dict):
            value = "  ".join(f"{k} {v:.4f}" for k, v in value.items())
        elif isinstance(value, list):
            value = " to ".join(f"{v:.4f}" for v in value)
        print(f"{name:30} {f'{value:.4f}' if isinstance(value, float) else value}")


def _print_benchmark(report: BenchmarkReport, *, as_json: bool) -> None:
    if as_json:
        _print(report, as_json=True)
        return
    print(f"{report.dataset} {report.split}: {report.protocol}")
    for part in report.sets:
        wordless = f", {part.coverage.wordless} without words" if part.coverage.wordless else ""
        print(f"{part.name}: {part.coverage.queries} queries{wordless} over {part.coverage.images} images")
        for name, value in part.figures.items():
            print(f"  {name:24} {value:.4f}")
    for name, value in report.summary.items():
        print(f"{name:26} {value:.4f}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _evaluate(build_parser().parse_args(argv)))
