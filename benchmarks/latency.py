"""End-to-end latency of the engine, by stage, beside what people use today: `python -m benchmarks.latency` after `make demo`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dqe_engine.cli.main import positive, run

from . import machine
from .harness import AnswerMismatchError

if TYPE_CHECKING:
    from rich.console import Console

    from .serving.sections import Sizes
    from .serving.setting import Setting
    from .targets import Target

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("dqe-engine", "onnxruntime", "torch", "transformers", "faiss-cpu", "tokenizers", "pillow", "threadpoolctl")
SECTIONS = ("query", "stages", "throughput", "gallery", "cold", "model-size")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="latency", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"), metavar="DIR", help="float32 bundle (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("demo/runs/dqe-0/model"), metavar="DIR",
        help="the checkpoint that it was exported from, for PyTorch and int8 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo/garments"),
        metavar="DIR",
        help="dataset folder with gallery and queries (default: %(default)s)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="small sizes, under three minutes: shows that it runs, measures nothing of worth"
    )
    size.add_argument("--full", action="store_true", help="more batches, sizes and rounds: half an hour")
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}; repeatable (default: all)"
    )
    parser.add_argument("--contenders", metavar="NAME;…", help="of section query only these, separated by semicolons; see --list")
    parser.add_argument("--list", action="store_true", help="print sections and contenders, and which can run here")
    parser.add_argument("--threads", type=positive, default=machine.cores(), help="of every contender (default: all cores, %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results (default: benchmarks/results/<machine>, with --quick build/…)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.threads > machine.cores():
        parser.error(f"--threads {options.threads}: expected 1 to {machine.cores()}, the cores of this machine")
    if options.out is None:
        options.out = (_ROOT / "build" / "benchmarks" if options.quick else Path(__file__).parent / "results") / machine.slug()
    try:
        return run(partial(_list if options.list else _measure, options))
    except AnswerMismatchError as error:
        print(f"error: wrong answer: {error}", file=sys.stderr)
        return 1


def _list(options: argparse.Namespace) -> int:
    from .serving.cases import known_contenders

    print("sections: " + ", ".join(SECTIONS))
    print("\n".join(f"{c.name}: {c.obstacle() or 'can run'}" for c in known_contenders()))
    return 0


def _measure(options: argparse.Namespace) -> int:
    from rich.console import Console

    from dqe_engine.errors import InputError

    from .sections import busy
    from .serving.cases import known_contenders
    from .serving.sections import Sizes
    from .targets import targets_table

    names = None if options.contenders is None else [name.strip() for name in options.contenders.split(";")]
    known = {c.name: c for c in known_contenders()}
    for name in names or ():
        if name not in known:
            raise InputError(f"--contenders: no {name!r}; there are {'; '.join(known)}")
        if obstacle := known[name].obstacle():
            raise InputError(f"--contenders: {name} cannot run here ({obstacle}); leave it out")
    sizes = Sizes.quick() if options.quick else Sizes.full() if options.full else Sizes()
    console = Console(stderr=True)
    setting = _prepared(options, sizes, console)
    if (load := busy()) is not None:
        console.print(f"The machine is busy ({load:.0%} of its processors are taken): times will be too long.", style="yellow")
    paths, verdicts = _sections(options, setting, sizes, names, console)
    print(targets_table(verdicts))
    print("\n" + "\n".join(str(path) for path in paths))
    return 0


def _prepared(options: argparse.Namespace, sizes: Sizes, console: Console) -> Setting:
    """The setting, with everything on disk that is made once."""
    from .serving.setting import open_setting, prepare

    work = _ROOT / "build" / "latency"
    setting = open_setting(
        options.bundle, options.checkpoint, options.data, work, items=sizes.items, pool=sizes.pool, threads=options.threads
    )  # fmt: skip
    with console.status("preparing") as status:
        return prepare(setting, lambda text: status.update(f"preparing: {text}"))


def _sections(
    options: argparse.Namespace, setting: Setting, sizes: Sizes, names: list[str] | None, console: Console
) -> tuple[list[Path], list[Target]]:
    """Run the sections, each written as soon as it is done; what was written, and the targets of this run."""
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from . import report
    from .sections import recorded
    from .serving import plots, summary
    from .serving import sections as serving
    from .serving.targets import targets

    path = options.out / "latency.json"
    results = report.load(path, "latency")
    chosen: list[str] = options.only or list(SECTIONS)
    columns = (BarColumn(20), TextColumn("{task.fields[place]}"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", place="", total=len(chosen))
        for number, name in enumerate(chosen):
            progress.update(task, place=f"{name} ({number + 1} of {len(chosen)})", completed=number)
            bench = serving.Bench(
                setting,
                sizes,
                wanted=lambda contender: names is None or contender in names,
                step=lambda text: progress.update(task, description=escape(text)),
                reached=lambda share, number=number: progress.update(task, completed=number + share),  # type: ignore[misc]
            )
            measured = recorded(partial(serving.SECTIONS[name], bench), _PACKAGES, quick=options.quick, threads=options.threads)
            results["sections"][name] = measured | {"sizes": dataclasses.asdict(sizes), "int8_missing": setting.int8_missing}
            results["sections"] = {name: results["sections"][name] for name in SECTIONS if name in results["sections"]}
            report.save_json(path, results | {"targets": [target.record() for target in targets(results["sections"])]})
        progress.update(task, completed=len(chosen))
    report.save_text(path.with_suffix(".md"), summary.markdown(results, targets(results["sections"])))
    drawn = plots.draw(results["sections"], options.out)
    return [path, path.with_suffix(".md"), *drawn], targets({name: results["sections"][name] for name in chosen})


if __name__ == "__main__":
    sys.exit(main())
