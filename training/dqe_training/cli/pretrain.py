"""dqe-pretrain: a small vision tower from attribute labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.cli.main import run
from dqe_engine.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-pretrain",
        description="Train a small vision tower on a dataset folder's attribute labels, for use as vision_weights.",
        epilog="example: dqe-pretrain data/garments-pretrain --out runs/vision --epochs 4",
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="dataset folder with images/, images.jsonl and vocabulary.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="vision.safetensors and vision.json go here")
    parser.add_argument("--config", default="garments", metavar="PRESET|FILE", help="where the tower's size comes from")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace --out when it exists")
    return parser


def _pretrain(args: argparse.Namespace) -> int:
    import numpy as np

    from ..config import load_config
    from ..data.images import load_pixels
    from ..data.records import ImageRecord, read_jsonl
    from ..data.triplets import label_images
    from ..pretrain import PretrainConfig, pretrain, save_vision
    from ..workflow import DataSource
    from .progress import simple_progress

    if args.out.exists() and not args.force:
        raise InputError(f"{args.out}: exists already; choose another folder, or replace it with --force")
    model = load_config(args.config).model
    vocabulary = DataSource(args.data, args.data, vocabulary=args.data / "vocabulary.json").read_vocabulary()
    records = read_jsonl(args.data / "images.jsonl", ImageRecord)
    labels = label_images(records, vocabulary)
    held_back = np.asarray([r.image.startswith("gallery/") for r in records])
    config = PretrainConfig(epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed)
    with simple_progress() as progress:
        task = progress.add_task("loading images", total=len(records))
        pixels = load_pixels(
            args.data / "images", [r.image for r in records], model.preprocessing, advance=lambda n: progress.advance(task, n)
        )
        bar = progress.add_task("pretraining", total=None)
        _, figures = save_vision(
            args.out,
            pretrain(
                pixels[~held_back],
                labels[~held_back],
                model,
                vocabulary,
                config,
                on_step=lambda m: progress.update(
                    bar, completed=m["step"], total=m["steps"], description=f"loss {m['loss']:.3f}, {m['images_per_second']:.0f} images/s"
                ),
                validation=(pixels[held_back], labels[held_back]) if held_back.any() else None,
            ),
            model,
            config,
            images=int((~held_back).sum()),
            replace=args.force,
        )
    for name, value in figures.items():
        print(f"{name:12} {value:.4f}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run(lambda: _pretrain(args))
