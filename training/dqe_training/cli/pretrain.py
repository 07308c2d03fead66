"""dqe-pretrain: a small vision tower from attribute labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.cli.main import positive
from dqe_engine.errors import InputError

from .runner import run_torch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-pretrain",
        description="Train a small vision tower on a dataset folder's attribute labels, for use as vision_weights.",
        epilog="example: dqe-pretrain data/garments-pretrain --out runs/vision --epochs 4",
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="dataset folder with images/, images.jsonl and vocabulary.json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for vision.safetensors and vision.json")
    parser.add_argument("--config", default="garments", metavar="PRESET|FILE", help="preset or YAML file with the tower's size")
    parser.add_argument("--epochs", type=positive, default=4)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace --out when it exists")
    return parser


def _pretrain(args: argparse.Namespace) -> int:
    from ..pretrain import PretrainConfig, pretrain_from_dataset
    from ..run.configuration import load_config
    from .progress import TrainingProgress

    if args.out.exists() and not args.force:
        raise InputError(f"{args.out}: exists already; choose another folder, or replace it with --force")
    model = load_config(args.config).model
    config = PretrainConfig(epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed)
    with TrainingProgress("pretraining", unit="images") as progress:
        figures = pretrain_from_dataset(args.data, args.out, model, config, listener=progress, replace=args.force)
    for name, value in figures.items():
        print(f"{name:12} {value:.4f}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _pretrain(build_parser().parse_args(argv)))
