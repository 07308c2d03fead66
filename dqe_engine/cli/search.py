"""`dqe-search`: one query against an index, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .main import add_device_option, add_runtime_options, json_object, positive, run

if TYPE_CHECKING:
    from dqe_engine.contracts.manifest import BundleManifest
    from dqe_engine.query import Query
    from dqe_engine.results import Explanation, Hit, SearchResult

_MODES = {
    "trained": {
        "image": "by an image alone, which the model was not trained for",
        "text": "by a text alone, which the model was not trained for",
    },
    "added": {"composed": "this model was not trained to change an image by a text: it adds up their embeddings"},
}
"""What is said of an answer, by the model's `composition` and the answer's mode."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dqe-search",
        description="Search an index by a reference image and what should differ; or by an image, or a text, alone.",
    )
    parser.add_argument("bundle", type=Path, help="the exported model: a folder, or hf://OWNER/NAME@REVISION")
    parser.add_argument("index", type=Path, help="an index made by dqe-index with the same model; or a sharded one, or a "
                        "file that says where one is (docs/scaling.md)")  # fmt: skip
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--image", type=Path, metavar="FILE", help="image file that is the reference")
    reference.add_argument("--reference", metavar="ID", help="item of the index that is the reference")
    parser.add_argument("--text", help="what should differ, such as 'in red, with long sleeves'")
    parser.add_argument("-k", type=positive, default=10, help="number of hits (default: 10)")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="skip the first N hits, to get the next page")
    parser.add_argument("--min-score", type=float, metavar="X", help="only hits that score at least X")
    parser.add_argument("--unlike", action="append", default=[], metavar="ID", help="avoid items that look like this one; may be repeated")
    parser.add_argument("--exclude", action="append", default=[], metavar="ID", help="leave this item out; may be repeated")
    parser.add_argument(
        "--weight",
        type=_weight,
        action="append",
        default=[],
        metavar="ATTRIBUTE=X",
        help="multiply the predicted weight of an attribute, such as colour=0.5; may be repeated",
    )
    parser.add_argument(
        "--set-weight",
        type=_weight,
        action="append",
        default=[],
        metavar="ATTRIBUTE=X",
        help="use this weight instead of the predicted one; may be repeated",
    )
    parser.add_argument("--explain", action="store_true", help="print the parts of each hit's score")
    parser.add_argument(
        "--filter", type=json_object, metavar="JSON", help="""condition on metadata, such as '{"brand": "x", "price": {"<": 20}}'"""
    )
    parser.add_argument("--zones", action="store_true", help="mark each hit as near (equally good) or mid (similar but different)")
    parser.add_argument("--no-verify", action="store_true", help="do not check the index's checksums; a large index loads faster")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_device_option(parser)
    add_runtime_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(lambda: _search(build_parser().parse_args(argv)))


def _search(args: argparse.Namespace) -> int:
    from dqe_engine.engine import RetrievalEngine
    from dqe_engine.errors import InputError
    from dqe_engine.index.elsewhere import is_elsewhere, open_elsewhere
    from dqe_engine.index.on_devices import check_devices

    check_devices(args.search_on)
    engine = RetrievalEngine.load(args.bundle, provider=args.provider, threads=args.threads)
    elsewhere = is_elsewhere(args.index)
    if elsewhere and args.no_verify:
        raise InputError(f"--no-verify: {args.index} is sharded or in Milvus, where no checksums are checked; leave the option out")
    if elsewhere and args.search_on:
        raise InputError(
            f"--search-on: {args.index} is sharded or in Milvus, and only a single index is copied to devices; leave the option out"
        )
    if elsewhere:
        engine.attach(open_elsewhere(args.index, threads=args.threads or 0))
    else:
        engine.load_index(args.index, verify=not args.no_verify)
    with engine:
        if not engine.searched.snapshot().count:
            raise InputError(f"{args.index}: there are no images in this index; add some with dqe-index")
        engine.search_on(args.search_on)
        result = engine.search(_query(args))
    if args.json:
        from dqe_engine.contracts.parsing import to_json

        sys.stdout.write(to_json(result).decode())
    else:
        _print_tables(result, engine.bundle.manifest)
    return 0


def _query(args: argparse.Namespace) -> Query:
    from dqe_engine.query import Query

    return Query(
        image=args.image,
        reference_id=args.reference,
        text=args.text,
        k=args.k,
        weights=dict(args.weight),
        absolute_weights=dict(args.set_weight),
        unlike=args.unlike,
        exclude=args.exclude,
        offset=args.offset,
        minimum_score=args.min_score,
        zones=args.zones,
        filter=args.filter,
        explain=args.explain,
    )


def _print_tables(result: SearchResult, model: BundleManifest) -> None:
    from rich.console import Console

    console = Console()
    if result.zones is None:
        console.print(_table("hits", result.hits))
    else:
        counts = result.zones.counts
        console.print(_table(f"near: {counts.near} equally good", result.zones.near))
        console.print(_table(f"mid: {counts.mid} similar but different ({counts.easy} further away)", result.zones.mid))
    if result.weights:
        used = ", ".join(f"{name} {value:.3f} (predicted {result.predicted_weights[name]:.3f})" for name, value in result.weights.items())
        console.print(f"attribute weights: {used}", markup=False, highlight=False)
    elif not model.sizes.attributes:
        console.print("this model has no attributes to weigh")
    if said := _MODES[model.composition].get(result.mode):
        console.print(said)
    if result.lost:
        console.print(f"these shards gave no answer, so their items are missing: {', '.join(result.lost)}", markup=False, highlight=False)
    elif not result.exact:
        console.print("the hits are not proved to be the best of all items")
    if result.truncated:
        console.print("the text was longer than the model reads; its end was ignored")
    if result.unknown_words:
        words = ", ".join(result.unknown_words)
        console.print(f"words that the model does not know, and reads as one and the same word: {words}", markup=False, highlight=False)
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in result.timings_ms.items())
    console.print(f"milliseconds: {stages}", highlight=False)


def _table(title: str, hits: Sequence[Hit]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("score", justify="right")
    table.add_column("Δ", justify="right")
    if explained := any(hit.explanation for hit in hits):
        table.add_column("made of", overflow="fold")
    if with_metadata := any(hit.metadata for hit in hits):
        table.add_column("metadata", overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        cells = [Text(hit.id), Text(f"{hit.score:.4f}"), Text(f"{hit.delta:.4f}")]  # Text: an id may look like markup
        if explained:
            cells.append(Text(_made_of(hit.explanation) if hit.explanation else ""))
        if with_metadata:
            cells.append(Text(json.dumps(hit.metadata, ensure_ascii=False) if hit.metadata else ""))
        table.add_row(str(rank), *cells)
    return table


def _made_of(explanation: Explanation) -> str:
    parts = [("base", explanation.base), *explanation.attributes.items()]
    if explanation.unlike:
        parts.append(("unlike", explanation.unlike))
    return ", ".join(f"{name} {value:+.3f}" for name, value in parts)


def _weight(text: str) -> tuple[str, float]:
    name, separator, value = text.partition("=")
    try:
        if not separator or not name:
            raise ValueError
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected ATTRIBUTE=NUMBER, such as colour=0.5, got {text!r}") from error
