"""Times the Δ-score zone kernels beside the libraries: `python -m benchmarks.bench_zones` from the repository root."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dqe_engine import _kernels

from . import machine, report, sections
from .harness import AnswerMismatchError, Contender
from .targets import Target, targets_table
from .zones import plots, summary
from .zones.cases import MaxSimCase, ScalingCase, TopKCase
from .zones.refresh import RefreshCase
from .zones.sections import SECTIONS, Bench, Sizes
from .zones.targets import targets
from .zones.vectors import VectorSpec

_PACKAGES = ("dqe-engine", "torch", "faiss-cpu", "usearch", "threadpoolctl")
_ROOT = Path(__file__).parent.parent


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(stderr=True)
    if (load := sections.busy()) is not None:
        console.print(f"The machine is busy ({load:.0%} of its processors are taken): times will be too long.", style="yellow")
    try:
        results, verdicts = _run(options, console)
    except AnswerMismatchError as error:
        print(f"bench_zones: wrong answer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bench_zones: interrupted; sections that were finished are in {options.out}", file=sys.stderr)
        return 130
    print(targets_table(verdicts))
    print(f"\n{summary.how_checked()}\n" + "\n".join(str(path) for path in results))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="bench_zones", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="a section to run (repeatable); default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing of worth")
    parser.add_argument(
        "--short", action="store_true", help="full sizes, few rounds, interleaved only, random vectors: minutes; to zones-short.json"
    )
    parser.add_argument("--full", action="store_true", help="refresh: run ours on all queries (minutes), not on a slice")
    parser.add_argument("--no-alone", action="store_true", help="do not time contenders in processes of their own as well")
    parser.add_argument("--contenders", metavar="NAME;…", help="only these, separated by semicolons; see --list")
    parser.add_argument("--list", action="store_true", help="print the contenders and whether they are installed")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of every contender (default: all cores, %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for results (default: benchmarks/results/<machine>, with --quick build/…)")
    options = parser.parse_args(arguments)
    known = _contenders()
    if options.list:
        print("\n".join(f"{c.name}: {'installed' if c.installed else 'not installed'}" for c in known.values()))
        parser.exit()
    options.names = [name.strip() for name in options.contenders.split(";")] if options.contenders is not None else None
    for name in options.names or ():
        if name not in known:
            parser.error(f"--contenders: no {name!r}; there are {'; '.join(known)}")
        if not known[name].installed:
            parser.error(f"--contenders: {name} needs the package {known[name].package}, which is not installed")
    if not 1 <= options.threads <= machine.cores():
        parser.error(f"--threads {options.threads}: expected 1 to {machine.cores()}, the cores of this machine")
    if options.out is None:
        options.out = (_ROOT / "build" / "benchmarks" if options.quick else Path(__file__).parent / "results") / machine.slug()
    return options


def _contenders() -> dict[str, Contender]:
    spec = VectorSpec("random", 1, 1)
    cases = [case(spec, batch, 1) for case in (TopKCase, MaxSimCase, ScalingCase) for batch in (1, 64)]
    return {c.name: c for case in (*cases, RefreshCase(spec, 1)) for c in case.contenders()}


def _run(options: argparse.Namespace, console: Console) -> tuple[list[Path], list[Target]]:
    """Run the sections, each written as soon as it is done; returns what was written and the targets of this run."""
    path = options.out / ("zones-short.json" if options.short else "zones.json")
    results = report.load(path, "zones")
    names: list[str] = options.only or list(SECTIONS)
    with Progress(
        BarColumn(20), TextColumn("{task.fields[place]}"), TimeElapsedColumn(), TextColumn("{task.description}"), console=console
    ) as progress:
        task = progress.add_task("", place="", total=len(names))
        for number, name in enumerate(names, 1):
            progress.update(task, place=f"{name} ({number} of {len(names)})", completed=number - 1)
            bench = Bench(
                sizes=Sizes.quick() if options.quick else Sizes.short() if options.short else Sizes(),
                threads=options.threads,
                alone=not (options.no_alone or options.quick or options.short),
                full=options.full,
                wanted=_wanted(options.names),
                step=lambda text: progress.update(task, description=escape(text)),
                reached=partial(_reached, progress, task, number - 1),
            )
            results["sections"][name] = _section(name, bench, options.quick)
            report.save_json(path, results | {"targets": [target.record() for target in targets(results["sections"])]})
        progress.update(task, completed=len(names))
    verdicts = targets(results["sections"])
    report.save_text(path.with_suffix(".md"), summary.markdown(results, verdicts))
    measured = targets({name: results["sections"][name] for name in names})
    drawn = [] if options.short else plots.draw(results["sections"], options.out)
    return [path, path.with_suffix(".md"), *drawn], measured


def _reached(progress: Progress, task: TaskID, before: int, share: float) -> None:
    progress.update(task, completed=before + share)


def _wanted(names: list[str] | None) -> Callable[[str], bool]:
    return lambda name: names is None or name in names


def _section(name: str, bench: Bench, quick: bool) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        measured = SECTIONS[name](bench)
        return {"instruction_sets": list(_kernels.instruction_sets()), "sizes": dataclasses.asdict(bench.sizes), **measured}

    return sections.recorded(measure, _PACKAGES, quick=quick, threads=bench.threads)


if __name__ == "__main__":
    sys.exit(main())
