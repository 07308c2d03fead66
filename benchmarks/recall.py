"""What each precision, storage and approximation keeps of the model's answers, and what it costs: `python -m benchmarks.recall`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .retrieval.sections import Bench

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("dqe-engine", "torch", "onnxruntime", "faiss-cpu")
_SECTIONS = {
    "precision": "PyTorch float32, and bundles in float32, float16 and int8",
    "storage": "the index as float32, float16, screened; FAISS flat, SQ8, HNSW and IVF-PQ over the same embeddings",
    "pareto": "recall against latency among 200,000 and 1,000,000 items",
    "public": "FashionIQ, CIRR and CIRCO by their own protocols, where their folders are given",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.list:
        print("\n".join(f"{name}: {what}" for name, what in _SECTIONS.items()))
        return 0
    from dqe_engine.cli.main import run

    return run(lambda: _run(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="recall", description=__doc__)
    demo = _ROOT / "demo"
    parser.add_argument("--bundle", type=Path, default=demo / "bundle", metavar="DIR", help="default: the demo's")
    parser.add_argument("--checkpoint", type=Path, default=demo / "runs" / "dqe-0" / "model", metavar="DIR", help="what the bundle is of")
    parser.add_argument("--data", type=Path, default=demo / "garments", metavar="DIR", help="a dataset folder with val.jsonl")
    for name in ("fashioniq", "cirr", "circo"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="annotations and images, for the section `public`")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing of worth")
    parser.add_argument("--full", action="store_true", help="also build graphs over a million items, which takes minutes")
    parser.add_argument("--only", action="append", choices=list(_SECTIONS), help="a section to run (repeatable); default: all")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results (default: benchmarks/results/<machine>, with --quick build/…)"
    )
    parser.add_argument("--list", action="store_true", help="print the sections")
    options = parser.parse_args(arguments)
    if options.quick and options.full:
        parser.error("--quick and --full exclude one another; choose one")
    return options


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from . import machine
    from .harness import AnswerMismatchError
    from .retrieval.sections import Bench, Sizes
    from .retrieval.setting import open_setting
    from .sections import busy

    console = Console(stderr=True)
    if (load := busy()) is not None:
        console.print(f"The machine is busy ({load:.0%} of its processors are taken): times will be too long.", style="yellow")
    sizes = Sizes.quick() if options.quick else Sizes.full() if options.full else Sizes()
    out = options.out or (_ROOT / "build" / "benchmarks" if options.quick else Path(__file__).parent / "results") / machine.slug()
    public = {name: folder for name in ("fashioniq", "cirr", "circo") if (folder := getattr(options, name)) is not None}
    with console.status("loading") as status:

        def step(text: str) -> None:
            status.update(escape(text))

        setting = open_setting(
            options.bundle, options.checkpoint, options.data, _ROOT / "build" / "recall",
            queries=sizes.queries, items=sizes.items, exports=not options.quick, step=step,
        )  # fmt: skip
        try:
            paths = _measure(Bench(setting, sizes, public, step), options.only or list(_SECTIONS), out, quick=options.quick)
        except AnswerMismatchError as error:
            print(f"recall: wrong answer: {error}", file=sys.stderr)
            return 1
    print("\n".join(str(path) for path in paths))
    return 0


def _measure(bench: Bench, names: Sequence[str], out: Path, *, quick: bool) -> list[Path]:
    """Run the sections, each written as soon as it is done; prints their tables and returns what was written."""
    import dataclasses
    from functools import partial

    from . import report
    from .retrieval import plots, summary
    from .retrieval.sections import SECTIONS
    from .sections import measured

    path = out / "recall.json"

    def measure(name: str) -> dict[str, Any]:
        return {"sizes": dataclasses.asdict(bench.sizes), **SECTIONS[name](bench)}

    results = measured(path, "recall", {name: partial(measure, name) for name in names}, _PACKAGES, quick=quick)
    report.save_text(path.with_suffix(".md"), summary.markdown(results))
    print(summary.markdown({"sections": {name: results["sections"][name] for name in names}}, heading=False))
    return [path, path.with_suffix(".md"), *plots.draw(results["sections"], out)]


if __name__ == "__main__":
    sys.exit(main())
