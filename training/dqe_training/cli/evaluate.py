"""dqe-eval: one dataset's figures for a checkpoint (PyTorch) or a bundle (runtime)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.errors import InputError

from .runner import run_torch


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-eval",
        description="Recall, mAP and attribute precision over a dataset folder's validation queries.",
        epilog="example: dqe-eval runs/garments/model --data data/garments; dqe-eval bundle --data data/garments",
    )
    parser.add_argument("model", type=Path, help="a checkpoint directory (dqe-train) or a bundle (dqe-export)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="dataset folder with val.jsonl, images.jsonl and images/")
    parser.add_argument("--features", type=Path, metavar="CACHE", help="feature cache for a checkpoint; filled with what it lacks")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    from dqe_engine.contracts.manifest import MANIFEST_FILE

    from ..evaluation.protocol import load_evaluation_set
    from .progress import simple_progress

    if not args.model.is_dir():
        raise InputError(f"{args.model}: no such directory; expected a checkpoint (dqe-train) or a bundle (dqe-export)")
    evaluation = load_evaluation_set(args.data)
    images = args.data / "images"
    with simple_progress() as progress:
        gallery = progress.add_task("gallery", total=len(evaluation.gallery))
        queries = progress.add_task("queries", total=len(evaluation.records))
        if (args.model / MANIFEST_FILE).is_file():
            if args.features is not None:
                raise InputError("--features is for checkpoints; a bundle encodes the gallery with its own graphs")
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
                listener=lambda event: progress.console.print(event["text"]) if "text" in event else None,
            )
            report, _ = evaluate_model(
                checkpoint.model, checkpoint.tokenizer, evaluation, tokens, advance=lambda n: progress.advance(queries, n)
            )
    _print(report, as_json=args.json)
    return 0


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


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_torch(lambda: _evaluate(args))
