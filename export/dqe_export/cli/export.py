"""dqe-export: a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.contracts.manifest import PRECISIONS
from dqe_training.cli.runner import run_torch

from .export_choices import choices, resolve_target
from .heads_options import add_heads_options, check_heads_options, export_heads_only
from .hub_options import add_hub_options, check_hub_options, push
from .tensorrt_options import add_tensorrt_options, run_export

if TYPE_CHECKING:
    pass

_EPILOG = """\
int8 is for CPUs; int8-static, whose scales are read off the queries of --data, is for TensorRT. Both are judged by answers as well as by
embeddings where --data is given. --precision auto takes float16 for CUDA; for the CPU int8 where
--data shows that it keeps the recall (some hundreds of queries), else float32. With --trt, float16 is the default.

examples:
  dqe-export runs/garments/model bundle
  dqe-export runs/garments/model bundle-int8 --precision int8 --data data/garments
  dqe-export runs/my-attributes/model --heads-only --bundle bundle --new-vocabulary
  dqe-export --push OWNER/NAME --bundle bundle
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-export",
        description="Export a checkpoint to ONNX, hold it against PyTorch, and write a bundle for the runtime.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="directory that dqe-train wrote (RUN/model)")
    parser.add_argument("out", type=Path, nargs="?", help="the bundle directory to write")
    parser.add_argument("--name", default="dqe", help="a name for people, kept in the bundle (default: dqe)")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, "auto"), help="precision of weights and arithmetic (default: f32; f16 with --trt)"
    )
    parser.add_argument(
        "--target",
        choices=("cpu", "cuda"),
        help="processor that the graphs' form and --precision auto suit (default: cpu; cuda with --trt)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="dataset folder whose val queries PyTorch and the bundle must answer alike"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--bundle", type=Path, metavar="BUNDLE", help="an existing bundle: to build engines for, to publish, or to give new attribute heads"
    )
    add_heads_options(parser)
    add_tensorrt_options(parser)
    add_hub_options(parser)
    return parser


def _export(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dqe_engine.errors import ExportError, ParityError
    from dqe_training.checkpointing.checkpoint import load_checkpoint

    if args.out.exists() and not args.force:
        raise ExportError(f"{args.out}: exists already; choose another name, or replace it with --force")
    from ..bundle import ExportOptions, export_bundle
    from ..calibration import EvaluationData

    console = Console(stderr=True)
    data = EvaluationData.open(args.data) if args.data is not None else None
    with console.status("loading") as status:
        checkpoint = load_checkpoint(args.checkpoint)
        target = resolve_target(args)
        attempts = choices(args.precision, target, data, trt=args.trt)
        for precision, why in attempts:
            options = ExportOptions(
                name=args.name, precision=precision, target=target, why=why, data=data, shown=precision != attempts[-1][0]
            )
            try:
                manifest = export_bundle(checkpoint, args.out, options, force=args.force, advance=status.update)
                break
            except ParityError as error:
                if precision == attempts[-1][0]:
                    raise
                console.print(f"{precision}: {error}", style="yellow", markup=False, highlight=False)
    for parity in manifest.parity:
        worst, cosine = max(o.max_error for o in parity.outputs.values()), min(o.cosine_min for o in parity.outputs.values())
        print(f"{parity.graph:16} max error {worst:.1e}  min cosine {cosine:.6f} (allowed {manifest.tolerance.min_cosine})")
    if (found := manifest.retrieval) is not None:
        low, high = found.interval
        print(f"recall@10 {100 * found.bundle_recall_at_10:.2f} % ({found.difference:+.2f} points against PyTorch, "
              f"95 % interval {low:+.2f} to {high:+.2f}, allowed {-found.allowed:.1f}), "
              f"top 10 overlap {100 * found.top10_overlap:.1f} %")  # fmt: skip
    print(f"{args.out}  {manifest.precision}, {sum(f.size for f in manifest.files) / 1e6:.1f} MB{'. ' + why if why else ''}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    check_heads_options(args)
    check_hub_options(args)
    if args.heads_only:
        return export_heads_only(args, PRECISIONS[args.precision or "f32"])
    code = run_export(args, _export)
    return push(args) if code == 0 and args.push is not None else code
