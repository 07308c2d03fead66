"""dqe-train: a preset, a dataset, a run directory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dqe_engine.cli.main import positive

from .runner import run_torch
from .sources import add_source_options, check_source_options, open_source, read_config
from .splits import add_split_options, open_test, open_validation, print_figures, print_server_hint


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-train",
        description="Train DQE-CIR. Run the same command again to resume after an interruption. Under torchrun, all its processes train "
        "one model together: torchrun --nproc-per-node 2 -m dqe_training.cli.train ...",
        epilog="example: dqe-train --config garments --data data/garments --out runs/garments optim.epochs=5 loss.rank_weight=0.2; or, "
        "from a model of ours: dqe-train --triplets mine.jsonl --images photos --vocabulary mine.json --out runs/mine "
        "start=runs/garments/model finetune=attributes",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values of the configuration to change")
    parser.add_argument(
        "--config", metavar="PRESET|FILE", help="preset or YAML file (default: chosen by the data; start with start=, blip2 with backbone=)"
    )
    add_source_options(parser)
    parser.add_argument("--image-labels", type=Path, metavar="FILE", help='with --triplets: JSON lines {"image", "attributes"}')
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="attribute vocabulary, JSON (default: that of a folder of JSON lines, else the start's, else FashionIQ's and CIRR's own, else "
        "colour and shape)",
    )
    parser.add_argument(
        "--no-derived-labels",
        action="store_true",
        help="do not read value labels of targets from the texts; the rules for it were measured on FashionIQ only (docs/attributes.md)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory: checkpoints, metrics.jsonl, model/, best/")
    parser.add_argument("--features", type=Path, metavar="CACHE", help="feature cache of the frozen tower; missing images are added to it")
    add_split_options(parser)
    parser.add_argument("--strict", action="store_true", help="make it an error, not a note, if a part is turned on and would do nothing")
    parser.add_argument(
        "--rank-timeout",
        type=positive,
        default=1800,
        metavar="SECONDS",
        help="longest time that a rank waits for the others (default: 1800)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to RUN/tensorboard")
    return parser


def _train(args: argparse.Namespace) -> int:
    check_source_options(args)
    config = read_config(args)
    from ..checkpointing.start import start_vocabulary
    from ..distributed import joined_world  # imports torch: a mistake above is told before that
    from ..run.trainer import finish_run
    from ..run.workflow import train_run
    from .progress import TrainingProgress
    from .tensorboard import with_tensorboard

    default_vocabulary = start_vocabulary(config)
    with joined_world(timeout=args.rank_timeout) as world:
        source, validation, test = open_source(args, default_vocabulary), open_validation(args), open_test(args)
        with TrainingProgress(shown=world.main) as progress:
            listener = with_tensorboard(progress, args.out / "tensorboard") if args.tensorboard and world.main else progress
            train_run(
                config, source, args.out, listener=listener, features=args.features, validation=validation, strict=args.strict, world=world
            )
    if world.main:
        finish_run(args.out, args.out / "model", replace=True)
        print_figures(args.out, test, args.features)
        print_server_hint(args)
        print(args.out / "model")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _train(build_parser().parse_intermixed_args(argv)))  # options between overrides, too


if __name__ == "__main__":
    raise SystemExit(main())
