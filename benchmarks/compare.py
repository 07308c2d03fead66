"""Did it get slower, or worse? Two result files of one benchmark, or a pinned commit against the present tree.

python -m benchmarks.compare old/zones.json new/zones.json
python -m benchmarks.compare --pinned main~5 --only zones
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .comparison.files import Comparison

_ROOT = Path(__file__).parent.parent
_SECTIONS = ("zones", "search")
_LEAST_ROUNDS = 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    from dqe_engine.cli.main import run

    return run(lambda: _compare(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD", help="a result file, such as benchmarks/results/<machine>/zones.json")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="a later one of the same benchmark and machine")
    parser.add_argument("--across-machines", action="store_true", help="compare different machines' files; the output says so")
    parser.add_argument("--markdown", action="store_true", help="print the figures as a Markdown table")
    parser.add_argument("--fail-above", type=float, metavar="FACTOR", help="code 1 where a figure is beyond its band and so much worse")
    parser.add_argument("--pinned", metavar="COMMIT", help="build this commit beside the present tree and measure both in turns")
    parser.add_argument("--only", action="append", choices=_SECTIONS, help="with --pinned: a section (repeatable); default: both")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="with --pinned: turns of each version (default: %(default)s)")
    parser.add_argument("--demo", type=Path, default=_ROOT / "demo", metavar="DIR", help="with --pinned: what `make demo` left")
    options = parser.parse_args(arguments)
    if (options.pinned is None) == (options.new is None):
        parser.error("pass two result files, OLD and NEW, or --pinned COMMIT")
    if options.pinned is None and options.only:
        parser.error("--only chooses what --pinned measures; result files are compared whole")
    if options.rounds < _LEAST_ROUNDS:
        parser.error(f"--rounds {options.rounds}: expected {_LEAST_ROUNDS} or more; a band needs the variation between rounds")
    if options.fail_above is not None and not options.fail_above >= 1:
        parser.error(f"--fail-above {options.fail_above:g}: expected a factor of 1 or more, such as 1.1 for ten per cent")
    return options


def _compare(options: argparse.Namespace) -> int:
    from .comparison.files import rendered

    comparison = _pinned(options) if options.pinned is not None else _files(options)
    print(rendered(comparison, markdown=options.markdown))
    if options.fail_above is None:
        return 0
    regressed = [change for change in comparison.changes if change.regressed(options.fail_above)]
    for change in regressed:
        print(f"compare: worse by more than {options.fail_above:g}: {change.name} ({change.ratio:.3f} of the old value)", file=sys.stderr)
    return 1 if regressed else 0


def _files(options: argparse.Namespace) -> Comparison:
    from .comparison.files import compare_files

    return compare_files(options.old, options.new, across_machines=options.across_machines)


def _pinned(options: argparse.Namespace) -> Comparison:
    from rich.console import Console
    from rich.markup import escape

    from .comparison.versions import compare_versions

    console = Console(stderr=True)
    with console.status("starting") as status:
        return compare_versions(
            options.pinned, options.only or _SECTIONS, rounds=options.rounds, work=_ROOT / "build" / "pinned", demo=options.demo,
            step=lambda text: status.update(escape(text)),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
