"""dqe-data: make the procedural dataset; fill a feature cache; encode a training set for dqe-mine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.cli.main import positive
from dqe_engine.errors import InputError

from .runner import run_torch

_ENCODE_EPILOG = """\
OUT holds queries.npy, gallery.npy, targets.npy and exclude.npy (the references), as dqe-mine takes them, and images.json:
position i of the gallery is its i-th name. Then: dqe-mine OUT --out mined
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dqe-data", description="Datasets for training, evaluation and mining.")
    commands = parser.add_subparsers(dest="command", required=True)
    garments = commands.add_parser("garments", help="draw the procedural garments dataset")
    garments.add_argument("out", type=Path, metavar="DIR")
    garments.add_argument("--train-images", type=positive, default=12_000)
    garments.add_argument("--train-triplets", type=int, default=48_000, help="0 for images and labels alone")
    garments.add_argument("--gallery-images", type=positive, default=5_000)
    garments.add_argument("--val-queries", type=int, default=1_000, help="0 for images and labels alone")
    garments.add_argument("--image-size", type=positive, default=96, help="pixels")
    garments.add_argument("--seed", type=int, default=0)
    encode = commands.add_parser(
        "encode",
        help="query embeddings and gallery tokens of a training set, for dqe-mine",
        description="Encode a training set with a checkpoint: what dqe-mine reads.",
        epilog=_ENCODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    encode.add_argument("model", type=Path, help="a checkpoint directory (dqe-train)")
    encode.add_argument("--data", type=Path, metavar="DIR", help="dataset folder, as dqe-data garments writes it")
    encode.add_argument("--triplets", type=Path, metavar="FILE", help="own data, as dqe-train takes it")
    encode.add_argument("--images", type=Path, metavar="DIR", help="own data: folder that the image names are relative to")
    encode.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the result")
    encode.add_argument("--features", type=Path, metavar="CACHE", help="feature cache to take image tokens from; filled with what it lacks")
    encode.add_argument("--storage", choices=("f32", "f16"), default="f32", help="precision of gallery.npy (default: f32)")
    encode.add_argument("--force", action="store_true", help="replace OUT when it exists")
    features = commands.add_parser(
        "features",
        help="fill a feature cache: image tokens of a frozen vision tower",
        description="Encode a folder's images once, for dqe-train, dqe-eval and dqe-data encode --features CACHE. Resumable.",
        epilog="example: dqe-data features --backbone Salesforce/blip2-itm-vit-g --images cirr/images --out features",
    )
    features.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --backbone, as dqe-train takes them")
    tower = features.add_mutually_exclusive_group(required=True)
    tower.add_argument("--model", type=Path, metavar="DIR", help="the vision tower of a checkpoint (dqe-train)")
    tower.add_argument("--backbone", metavar="NAME|DIR", help="that of a BLIP-2 checkpoint, on the hub or in a directory")
    features.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, walked recursively")
    features.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the cache; may hold several towers' features")
    features.add_argument("--verify", action="store_true", help="also read everything that is there against its checksums")
    return parser


def _features(args: argparse.Namespace) -> int:
    if args.model is not None and args.overrides:
        raise InputError(f"{args.overrides[0]}: a checkpoint's configuration is fixed; overrides go with --backbone")
    from dqe_engine.image_sources import image_pairs

    names = [name for name, _ in image_pairs(args.images)]
    if not names:
        raise InputError(f"{args.images}: holds no images")
    from ..features import FeatureStore, fill
    from ..features.identity import digest_images
    from ..workflow import load_tower
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


def _encode(args: argparse.Namespace) -> int:
    if (args.data is None) == (args.triplets is None or args.images is None):
        raise InputError("give either --data DIR, or --triplets FILE with --images DIR")
    from ..checkpoint import load_checkpoint
    from ..mining_inputs import write_mining_inputs
    from ..workflow import DataSource
    from .progress import TrainingProgress

    source = DataSource(args.triplets, args.images) if args.data is None else DataSource.from_directory(args.data)
    checkpoint = load_checkpoint(args.model)
    with TrainingProgress() as listener:
        write_mining_inputs(checkpoint, source, args.out, storage=args.storage, force=args.force, features=args.features, listener=listener)
    print(args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    handlers = {"garments": _garments, "encode": _encode, "features": _features}
    return run_torch(lambda: handlers[args.command](args))
