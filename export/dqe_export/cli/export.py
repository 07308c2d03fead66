"""dqe-export: a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_training.cli.runner import run_torch

from .tensorrt_options import add_tensorrt_options, run_export


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-export",
        description="Export a checkpoint to ONNX, hold it against PyTorch, and write a bundle for the runtime.",
        epilog="example: dqe-export runs/garments/model bundle",
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="directory that dqe-train wrote (RUN/model)")
    parser.add_argument("out", type=Path, nargs="?", help="the bundle directory")
    parser.add_argument("--name", default="dqe", help="the bundle's name, for people")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    add_tensorrt_options(parser)
    return parser


def _export(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dqe_engine.errors import ExportError
    from dqe_training.checkpoint import load_checkpoint

    if args.out.exists() and not args.force:
        raise ExportError(f"{args.out}: exists already; choose another name, or replace it with --force")
    from ..bundle import export_bundle

    console = Console(stderr=True)
    with console.status("loading") as status:
        checkpoint = load_checkpoint(args.checkpoint)
        manifest = export_bundle(checkpoint, args.out, name=args.name, force=args.force, advance=status.update)
    for parity in manifest.parity:
        worst = max(parity.max_abs_error.values())
        print(f"{parity.graph:16} max abs difference from PyTorch {worst:.1e} (allowed {parity.tolerance:.0e})")
    print(f"{args.out}  {sum(f.size for f in manifest.files) / 1e6:.1f} MB")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_torch(lambda: run_export(args, _export))
