"""The options that say where training data lies, for the commands that read it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.errors import InputError

from ..data.public.names import TITLES

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..run.workflow import TrainingSource

_JSONL_HELP = "or jsonl for a folder as dqe-data garments writes it"
DATASET_HELP = f"auto (default), {', '.join(TITLES)}, {_JSONL_HELP}"
TRAINING_DATASET_HELP = f"auto (default), fashioniq, cirr, {_JSONL_HELP}"
"""The other datasets have no training triplets."""


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """`--data` with `--dataset`, or `--triplets` with `--images`."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder: of dqe-data garments, FashionIQ or CIRR")
    parser.add_argument("--dataset", default="auto", metavar="NAME", help=TRAINING_DATASET_HELP)
    parser.add_argument(
        "--triplets",
        type=Path,
        metavar="FILE",
        help='own data: JSON lines {"reference", "target", "text"[, "attributes", "allowed", "wordings"]}',
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the images; for own data, image names are relative to it",
    )
    parser.add_argument("--allow-missing", action="store_true", help="public data: leave out the triplets whose images are missing")


def check_source_options(args: argparse.Namespace) -> None:
    """Raise InputError unless exactly one source is given, with what belongs to it."""
    if (args.data is None) == (args.triplets is None):
        raise InputError("give either --data DIR, or --triplets FILE with --images DIR")
    if args.data is None and args.images is None:
        raise InputError("give either --data DIR, or --triplets FILE with --images DIR")
    if args.data is None and (args.dataset != "auto" or args.allow_missing):
        raise InputError("--dataset and --allow-missing go with --data DIR")


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments ask for. Raises InputError, also for a vision tower that would stay random."""
    from ..run.configuration import load_config

    config = load_config(args.config or _default_config(args), args.overrides)
    if config.vision_random:
        raise InputError("the vision tower would stay random: set start, backbone or vision_weights, or optim.vision_learning_rate above 0")
    return config


def _default_config(args: argparse.Namespace) -> str:
    """The preset for a source where none is asked for: "start" or "blip2" with such a checkpoint among the overrides; public datasets
    have their own with a backbone, and none without: the small models that ship are no match for photographs."""
    from ..config import preset_names
    from ..data.public.detect import open_benchmark

    named = {assignment.partition("=")[0] for assignment in args.overrides}
    if "start" in named:
        return "start"
    benchmark = open_benchmark(args.data, args.dataset) if args.data is not None and args.data.is_dir() else None
    if "backbone" in named:
        return benchmark.name if benchmark is not None and benchmark.name in preset_names() else "blip2"
    if benchmark is not None:
        benchmark.training_records()  # a dataset without says so; no backbone would help
        raise InputError(
            f"{args.data}: training on {benchmark.name} begins with a pretrained model: add backbone=Salesforce/blip2-itm-vit-g (or a "
            "directory) or start=RUN/model; --config own-data takes the small 64-pixel model all the same"
        )
    return "own-data" if args.data is None else "garments"


def open_source(args: argparse.Namespace, default_vocabulary: Path | None = None) -> TrainingSource:
    """The training data of `check_source_options`-ed arguments; what was left out of it is said on stderr. `default_vocabulary` is that
    of data that brings no file of its own. Raises InputError.
    """
    from ..data.public.detect import open_benchmark
    from ..data.public.placing import BenchmarkSource
    from ..run.workflow import DataSource

    given, labels = getattr(args, "vocabulary", None), getattr(args, "image_labels", None)
    vocabulary, derive = given or default_vocabulary, not getattr(args, "no_derived_labels", False)
    if args.data is None:
        return DataSource(args.triplets, args.images, labels, vocabulary, derive=derive)
    benchmark = open_benchmark(args.data, args.dataset) if args.data.is_dir() else None
    if benchmark is None:
        if args.images is not None or args.allow_missing:
            raise InputError(f"{args.data}: a folder of JSON lines has its own images/; leave out --images and --allow-missing")
        if labels is not None:
            raise InputError(f"--image-labels goes with --triplets; a folder of JSON lines has its own, {args.data / 'images.jsonl'}")
        return DataSource.from_directory(args.data, vocabulary=given, derive=derive)
    if labels is not None:
        raise InputError(f"--image-labels goes with --triplets; labels of {benchmark.name} are read from its own files and texts")
    source = BenchmarkSource.open(benchmark, args.images, vocabulary=vocabulary, allow_missing=args.allow_missing, derive=derive)
    if not source.coverage.complete:
        print(source.coverage.describe("triplets"), file=sys.stderr)
    if source.coverage.wordless:
        print(f"{source.coverage.wordless} triplets have no text; the model reads '.'", file=sys.stderr)
    return source
