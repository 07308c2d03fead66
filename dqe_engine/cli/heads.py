"""`dqe-heads`: give a bundle other attribute heads, without its encoder and without indexing again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .main import run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-heads",
        description="Replace a bundle's attribute heads by those that dqe-export --heads-only wrote; whole or not at all. They must have "
        "been trained on the bundle's own encoder. Indexes stay valid; what serves the bundle takes the new heads when it loads it again.",
    )
    parser.add_argument("bundle", type=Path, help="the exported model whose heads are replaced")
    parser.add_argument("heads", type=Path, help="the folder that dqe-export --heads-only wrote")
    parser.add_argument("--new-vocabulary", action="store_true", help="allow heads with other attributes than the bundle has")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _replace(build_parser().parse_args(argv)))


def _replace(args: argparse.Namespace) -> int:
    from dqe_engine.heads import replace_heads

    manifest = replace_heads(args.bundle, args.heads, new_vocabulary=args.new_vocabulary)
    print(f"{args.bundle}  {', '.join(manifest.vocabulary.names)}")
    return 0
