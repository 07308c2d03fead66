"""dqe-reproduce: published weights to the published table."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dqe_engine.cli.long_work import interrupts_between_batches
from dqe_engine.cli.main import add_runtime_options, positive
from dqe_training.cli.import_ import add_import_options, import_options
from dqe_training.cli.progress import simple_progress
from dqe_training.cli.runner import run_torch
from dqe_training.data.public.wording import WORDINGS

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..reproduce import Wish

DATASETS = ("fashioniq", "cirr", "circo")
ROWS = ("pytorch", "f32", "int8")
_EPILOG = """\
Everything that is made is kept under --out, in folders named by what it is made of: the same command goes on where it stopped, and another
dataset takes the same model and bundles. docs/published-models.md says what the table holds.

examples:
  dqe-reproduce fashioniq --weights sprc_fiq_vitl.pt --images fashionIQ/images --annotations fashionIQ --check
  dqe-reproduce cirr --weights sprc_cirr_vitl.pt --images cirr --tokenizer bert/vocab.txt
  dqe-reproduce circo --weights runs/mine/model --images circo/unlabeled2017 --annotations circo --against reproduced/results/circo-...
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-reproduce",
        description="From weights to the table that papers print: import, export (float32 and int8), index, evaluate by protocol, PyTorch "
        "beside the runtime and the published row beside both; and the files for the test servers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="a published file (dqe-import --help), a checkpoint or "
                        "a bundle")  # fmt: skip
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the dataset's images, at any depth")
    parser.add_argument("--annotations", type=Path, metavar="DIR", help="folder of the annotations, laid out as docs/datasets.md shows "
                        "(default: --images, or the folder above it)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("reproduced"), metavar="DIR", help="folder for all results (default: reproduced)")
    parser.add_argument("--check", action="store_true", help="look at weights, annotations, images and the disk, and write nothing")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[], help="rows of the table to make (default: all that the weights can have)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="a quick trial, whose figures mean nothing: N queries a set over "
                        "part of the gallery")  # fmt: skip
    parser.add_argument(
        "--published", metavar="NAME", help="published row to compare with (default: that of the weights' layout and tower)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="results of an earlier run with other weights, to print paired differences to"
    )
    parser.add_argument("--no-submission", action="store_true", help="CIRR, CIRCO: leave the test split out, and its images")
    parser.add_argument("--shared-concept", action="store_true", help="CIRCO: put the shared concept before the relative caption")
    parser.add_argument("--wording", choices=tuple(WORDINGS), help="make the texts as these models' own code does; plain: as the dataset's "
                        "protocol does (default: that of the weights' layout)")  # fmt: skip
    parser.add_argument("--allow-missing", action="store_true", help="leave out images that are missing, and the queries that name them")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    add_import_options(parser.add_argument_group("published files"))
    add_runtime_options(parser)
    return parser


class Told:
    """Lines, a status and bars on stderr."""

    def __init__(self) -> None:
        self._bars = simple_progress()
        self._tasks: dict[str, TaskID] = {}
        self._stage = self._bars.add_task("starting", total=None, visible=True)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.remove_task(self._stage)
        self._bars.stop()

    def say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stage(self, text: str) -> None:
        from rich.markup import escape

        self._bars.update(self._stage, description=escape(text))

    def count(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, completed=done)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def interruptible(self) -> AbstractContextManager[Callable[[], None]]:  # between two blocks
        return interrupts_between_batches()


def _wish(args: argparse.Namespace, command: str) -> Wish:
    from ..reproduce import Wish

    return Wish(
        dataset=args.dataset, weights=args.weights, images=args.images, annotations=args.annotations, out=args.out,
        importing=import_options(args), rows=tuple(args.rows), limit=args.limit, submission=not args.no_submission,
        allow_missing=args.allow_missing, shared_concept=args.shared_concept, wording=args.wording, published=args.published,
        against=args.against, provider=args.provider, threads=args.threads, command=command,
    )  # fmt: skip


def _reproduce(given: Sequence[str]) -> int:
    args = build_parser().parse_args(given)
    from dqe_engine.contracts.parsing import to_json

    from ..reproduce.run import check, reproduce
    from ..reproduce.stages import check_disk

    wish = _wish(args, shlex.join(["dqe-reproduce", *given]))
    with Told() as told:
        if args.check:
            told.say(check_disk(wish.out, check(wish, told).needed))
            return 0
        outcome = reproduce(wish, told)
    print(to_json(outcome.results).decode() if args.json else outcome.table, end="")
    for path in outcome.written:
        print(path, file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    return run_torch(lambda: _reproduce(given))
