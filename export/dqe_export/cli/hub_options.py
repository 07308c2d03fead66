"""The hub's part of `dqe-export`: its options, and what it does with a bundle that is there."""

from __future__ import annotations

import argparse


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hugging Face hub", "publish the bundle, to be loaded as hf://OWNER/NAME (docs/hub.md)")
    group.add_argument(
        "--push", metavar="OWNER/NAME", help="publish the exported bundle, or that of --bundle: one commit with its files and a model card"
    )
    group.add_argument("--private", action="store_true", help="with --push: if the repository is missing, make it private")


def check_hub_options(args: argparse.Namespace) -> None:
    """What would stop the push is told before an export of minutes. Raises InputError, and what `check_push` does."""
    from dqe_engine.errors import InputError

    if args.push is None:
        if args.private:
            raise InputError("--private goes with --push OWNER/NAME")
        return
    if args.heads_only or args.dry_run:
        other = "--heads-only" if args.heads_only else "--dry-run"
        raise InputError(
            f"--push publishes a whole bundle, {other} makes none; run it by itself: dqe-export --push {args.push} --bundle BUNDLE"
        )
    exporting = (args.checkpoint, args.precision, args.target, args.data, args.force or None)
    if args.bundle is not None and not args.trt and any(option is not None for option in exporting):
        raise InputError(f"--push --bundle {args.bundle} publishes it as it is; leave the checkpoint and the options of an export out")
    from ..hub import check_push

    check_push(args.push)


def push(args: argparse.Namespace) -> int:
    """Publish what was exported, or the bundle that was named."""
    from ..hub import push_bundle

    print(push_bundle(args.bundle or args.out, args.push, private=args.private).describe())
    return 0
