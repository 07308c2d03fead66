"""The part of `dqe-export` for attribute heads alone: its options, and what it does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dqe_engine.contracts.manifest import Precision


def add_heads_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attribute heads", "trained on a bundle's own encoder: dqe-train start=… finetune=attributes")
    group.add_argument(
        "--heads-only", action="store_true", help="export only the attribute heads, for dqe-heads; with --bundle, put them into that bundle"
    )
    group.add_argument("--new-vocabulary", action="store_true", help="allow heads with other attributes than the bundle has")


def check_heads_options(args: argparse.Namespace) -> None:
    """Raises InputError for arguments that do not go together."""
    from dqe_engine.errors import InputError

    if not args.heads_only:
        if args.new_vocabulary:
            raise InputError("--new-vocabulary goes with --heads-only --bundle")
        return
    if args.checkpoint is None or (args.out is None) == (args.bundle is None):
        raise InputError("--heads-only takes a checkpoint, and either a folder to write or --bundle BUNDLE to replace the heads of")
    if args.trt or args.dry_run:
        raise InputError("--heads-only builds no engines; replace the heads first, then: dqe-export --trt --bundle BUNDLE --force")
    if args.bundle is None and (args.new_vocabulary or (args.data is not None and args.precision != "int8-static")):
        raise InputError("--data and --new-vocabulary need a bundle to put the heads into; add --bundle BUNDLE")
    if args.bundle is not None and args.precision is not None:
        raise InputError("--precision is the bundle's, where heads are put into one; leave it out")
    if args.precision == "auto":
        raise InputError("--precision auto chooses for whole bundles; name the precision of the bundle that will take the heads")


def export_heads_only(args: argparse.Namespace, precision: Precision) -> int:
    from rich.console import Console

    from dqe_engine.errors import ExportError
    from dqe_training.checkpointing.checkpoint import load_checkpoint

    if args.out is not None and args.out.exists() and not args.force:
        raise ExportError(f"{args.out}: exists already; choose another name, or replace it with --force")
    from ..bundle import ExportOptions
    from ..calibration import EvaluationData
    from ..heads import export_heads, export_heads_into

    data = EvaluationData.open(args.data) if args.data is not None else None
    options = ExportOptions(name=args.name, precision=precision, data=data)
    with Console(stderr=True).status("loading") as status:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.bundle is not None:
            manifest = export_heads_into(checkpoint, args.bundle, options, new_vocabulary=args.new_vocabulary, advance=status.update)
        else:
            heads = export_heads(checkpoint, args.out, options, force=args.force, advance=status.update)
    if args.bundle is None:
        print(f"{args.out}  {', '.join(heads.vocabulary.names)}; {heads.precision}, {sum(f.size for f in heads.files) / 1e6:.2f} MB, "
              f"for the encoder {heads.encoder_hash[:12]}")  # fmt: skip
        return 0
    if (found := manifest.retrieval) is not None:
        print(f"recall@10 {100 * found.bundle_recall_at_10:.2f} % ({found.difference:+.2f} points against PyTorch)")
    print(f"{args.bundle}  {', '.join(manifest.vocabulary.names)}; the encoder and indexes made with it stay as they are")
    return 0
