"""The table as docs/benchmarks.md has it, and below it what a reader asks next: intervals, and differences query by query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dqe_training.data.public.fashioniq import CATEGORIES

from .figures import Figure
from .results import Results, ViewResult

_TITLES = {"fashioniq": "FashionIQ, {}, R@10 / R@50", "cirr": "CIRR, {}", "circo": "CIRCO, {}"}


def markdown(results: Results) -> str:
    """The whole page."""
    lines = [f"# {results.weights} on {results.dataset}", "", *_origin(results)]
    for split in dict.fromkeys(view.view.split for view in results.views if any(row.figures for row in view.rows.values())):
        views = [view for view in results.views if view.view.split == split]
        lines += ["", f"## {_TITLES[results.dataset].format('validation' if split == 'val' else split)}", "", *_main(results, views), ""]
        lines += _counted(views)
        lines += ["", "95 % intervals, percentile bootstrap over the queries of each set:", "", *_intervals(results, views)]
        if differences := list(_differences(results, views)):
            lines += ["", "Paired differences in points, query by query, with their 95 % intervals:", "", *differences]
        lines += _aspects(views)
    lines += ["", *(f"- {note}" for note in results.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _origin(results: Results) -> Iterator[str]:
    yield f"`{results.command}`, {results.date}; " + ", ".join(f"{name} {version}" for name, version in results.versions.items())
    if results.imported is not None:
        for file in results.imported.files:
            yield ""
            yield f"{file.name}: {results.imported.format}, {file.size} bytes, SHA-256 {file.sha256}"
    if (row := results.published) is not None:
        yield ""
        yield f"Published: {row.title}, {row.of}. Source: {row.source} Collected from papers' text; check the paper before citing it."


def _main(results: Results, views: Sequence[ViewResult]) -> Iterator[str]:
    yield from _head(["method", *_columns(results)])
    if (row := results.published) is not None:
        yield _line([f"{row.title}, published: {row.of}", *_cells(results, dict(zip(results.measures, row.figures, strict=True)))])
    for view in views:
        for found in view.rows.values():
            label = f"{results.weights}, {found.label} ({found.device}), {view.view.name}"
            yield _line([label, *_cells(results, {name: 100 * figure.value for name, figure in found.figures.items()})])


def _columns(results: Results) -> list[str]:
    return [*CATEGORIES, "mean"] if results.dataset == "fashioniq" else list(results.measures.values())


def _cells(results: Results, values: Mapping[str, float]) -> list[str]:
    """In per cent; FashionIQ's two depths share a cell."""
    if results.dataset != "fashioniq":
        return [f"{values[name]:.2f}" for name in results.measures]
    pairs = [f"{values[f'{c}/recall_at_10']:.2f} / {values[f'{c}/recall_at_50']:.2f}" for c in CATEGORIES]
    return [*pairs, f"{values['mean']:.2f}"]


def _counted(views: Sequence[ViewResult]) -> Iterator[str]:
    for view in views:
        parts = [f"{name} {count} queries over {view.gallery[name]} images" for name, count in view.queries.items()]
        yield f"{view.view.name}: {', '.join(parts)}.  "


def _intervals(results: Results, views: Sequence[ViewResult]) -> Iterator[str]:
    yield from _head(["row", *results.measures.values(), "same first 10"])
    for view in views:
        for found in view.rows.values():
            same = "" if found.same_first_10 is None else f"{100 * found.same_first_10:.1f}"
            yield _line([f"{found.label}, {view.view.name}", *(_span(found.figures[name]) for name in results.measures), same])


def _differences(results: Results, views: Sequence[ViewResult]) -> Iterator[str]:
    rows = [(view, pair) for view in views for pair in view.differences]
    if not rows:
        return
    yield from _head(["difference", *results.measures.values()])
    for view, pair in rows:
        cells = [f"{100 * pair.figures[name].value:+.2f} ({_span(pair.figures[name], sign='+')})" for name in results.measures]
        yield _line([f"{pair.of} − {pair.against}, {view.view.name}", *cells])


def _aspects(views: Sequence[ViewResult]) -> Iterator[str]:
    """CIRCO val: the kinds of change that the texts ask for."""
    rows = {found.label: found.aspects for view in views for found in view.rows.values() if found.aspects}
    if not rows:
        return
    yield from ("", "mAP@10 by semantic aspect; a query has several:", "")
    yield from _head(["aspect", "queries", *rows])
    for name, first in next(iter(rows.values())).items():
        yield _line([name, str(first.queries), *(f"{100 * aspects[name].map_at_10:.2f}" for aspects in rows.values())])


def _span(figure: Figure, sign: str = "") -> str:
    low, high = figure.interval
    return f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def _head(cells: Sequence[str]) -> Iterator[str]:
    yield _line(cells)
    yield "|" + "---|" * len(cells)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
