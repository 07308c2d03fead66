"""dqe-import: a published file of weights to a checkpoint."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.cli.main import positive

from .runner import run_torch

if TYPE_CHECKING:
    from ..checkpointing.meta import CheckpointMeta
    from ..importing import ImportOptions, Plan

FORMATS = ("sprc", "spn4cir", "lavis", "qure", "transformers")
_EPILOG = """\
Nothing in the file is run, every tensor is used or left out for a reason that is printed, and the values are the file's.

examples:
  dqe-import sprc_cirr.pt runs/sprc
  dqe-import blip2_pretrained_vitL.pth runs/blip2 --tower clip_vit_L.pth
  dqe-import model.pth runs/qure --tokenizer bert/vocab.txt
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-import",
        description="Turn a published BLIP-2, SPRC, SPN4CIR or QuRe model into a checkpoint that dqe-export, dqe-eval and dqe-train take.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the file of weights, or a directory that transformers wrote")
    parser.add_argument("out", type=Path, help="the checkpoint directory")
    add_import_options(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT when it is a checkpoint")
    return parser


def add_import_options(parser: argparse._ActionsContainer) -> None:
    """How a file is read, for every command that takes one: see `import_options`."""
    parser.add_argument("--format", choices=FORMATS, help="the file's layout (default: known by its keys)")
    parser.add_argument(
        "--tower", type=Path, metavar="FILE", help="the vision tower, if the source has none: eva_vit_g.pth, clip_vit_L.pth"
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE|DIR|NAME",
        help="tokenizer.json, vocab.txt, or a name on the hub (default: the source's own, else google-bert/bert-base-uncased)",
    )  # fmt: skip
    parser.add_argument(
        "--vision-heads", type=positive, metavar="N", help="attention heads of a vision tower whose width no published model has"
    )
    parser.add_argument(
        "--qformer-heads", type=positive, metavar="N", help="attention heads of a Q-Former whose width no published model has"
    )


def import_options(args: argparse.Namespace) -> ImportOptions:
    """What `add_import_options` parsed."""
    from ..importing import ImportOptions

    return ImportOptions(
        layout=args.format or "", tower=args.tower, tokenizer=args.tokenizer, vision_heads=args.vision_heads,
        qformer_heads=args.qformer_heads,
    )  # fmt: skip


def _import(args: argparse.Namespace) -> int:
    from ..importing import import_model

    _print(*import_model(args.source, args.out, import_options(args), force=args.force), args.out)
    return 0


def _print(plan: Plan, meta: CheckpointMeta, out: Path) -> None:
    v, q = plan.model.vision, plan.model.qformer
    assert meta.imported is not None
    tower = "CLIP's, with a LayerNorm before the first block" if v.pre_norm else "EVA's"
    print(f"{plan.layout.title} (--format {plan.layout.name})")
    for file in meta.imported.files:
        print(f"  {file.name}: {file.size} bytes, SHA-256 {file.sha256}")
    print(f"  tower: {tower}, width {v.hidden_size}, {v.layers} blocks, {v.heads} heads, {plan.model.preprocessing.image_size} pixels")
    print(f"  Q-Former: width {q.hidden_size}, {q.layers} layers, {q.heads} heads, {q.query_tokens} query tokens of {q.embedding_dim}")
    print(f"  texts: up to {q.max_text_length} tokens, captions {plan.model.captions}; queries: {plan.model.base_query}")
    used = sum(len(move.sources) for move in plan.moves.made.values())
    print(f"  tensors: {used} used, {len(plan.unused)} left out")
    for reason, count in Counter(plan.unused.values()).items():
        print(f"    {count}: {reason}")
    print(f"  licence: {meta.imported.licence}")
    for sentence in meta.imported.deviations:
        print(f"  NOTE: {sentence}")
    print(f"next: dqe-export {out} BUNDLE")


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _import(build_parser().parse_args(argv)))
