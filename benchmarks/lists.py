"""Exact search with lists of tokens, beside other libraries' exact and approximate search: where it gains, and where that ends.

    python -m benchmarks.lists demo --prepare --graphs     # once, before: encodes images and makes the largest graph
    python -m benchmarks.lists demo                        # everything
    python -m benchmarks.lists demo --only data --sprite fashion-mnist-sprite.png

Sections: `growth`, one query against 5,000 to 1,000,000 items, a plot and tables; `data`, kinds of vectors from which lists gain much,
little and nothing; `batches`, what lists save when many queries come at once. Exits with 1 where an exact answer is another than ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from .retrieval.contest import Contest
    from .retrieval.tokens import Source, Tokens

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("dqe-engine", "faiss-cpu", "numkong", "maxsim-cpu")
SECTIONS = ("growth", "data", "batches")
BATCHES = (1, 4, 16, 64, 256)
PHOTOS, SYNTHETIC, SINGLES = 17_000, 50_000, 1_000_000
MOST_GRAPHED = 1 << 20
"""Rows of the largest graph that is made without --graphs."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


@dataclass(frozen=True)
class Bench:
    """What the sections share."""

    source: Source
    contest: Contest
    sizes: list[int]
    rendered: int
    sprite: Path | None
    graphs: dict[str, Any]
    quick: bool
    step: Callable[[str], None]


def growth(bench: Bench) -> dict[str, Any]:
    """One query against the number of items, by every library."""
    from .retrieval.contest import all_contenders

    wanted = all_contenders(**bench.graphs)
    galleries = [_gallery(bench, "garments", bench.source.garments(size, bench.rendered), wanted) for size in bench.sizes]
    how = {contender.name: contender.how for contender in wanted}
    return {"galleries": galleries, "how": how, "by_threads": list(bench.contest.threads)}


def data(bench: Bench) -> dict[str, Any]:
    """Kinds of vectors, by exact search alone."""
    from .retrieval.contest import exact_contenders

    galleries = [_gallery(bench, label, tokens, exact_contenders()) for label, tokens in _kinds(bench)]
    left_out = [] if bench.sprite else ["photos: no --sprite"]
    return {"galleries": galleries, "left_out": left_out, "by_threads": list(bench.contest.threads)}


def batches(bench: Bench) -> dict[str, Any]:
    """Ours with codes alone and with what `Screen.build` makes, for so many queries at once. Raises AnswerMismatchError."""
    from .retrieval.tokens import subspace

    rows: list[dict[str, Any]] = []
    for size in bench.sizes:
        rows += _batched("garments", bench.source.garments(size, bench.rendered), bench.step)
    return {"rows": rows + _batched("random", subspace(min(77_000, bench.sizes[-1]), 8, 64, 64), bench.step)}


def _kinds(bench: Bench) -> Iterator[tuple[str, Tokens]]:
    from .retrieval.tokens import power_law, subspace

    few = 1000 if bench.quick else 0
    yield "garments", bench.source.garments(few or PHOTOS, 0)
    if bench.sprite is not None:
        yield "photos in colours", bench.source.photos(few or PHOTOS, bench.sprite)
    if not few:
        yield "garments, untrained model", bench.source.untrained()
    for inner in (16, 32, 64):
        yield f"{inner} dimensions", subspace(few or SYNTHETIC, 8, 128, inner)
    yield "isotropic", subspace(few or SYNTHETIC, 8, 128, 128)
    yield "single vectors, clustered, power law", power_law(few or SINGLES, 256, clusters=100 if few else 10_000)


def _gallery(bench: Bench, label: str, tokens: Tokens, wanted: Sequence[Any]) -> dict[str, Any]:
    from .retrieval.contest import compare

    count, each, width = tokens.items.shape
    rows = compare(f"{label}, {count:,} items", tokens, wanted, bench.contest)
    return {"label": label, "items": count, "tokens": each, "width": width, "encoded": tokens.encoded, "rows": rows}


def _batched(label: str, tokens: Tokens, step: Callable[[str], None]) -> list[dict[str, Any]]:
    from dqe_engine.zones import Screen, select_zones

    from .harness import AnswerMismatchError
    from .retrieval.contest import K

    items, queries = tokens.items, tokens.queries
    step(f"{label}, {len(items):,} items: batches")
    begun = time.perf_counter()
    swept = Screen.build(items, lists=False, prefix=False)
    coded = time.perf_counter()
    built = Screen.build(items)
    coding = coded - begun
    made = {
        "coding_s": coding,
        "listing_s": max(0.0, time.perf_counter() - coded - coding),
        "levels": ", ".join(name for name in ("lists", "prefix") if getattr(built, name) is not None),
    }
    listed = Screen(swept.shards, built.lists, built.prefix)  # the same codes
    del built
    rows = []
    for batch in BATCHES:
        seconds: list[tuple[float, float]] = []
        for turn in range(max(5, min(40, 400 // batch))):
            start = turn * batch % (len(queries) - batch + 1)
            asked = queries[start : start + batch]
            first = time.perf_counter()
            plain = select_zones(asked, items, k=K, screen=swept)
            second = time.perf_counter()
            found = select_zones(asked, items, k=K, screen=listed)
            seconds.append((second - first, time.perf_counter() - second))
            if not (np.array_equal(plain.ids, found.ids) and np.array_equal(plain.scores, found.scores)):
                raise AnswerMismatchError(f"{label}, {len(items):,} items, {batch} queries: other answers than with codes alone")
        without, with_lists = (float(value) for value in np.median(seconds, axis=0))
        rows.append({"label": label, "items": len(items), "batch": batch, "swept_s": without, "listed_s": with_lists, **made})
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="lists", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("demo", type=Path, help="what `make demo` made")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section to run (repeatable); default: all")
    parser.add_argument("--rendered", type=int, default=60_000, metavar="N", help="garments to draw and encode besides (default: 60000)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="items of the galleries (default: 5000 to 1000000)")
    parser.add_argument("--sprite", type=Path, metavar="FILE", help="Fashion-MNIST's picture of photos, for the section `data`")
    parser.add_argument("--graphs", action="store_true", help="make graphs of every size; they are kept under build/lists")
    parser.add_argument("--prepare", action="store_true", help="encode, and make graphs with --graphs, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing of worth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: benchmarks/results/<machine>)")
    options = parser.parse_args(arguments)
    if options.sizes is None:
        options.sizes = [1000, 2000] if options.quick else [5_000, 17_000, 60_000, 250_000, 1_000_000]
    if options.quick:
        options.rendered = 0
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    from dqe_engine.cli.main import run

    options = _parse(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape

    from . import machine
    from .harness import AnswerMismatchError, Rounds
    from .retrieval.contest import Contest
    from .retrieval.tokens import Source
    from .sections import busy

    console = Console(stderr=True)
    if (load := busy()) is not None and not options.prepare:
        console.print(f"The machine is busy ({load:.0%} of its processors are taken): times will be too long.", style="yellow")
    work = _ROOT / "build" / "lists"
    out = options.out or (_ROOT / "build" / "benchmarks" if options.quick else Path(__file__).parent / "results") / machine.slug()
    graphs = {"folder": work, "most_rows": None if options.graphs else MOST_GRAPHED}
    with console.status("loading") as status:

        def step(text: str) -> None:
            status.update(escape(text))

        contest = (
            Contest(Rounds(minimum=2, maximum=3, seconds=0.01), blocks=1, asked=32, step=step) if options.quick else Contest(step=step)
        )
        bench = Bench(
            Source(options.demo, work, step), contest, options.sizes, options.rendered, options.sprite, graphs, options.quick, step
        )
        if options.prepare:
            return _prepare(bench, graphs=options.graphs)
        try:
            paths = _measure(bench, options.only or list(SECTIONS), out, quick=options.quick)
        except AnswerMismatchError as error:
            print(f"lists: wrong answer: {error}", file=sys.stderr)
            return 1
    print("\n".join(str(path) for path in paths))
    return 0


def _prepare(bench: Bench, *, graphs: bool) -> int:
    from dqe_engine.tuning import hnsw

    if bench.sprite is not None:
        bench.source.photos(PHOTOS, bench.sprite)
    bench.source.untrained()
    for size in bench.sizes:
        items = bench.source.garments(size, bench.rendered).items
        if graphs:
            bench.step(f"a graph of {size:,} items")
            hnsw(folder=bench.graphs["folder"]).build(items)
    print(bench.source.work)
    return 0


def _measure(bench: Bench, names: Sequence[str], out: Path, *, quick: bool) -> list[Path]:
    """Run the sections, each written as soon as it is done; prints their tables and returns what was written."""
    from . import report
    from .retrieval import contest_report
    from .sections import measured

    path = out / "lists.json"
    functions = {"growth": growth, "data": data, "batches": batches}
    results = measured(path, "lists", {name: partial(functions[name], bench) for name in names}, _PACKAGES, quick=quick)
    report.save_text(path.with_suffix(".md"), contest_report.markdown(results))
    print(contest_report.markdown({"sections": {name: results["sections"][name] for name in names}}, heading=False))
    return [path, path.with_suffix(".md"), *contest_report.draw(results["sections"], out)]


if __name__ == "__main__":
    sys.exit(main())
