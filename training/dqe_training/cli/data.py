"""dqe-data: make the procedural dataset; check a public one and submissions to it; fill a feature cache; encode for dqe-mine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.cli.main import positive
from dqe_engine.errors import InputError

from .runner import run_torch
from .sources import DATASET_HELP, add_source_options, check_source_options

if TYPE_CHECKING:
    from ..data.public.base import Benchmark
    from ..data.public.check import DatasetCheck

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_ENCODE_EPILOG = """\
OUT holds queries.npy, gallery.npy, targets.npy and exclude.npy (the references), as dqe-mine takes them, and images.json:
position i of the gallery is its i-th name. Then: dqe-mine OUT --out mined
"""


def _add_garments(commands: Commands) -> None:
    garments = commands.add_parser("garments", help="draw the procedural garments dataset")
    garments.add_argument("out", type=Path, metavar="DIR")
    garments.add_argument("--train-images", type=positive, default=12_000)
    garments.add_argument("--train-triplets", type=int, default=48_000, help="number of training triplets; 0 for images and labels alone")
    garments.add_argument("--gallery-images", type=positive, default=5_000)
    garments.add_argument("--val-queries", type=int, default=1_000, help="number of val queries, and of test queries; 0 for none")
    garments.add_argument("--image-size", type=positive, default=96, help="side of the square images in pixels")
    garments.add_argument("--seed", type=int, default=0)


def _add_tinted(commands: Commands) -> None:
    tinted = commands.add_parser(
        "tinted",
        help="real product photos in several colours, from Fashion-MNIST's overview picture",
        description="900 product photos, each in several colours; triplets change the colour or the category.",
        epilog="The picture is doc/img/fashion-mnist-sprite.png of github.com/zalandoresearch/fashion-mnist.",
    )
    tinted.add_argument("out", type=Path, metavar="DIR")
    tinted.add_argument(
        "--sprite",
        type=Path,
        required=True,
        metavar="FILE",
        help="Fashion-MNIST's picture of all its images, fashion-mnist-sprite.png of its repository",
    )
    tinted.add_argument("--train-triplets", type=int, default=4_000)
    tinted.add_argument("--val-queries", type=int, default=300, help="number of val queries, and of test queries")
    tinted.add_argument("--gallery-products", type=positive, default=20, help="of the 90 of each category, kept out of training")
    tinted.add_argument("--colours-each", type=positive, default=3, help="colours, and so images, of a product")
    tinted.add_argument("--seed", type=int, default=0)


def _add_encode(commands: Commands) -> None:
    encode = commands.add_parser(
        "encode",
        help="query embeddings and gallery tokens of a training set, for dqe-mine",
        description="Encode a training set with a checkpoint: what dqe-mine reads.",
        epilog=_ENCODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encode.add_argument("model", type=Path, help="a checkpoint directory (dqe-train)")
    add_source_options(encode)
    encode.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the result")
    encode.add_argument("--features", type=Path, metavar="CACHE", help="feature cache to take image tokens from; filled with what it lacks")
    encode.add_argument("--storage", choices=("f32", "f16"), default="f32", help="precision of gallery.npy (default: f32)")
    encode.add_argument("--force", action="store_true", help="replace OUT when it exists")


def _add_check(commands: Commands) -> None:
    check = commands.add_parser(
        "check",
        help="count what a dataset folder holds and lacks",
        description="Triplets and galleries per split and category, blank captions, images that are missing or damaged (empty, cut short, "
        "a web page). Exit code 1: some are.",
        epilog="example: dqe-data check data/fashioniq --images data/fashioniq/images --missing-list missing.txt",
    )
    check.add_argument("data", type=Path, metavar="DIR", help="dataset folder, or a folder of such folders")
    check.add_argument("--dataset", default="auto", metavar="NAME", help=DATASET_HELP)
    check.add_argument("--images", type=Path, metavar="DIR", help="where its images are, if not where the authors put them")
    check.add_argument("--missing-list", type=Path, metavar="FILE", help="write the ids of all missing images, one a line")
    check.add_argument("--damaged-list", type=Path, metavar="FILE", help="write the paths of all damaged images, one a line")
    check.add_argument(
        "--decode", action="store_true", help="decode every image, which finds damage in its middle, too (default: its header and its end)"
    )


def _add_submission(commands: Commands) -> None:
    submission = commands.add_parser(
        "check-submission",
        help="check a file for the CIRR or CIRCO server by the server's rules",
        description="Query counts, names per query, duplicates, unknown images, references in their own list, size.",
    )
    submission.add_argument("file", type=Path, metavar="FILE")
    submission.add_argument("--data", type=Path, required=True, metavar="DIR", help="CIRR's or CIRCO's folder")
    submission.add_argument("--dataset", default="auto", metavar="NAME", help="which dataset it is: auto (default), cirr or circo")
    submission.add_argument("--split", metavar="SPLIT", help="split that the file answers (default: test1 of CIRR, test of CIRCO)")


def _add_features(commands: Commands) -> None:
    features = commands.add_parser(
        "features",
        help="fill a feature cache: image tokens of a frozen vision tower",
        description="Encode a folder's images once, for dqe-train, dqe-eval and dqe-data encode --features CACHE. Resumable.",
        epilog="example: dqe-data features --backbone Salesforce/blip2-itm-vit-g --images cirr/images --out features",
    )
    features.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values of the configuration, as for dqe-train; only with --backbone"
    )
    tower = features.add_mutually_exclusive_group(required=True)
    tower.add_argument("--model", type=Path, metavar="DIR", help="the vision tower of a checkpoint (dqe-train)")
    tower.add_argument("--backbone", metavar="NAME|DIR", help="the vision tower of a BLIP-2 checkpoint, on the hub or in a directory")
    features.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, walked recursively")
    features.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the cache; may hold several towers' features")
    features.add_argument("--verify", action="store_true", help="also read everything that is there against its checksums")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dqe-data", description="Datasets for training, evaluation and mining.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_garments, _add_tinted, _add_encode, _add_check, _add_submission, _add_features):
        add(commands)
    return parser


def _features(args: argparse.Namespace) -> int:
    if args.model is not None and args.overrides:
        raise InputError(f"{args.overrides[0]}: a checkpoint's configuration is fixed; overrides go with --backbone")
    from dqe_engine.image_sources import find_images

    found = find_images(args.images)
    names, passed_over = [name for name, _ in found.pairs], found.describe_passed_over()
    if not names:
        raise InputError(f"{args.images}: holds no images ({passed_over or 'it is empty'})")
    if passed_over:
        print(f"{args.images}: {passed_over}")
    from ..features import FeatureStore, fill
    from ..features.identity import digest_images
    from ..run.workflow import load_tower
    from .progress import TrainingProgress

    model = load_tower(args.model, backbone=args.backbone, overrides=args.overrides)
    store = FeatureStore(args.out, model)
    with TrainingProgress() as listener:
        fill(store, model, args.images, names, digest_images(args.images, names), listener=listener)
        if args.verify:
            store.verify()
    print(f"{store.directory}: {store.describe(len(store))}")
    return 0


def _garments(args: argparse.Namespace) -> int:
    from ..data.garments.dataset import GarmentsSpec, write_garments
    from .progress import simple_progress

    try:
        spec = GarmentsSpec(
            train_images=args.train_images, train_triplets=args.train_triplets, gallery_images=args.gallery_images,
            val_queries=args.val_queries, image_size=args.image_size, seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    with simple_progress() as progress:
        task = progress.add_task("drawing garments", total=spec.train_images + spec.gallery_images)
        write_garments(args.out, spec, advance=lambda n: progress.advance(task, n))
    print(args.out)
    return 0


def _tinted(args: argparse.Namespace) -> int:
    from ..data.tinted import TintedSpec, write_tinted

    try:
        spec = TintedSpec(
            train_triplets=args.train_triplets, val_queries=args.val_queries, gallery_products=args.gallery_products,
            colours_each=args.colours_each, seed=args.seed,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    write_tinted(args.out, args.sprite, spec)
    print(args.out)
    return 0


def _encode(args: argparse.Namespace) -> int:
    check_source_options(args)
    from ..checkpointing.checkpoint import load_checkpoint
    from ..mining_inputs import write_mining_inputs
    from .progress import TrainingProgress
    from .sources import open_source

    source = open_source(args)
    checkpoint = load_checkpoint(args.model)
    with TrainingProgress() as listener:
        write_mining_inputs(checkpoint, source, args.out, storage=args.storage, force=args.force, features=args.features, listener=listener)
    print(args.out)
    return 0


def _check(args: argparse.Namespace) -> int:
    from dqe_engine.files import atomic_write, describe_write_error

    from ..data.public.check import check_dataset, describe
    from ..data.public.detect import find_benchmarks
    from .progress import simple_progress

    found = find_benchmarks(args.data, args.dataset)
    if args.images is not None and len(found) > 1:
        raise InputError(f"{args.data}: --images is for one dataset, here are {', '.join(b.name for b in found)}; check them one by one")
    with simple_progress() as progress:

        def check(benchmark: Benchmark) -> DatasetCheck:
            task = progress.add_task(f"images of {benchmark.name}", total=None)
            return check_dataset(
                benchmark, args.images, decode=args.decode, progress=lambda done, total: progress.update(task, completed=done, total=total)
            )

        checks = [check(benchmark) for benchmark in found]
    missing = sorted({id for check in checks for id in check.missing})
    damaged = [str(path) for check in checks for path in check.damaged_files]
    print("\n\n".join("\n".join(describe(check)) for check in checks))
    for option, path, lines in (("--missing-list", args.missing_list, missing), ("--damaged-list", args.damaged_list, damaged)):
        if path is None:
            continue
        if unknown := [check.benchmark.directory for check in checks if check.images is None]:
            raise InputError(f"{option}: no images found for {unknown[0]}; say where they are with --images DIR")
        try:
            with atomic_write(path, "w") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise InputError(describe_write_error(error, path)) from error
    return 1 if missing or damaged else 0


def _check_submission(args: argparse.Namespace) -> int:
    from ..evaluation.submission import check_file, open_for_submission

    benchmark = open_for_submission(args.data, args.dataset)
    print(check_file(args.file, benchmark, args.split))
    return 0


_HANDLERS = {
    "garments": _garments,
    "tinted": _tinted,
    "encode": _encode,
    "check": _check,
    "check-submission": _check_submission,
    "features": _features,
}


def _run(args: argparse.Namespace) -> int:
    return _HANDLERS[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _run(build_parser().parse_args(argv)))
