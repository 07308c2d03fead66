"""dqe-demo: the whole way from nothing to a page of retrieved images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dqe_engine.cli.main import positive
from dqe_training.cli.runner import run_torch

if TYPE_CHECKING:
    from ..demo.report_data import Agreement

LEAST_AGREEMENT = 0.995  # share of queries with the same top 10 in the same order
MOST_DIFFERENCE = 1e-4  # of any element of a query or target embedding


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-demo",
        description="Draw the garments dataset, train DQE-CIR and a baseline for the same time, export to ONNX, index, search, evaluate, "
        "and write report.html and metrics.json. Run again to resume after an interruption.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (default: demo)")
    parser.add_argument("--long", action="store_true", help="train longer on more triplets (up to 40 minutes on two cores)")
    parser.add_argument("--from-scratch", action="store_true", help="train the vision tower too, instead of the one that ships")
    parser.add_argument("--seeds", type=positive, default=1, help="train each model this often and average (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the training configuration")
    return parser


def _demo(args: argparse.Namespace) -> int:
    import msgspec
    from rich.console import Console

    from dqe_engine.contracts.parsing import to_json
    from dqe_engine.files import atomic_write
    from dqe_training.cli.progress import TrainingProgress

    from ..demo.collect import collect, metrics
    from ..demo.picture import write_picture
    from ..demo.pipeline import LONG, SHORT, run_demo
    from ..demo.report import render_report

    console = Console(stderr=True)
    options = msgspec.structs.replace(
        LONG if args.long else SHORT, from_scratch=args.from_scratch, seeds=args.seeds, overrides=tuple(args.overrides)
    )
    command = " ".join(["dqe-demo", *(["--long"] if args.long else []), *(["--from-scratch"] if args.from_scratch else []),
                        *([f"--seeds {args.seeds}"] if args.seeds > 1 else []), *args.overrides])  # fmt: skip
    demo = run_demo(
        args.out, options, listener=lambda label: TrainingProgress(label, console=console), announce=lambda s: console.print(f"[bold]{s}")
    )
    data = collect(demo, command=command)
    with atomic_write(args.out / "metrics.json") as stream:
        stream.write(to_json(metrics(data)))
    render_report(data, args.out / "report.html")
    write_picture(data, args.out / "picture.jpg")
    for name, model in zip(("DQE-CIR", "baseline"), data.models, strict=True):
        recall = sum(r.recall_at_10 for r in model.reports) / len(model.reports)
        print(f"{name:10} R@10 {recall:.1%}, {model.steps} steps in {model.training_seconds:.0f} s")
    print(args.out / "report.html")
    return _judge(data.agreement)


def _judge(agreement: Agreement | None) -> int:
    """1 where the runtime is not the model that was trained; the page is there to look into it."""
    if (
        agreement is not None
        and agreement.runtime_top10_agreement >= LEAST_AGREEMENT
        and agreement.embedding_max_abs_diff <= MOST_DIFFERENCE
    ):
        return 0
    print(
        f"error: runtime and PyTorch disagree, {agreement}; expected at least {LEAST_AGREEMENT:.1%} equal top tens "
        f"and embeddings within {MOST_DIFFERENCE:.0e}",
        file=sys.stderr,
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_torch(lambda: _demo(build_parser().parse_args(argv)))
