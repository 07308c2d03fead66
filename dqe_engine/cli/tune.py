"""`dqe-index tune INDEX`: what each way to search an index finds and costs, measured on this machine with queries of the caller's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .main import positive

if TYPE_CHECKING:
    from dqe_engine.index import GalleryIndex
    from dqe_engine.tuning import Measured
    from dqe_engine.tuning.contenders import F32

LEAST_QUERIES = 8
DESCRIPTION = (
    "Measure exact search of an index with the 8-bit copy and with lists of tokens, search that stops early, and FAISS's approximate "
    "indexes where faiss is installed: recall, time of a query, memory and time to build. Nothing is changed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument(
        "--queries", type=Path, metavar="FILE",
        help='(Q, D) float32 query embeddings as .npy; or, with --bundle, JSON lines such as {"reference": "a.jpg", "text": "in red"} '
        "(default: tokens of the items themselves, which are searches by an image alone)",
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, metavar="BUNDLE", help="the index's model, to encode the queries of JSON lines")
    parser.add_argument("--sample", type=positive, default=200, metavar="N", help="most queries to ask (default: 200)")
    parser.add_argument("--k", type=positive, default=10, help="number of best items of each query (default: 10)")
    parser.add_argument(
        "--recall",
        type=float,
        default=0.998,
        metavar="R",
        help="recall to reach; settings beyond the first that reaches it are not tried (default: 0.998)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of every search (default: one per processor)")
    parser.add_argument("--graphs", action="store_true", help="also make a graph (HNSW) of more than a million tokens, which takes minutes")
    parser.add_argument("--json", action="store_true", help="print every setting that was tried, as JSON")


def tune(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dqe_engine.errors import InputError
    from dqe_engine.index import GalleryIndex
    from dqe_engine.tuning.gallery import measure_all

    if not 0.0 < args.recall <= 1.0:
        raise InputError(f"--recall {args.recall:g}: expected a number above 0 and up to 1")
    with GalleryIndex.load(args.index) as index:
        if len(index) < args.k:
            raise InputError(f"{args.index}: {len(index)} items, but --k asks for the best {args.k}; give a smaller --k")
        items = _tokens(index)
        queries, what = _queries(args, index, items)
        console = Console(stderr=True)
        with console.status("measuring") as status:
            measured, left_out = measure_all(
                items,
                queries[: args.sample],
                k=args.k,
                enough=args.recall,
                threads=args.threads or 0,
                graphs=args.graphs,
                step=status.update,
            )
    asked = {"items": len(items), "tokens": items.shape[1], "width": items.shape[2], "k": args.k, "queries": min(len(queries), args.sample)}
    if args.json:
        rows = [_record(row) for row in measured]
        sys.stdout.write(json.dumps({**asked, "of": what, "settings": rows, "left_out": left_out}, indent=1) + "\n")
        return 0
    _print(measured, left_out, f"{asked['queries']} queries ({what}), {len(items):,} items, the {args.k} best")
    return 0


def _tokens(index: GalleryIndex) -> F32:
    """(N, M, D) of the items that were not removed."""
    import numpy as np

    snapshot = index.snapshot()
    tokens = np.concatenate([np.asarray(shard) for shard in snapshot.targets])[snapshot.live_rows()]
    return np.ascontiguousarray(tokens, np.float32)


def _queries(args: argparse.Namespace, index: GalleryIndex, items: F32) -> tuple[F32, str]:
    """Shuffled, so that a sample is one of all; and what they are."""
    import numpy as np

    from dqe_engine.errors import InputError

    rng = np.random.default_rng(0)
    if args.queries is None:
        if args.bundle is not None:
            raise InputError("--bundle encodes the queries of --queries FILE, which is missing; add it, or leave --bundle out")
        chosen = rng.choice(len(items), min(len(items), args.sample), replace=False)
        found, what = items[chosen, rng.integers(items.shape[1], size=len(chosen))], "tokens of items: an image alone"
    elif args.queries.suffix == ".npy":
        from dqe_engine.array_files import open_array

        found, what = open_array(args.queries), args.queries.name
    else:
        found, what = _encoded(args), args.queries.name
    if found.ndim != 2 or found.shape[1] != items.shape[2] or found.dtype != np.float32 or len(found) < LEAST_QUERIES:
        raise InputError(
            f"--queries: {found.dtype} of shape {found.shape}, expected float32 of (Q, {items.shape[2]}) with Q of {LEAST_QUERIES} or more"
        )
    return np.ascontiguousarray(found[rng.permutation(len(found))]), what


def _encoded(args: argparse.Namespace) -> F32:
    import msgspec

    from dqe_engine import Query, RetrievalEngine
    from dqe_engine.errors import InputError

    if args.bundle is None:
        raise InputError(f"{args.queries}: JSON lines need --bundle, the model that encodes them; or pass embeddings as .npy")
    asked = []
    for number, line in enumerate(args.queries.read_bytes().splitlines()[: args.sample], start=1):
        try:
            row: Any = msgspec.json.decode(line)
            asked.append(Query(reference_id=row.get("reference"), text=row.get("text")))
        except (msgspec.DecodeError, AttributeError, InputError) as error:
            raise InputError(f'{args.queries}, line {number}: {error}; expected {{"reference": ID, "text": TEXT}}') from error
    engine = RetrievalEngine.load(args.bundle)
    engine.load_index(args.index)
    found: F32 = engine.encode_queries(asked).queries
    return found


def _record(row: Measured) -> dict[str, Any]:
    return {
        "name": row.name, "settings": row.setting.values, "exact": row.setting.exact, "recall": row.recall, "seconds": row.seconds,
        "bytes": row.size, "build_s": row.build_s,
    }  # fmt: skip


def _print(measured: list[Measured], left_out: dict[str, str], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from dqe_engine.tuning.frontier import described, frontier

    table = Table(title=title, title_justify="left", caption="bold: nothing else is faster and finds as much", caption_justify="left")
    for name in ("search", "setting"):
        table.add_column(name)
    for name in ("recall", "ms a query", "MB", "build s"):
        table.add_column(name, justify="right")
    worth = frontier(measured)
    for name in dict.fromkeys(row.name for row in measured):
        for row in frontier(one for one in measured if one.name == name):
            found = "exact" if row.setting.exact else f"{row.recall:.2%}"
            cells = (found, f"{1e3 * row.seconds:.2f}", f"{row.size / 1e6:,.0f}", f"{row.build_s:.1f}")
            table.add_row(name, described(row.setting.values) or "–", *cells, style="bold" if row in worth else "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"{name}: {reason}", style="dim", highlight=False)
