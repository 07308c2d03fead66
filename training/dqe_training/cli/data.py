"""dqe-data: make the procedural dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.cli.main import positive, run
from dqe_engine.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dqe-data", description="Datasets for training and evaluation.")
    commands = parser.add_subparsers(dest="command", required=True)
    garments = commands.add_parser("garments", help="draw the procedural garments dataset")
    garments.add_argument("out", type=Path, metavar="DIR")
    garments.add_argument("--train-images", type=positive, default=12_000)
    garments.add_argument("--train-triplets", type=int, default=48_000, help="0 for images and labels alone")
    garments.add_argument("--gallery-images", type=positive, default=5_000)
    garments.add_argument("--val-queries", type=int, default=1_000, help="0 for images and labels alone")
    garments.add_argument("--image-size", type=positive, default=96, help="pixels")
    garments.add_argument("--seed", type=int, default=0)
    return parser


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


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run(lambda: _garments(args))
