"""dqe-eval: one dataset's figures for a checkpoint (PyTorch) or a bundle (runtime)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqe_engine.errors import InputError

from ..data.public.names import TITLES
from ..data.public.wording import WORDED, WORDINGS
from .evaluation_text import benchmark_text, folder_text
from .runner import run_torch
from .sources import DATASET_HELP

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..data.public.base import Benchmark
    from ..evaluation.protocol import EvaluationSet

_EPILOG = """\
examples:
  dqe-eval runs/garments/model --data data/garments
  dqe-eval runs/mine/model --triplets mine.jsonl --images photos --probes
  dqe-eval bundle --data data/fashioniq --dataset fashioniq --gallery val
  dqe-eval bundle --data data/cirr --dataset cirr --split test1 --submission out/
"""
_PUBLIC = ("--shared-concept", "--wording", "--allow-missing", "--submission", "--force")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-eval",
        description=f"A dataset's figures by its own protocol: {', '.join(TITLES.values())}, a folder of dqe-data garments, or triplets "
        "of your own.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, help="a checkpoint directory (dqe-train) or a bundle (dqe-export), which may be hf://OWNER/NAME@REVISION"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder; docs/datasets.md shows the layouts")
    parser.add_argument("--dataset", default="auto", metavar="NAME", help=DATASET_HELP)
    parser.add_argument("--probes", action="store_true", help="also ask what the figures hide: one modality alone, other words, negation, "
                        "what changes unasked; takes several times as long")  # fmt: skip
    parser.add_argument("--features", type=Path, metavar="CACHE", help="feature cache for a checkpoint; filled with what it lacks")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--images", type=Path, metavar="DIR", help="own data: folder that the image names are relative to; public data: "
                        "where the images are, if not where the authors put them")  # fmt: skip
    parser.add_argument("--gallery", metavar="GALLERY", help="own data: more images to search, a folder in --images or a file of names, "
                        "one a line; FashionIQ: original, the split's image list (default), or val, the union of queries")  # fmt: skip
    own = parser.add_argument_group("triplets of your own")
    own.add_argument("--triplets", type=Path, metavar="FILE", help='JSON lines {"reference", "target", "text"[, "attributes", "allowed", '
                     '"wordings"]}; the gallery is every image that they or --image-labels name')  # fmt: skip
    own.add_argument("--image-labels", type=Path, metavar="FILE", help='JSON lines {"image", "attributes"}')
    parser.add_argument("--split", metavar="SPLIT", help="queries to ask: val (default), or test of a folder of JSON lines; "
                        "with --submission, test1 of CIRR and test of CIRCO")  # fmt: skip
    public = parser.add_argument_group("public datasets")
    public.add_argument("--shared-concept", action="store_true", help="CIRCO: put the shared concept before the relative caption")
    public.add_argument("--wording", choices=tuple(WORDINGS), help="make the texts as these models' own code does (FashionIQ, CIRCO; "
                        "default: plain, the dataset's protocol)")  # fmt: skip
    public.add_argument("--allow-missing", action="store_true", help="leave out images that are missing, and the queries that name them")
    public.add_argument("--submission", type=Path, metavar="OUT", help="CIRR and CIRCO: write the server's files to this folder")
    public.add_argument("--force", action="store_true", help="replace submission files that exist")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    from dqe_engine.bundle import bundle_folder

    if (args.data is None) == (args.triplets is None):
        raise InputError("give either --data DIR, or --triplets FILE with --images DIR")
    args.model = bundle_folder(args.model)
    if not args.model.is_dir():
        raise InputError(f"{args.model}: no such directory; expected a checkpoint (dqe-train) or a bundle (dqe-export)")
    from dqe_engine.contracts.manifest import MANIFEST_FILE

    if args.features is not None and (args.model / MANIFEST_FILE).is_file():
        raise InputError("--features is for checkpoints; a bundle encodes the gallery with its own graphs")
    if args.triplets is not None:
        return _evaluate_own(args)
    if args.image_labels is not None:
        raise InputError("--image-labels goes with --triplets; a dataset folder has its own images.jsonl")
    from ..data.public.detect import open_benchmark

    benchmark = open_benchmark(args.data, args.dataset)
    if benchmark is not None:
        return _evaluate_benchmark(args, benchmark)
    _refuse(args, ("--images", "--gallery"), f"goes with --triplets or a public dataset; {args.data} has its own images and gallery")
    _refuse(args, _PUBLIC, f"is for public datasets, and {args.data} holds none: see docs/datasets.md")
    if args.split not in (None, "val", "test"):
        raise InputError(f"--split {args.split}: a folder of JSON lines has val and test")
    from ..evaluation.protocol import load_evaluation_set

    evaluation = load_evaluation_set(args.data, triplets=f"{args.split or 'val'}.jsonl")
    return _evaluate_set(args, evaluation, args.data / "images")


def _evaluate_own(args: argparse.Namespace) -> int:
    if args.images is None:
        raise InputError("--triplets needs --images DIR, the folder that the image names are relative to")
    if args.dataset != "auto":
        raise InputError("--dataset goes with --data DIR")
    _refuse(args, ("--split", *_PUBLIC), "is for public datasets, not for --triplets")
    from ..evaluation.own_data import load_own_data

    gallery = None if args.gallery is None else Path(args.gallery)
    evaluation = load_own_data(args.triplets, args.images, image_labels=args.image_labels, gallery=gallery)
    return _evaluate_set(args, evaluation, args.images)


def _refuse(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    for option in options:
        if getattr(args, option.removeprefix("--").replace("-", "_")):
            raise InputError(f"{option} {why}")


def _evaluate_set(args: argparse.Namespace, evaluation: EvaluationSet, images: Path) -> int:
    """Triplets in JSON lines: a folder as dqe-data garments writes it, or one's own."""
    import msgspec

    from ..data.damage import require_readable
    from ..evaluation.probes.asking import Labels
    from ..evaluation.probes.run import run_probes
    from ..evaluation.protocol import summarise
    from ..evaluation.rankers import ask, open_ranker
    from .progress import simple_progress

    queries = evaluation.queries
    with simple_progress() as progress:
        tasks = {"looking at images": len(evaluation.gallery), "gallery": len(evaluation.gallery), "queries": len(queries)}
        bars = {what: progress.add_task(what, total=total) for what, total in tasks.items()}
        require_readable(
            images, evaluation.gallery, progress=lambda done, total: progress.update(bars["looking at images"], completed=done)
        )
        if args.probes:
            bars["probes"] = progress.add_task("probes", total=None)
        model = open_ranker(
            args.model,
            lambda what, n: progress.advance(bars[what], n),
            features=args.features,
            listener=lambda event: _say(progress, event),
            image_storage="f32",
        )
        found = model(queries, images, evaluation.gallery)
        weights = found.weights if found.weights.any() else None
        report = summarise(evaluation, found.ranked, weights=weights, attributes=model.attributes)
        if args.probes:
            probes = run_probes(ask(model, queries, images, evaluation.gallery, found, Labels.of(evaluation)))
            report = msgspec.structs.replace(report, probes=probes)
    _print(report, folder_text(report), as_json=args.json)
    return 0


def _evaluate_benchmark(args: argparse.Namespace, benchmark: Benchmark) -> int:
    from ..data.public.base import Options
    from ..data.public.placing import Coverage
    from ..data.queries import QuerySet
    from ..evaluation.benchmarks import evaluate_benchmark
    from ..evaluation.probe_report import ProbeReport
    from ..evaluation.probes.run import require_targets, run_probes
    from ..evaluation.protocol import Embeddings
    from ..evaluation.rankers import ask, open_ranker
    from ..evaluation.submission import submission, write_submission
    from .progress import simple_progress

    split = args.split or benchmark.splits[0]
    _check_benchmark_options(args, benchmark, split)
    with simple_progress() as progress:
        tasks = {what: progress.add_task(what, total=0) for what in ("looking at images", "gallery", "queries")}
        if args.probes:
            tasks["probes"] = progress.add_task("probes", total=None)

        def prepared(queries: QuerySet, coverage: Coverage) -> None:
            if args.submission is None and queries.secret:
                raise InputError(f"{benchmark.name} {split}: its targets are secret; write the server's files with --submission OUT")
            if args.probes:
                require_targets(queries)
            if not coverage.complete:
                print(f"{queries.name}: {coverage.describe('queries')}", file=sys.stderr)
            for what, count in (("gallery", coverage.images), ("queries", coverage.queries)):
                progress.update(tasks[what], total=(progress.tasks[tasks[what]].total or 0) + count)

        model = open_ranker(
            args.model,
            lambda what, n: progress.advance(tasks[what], n),
            features=args.features,
            listener=lambda event: _say(progress, event),
        )

        def probe(queries: QuerySet, folder: Path, names: Sequence[str], found: Embeddings) -> ProbeReport:
            return run_probes(ask(model, queries, folder, names, found))

        report, ranked = evaluate_benchmark(
            benchmark, model, split=split, options=Options(args.gallery, args.shared_concept, WORDINGS[args.wording or "plain"]),
            images=args.images, allow_missing=args.allow_missing, prepared=prepared,
            checked=lambda done, total: progress.update(tasks["looking at images"], completed=done, total=total),
            probe=probe if args.probes else None,
        )  # fmt: skip
    written: list[Path] = []
    if args.submission is not None:
        (only,) = ranked
        written = write_submission(args.submission, submission(benchmark.name, split, only.queries, only.ranked))
    _print(report, benchmark_text(report), as_json=args.json)
    for path in written:
        print(path, file=sys.stderr if args.json else sys.stdout)
    return 0


def _check_benchmark_options(args: argparse.Namespace, benchmark: Benchmark, split: str) -> None:
    """Raise InputError for options that a public dataset does not go with, or that do not go together."""
    from ..evaluation.submission import planned_files

    if args.gallery not in (None, "original", "val"):
        raise InputError(f"--gallery {args.gallery}: expected original or val for a public dataset")
    if args.wording is not None and benchmark.name not in WORDED:
        raise InputError(f"--wording {args.wording}: every model reads a caption of {benchmark.name} as it is; leave it out")
    if args.submission is None:
        return
    if args.probes:
        raise InputError("--probes needs targets, which are secret where --submission is for; ask for them on val")
    if args.allow_missing:
        raise InputError("--submission needs every query and image; leave out --allow-missing")
    existing = [path for path in planned_files(args.submission, benchmark.name, split) if path.exists()]
    if existing and not args.force:
        raise InputError(f"{existing[0]}: exists already; choose another folder, or replace it with --force")


def _say(progress: Progress, event: dict[str, Any]) -> None:
    """What a feature cache has to say."""
    if "text" in event:
        progress.console.print(event["text"], highlight=False, soft_wrap=True)


def _print(report: object, lines: Iterable[str], *, as_json: bool) -> None:
    from dqe_engine.contracts.parsing import to_json

    if as_json:
        print(to_json(report).decode(), end="")
        return
    for line in lines:
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _evaluate(build_parser().parse_args(argv)))
