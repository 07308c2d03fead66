"""Reports of dqe-eval as text for people; `--json` has the same and more."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.benchmarks import BenchmarkReport
    from ..evaluation.probe_report import Figure, Probe, ProbeReport
    from ..evaluation.protocol import Report

_TITLES = {
    "single_modality": "Does it need both image and text?",
    "paraphrases": "Do other words for the same change give the same answers?",
    "negation": "Does it understand what is ruled out?",
    "leakage": "What changes that was not asked?",
}

_MEANINGS = {
    "map_at_10": "over all valid answers",
    "map_at_50": "over all valid answers",
    "attribute_precision_at_10": "valid answers in the first 10, over the most there could be",
    "attainable_precision_at_10": "the most there could be: share of the first 10",
    "attainable_recall_at_1": "what an ideal ranking reaches: several answers are valid, one is labelled",
}


def folder_text(report: Report) -> Iterator[str]:
    """One figure a line, name and value."""
    yield _line("queries", str(report.queries))
    yield _line("gallery", f"{report.gallery} images; a query's reference is left out of its own ranking")
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "recall_at_50"):
        interval = f"  95 % interval {_interval(report.recall_at_10_interval)}" if name == "recall_at_10" else ""
        yield _line(name, f"{getattr(report, name):.4f}{interval}")
    if report.heldout_recall_at_10 is not None:
        yield _line("heldout_recall_at_10", f"{report.heldout_recall_at_10:.4f}  {report.heldout_queries} queries")
    for name, meaning in _MEANINGS.items():
        value = getattr(report, name)
        if value is not None:
            yield _line(name, f"{_number(value, 4)}  {meaning}")
    if report.weight_auc is not None:
        values = "  ".join(f"{name} {_number(value, 4)}" for name, value in report.weight_auc.items())
        yield _line("weight_auc", f"{values}  do the weights know which texts name the attribute; 0.5 is chance")
    for note in report.notes:
        yield _line("note", note)
    if report.probes is not None:
        yield from probes_text(report.probes)


def benchmark_text(report: BenchmarkReport) -> Iterator[str]:
    """The dataset's protocol, its sets one after the other, and the headline."""
    yield f"{report.dataset} {report.split}: {report.protocol}"
    for part in report.sets:
        wordless = f", {part.coverage.wordless} without words" if part.coverage.wordless else ""
        yield f"{part.name}: {part.coverage.queries} queries{wordless} over {part.coverage.images} images"
        for name, value in part.figures.items():
            yield f"  {name:24} {value:.4f}"
        if part.aspects:
            yield "  map_at_10 by semantic aspect, 95 % interval; a query has several aspects"
            for name, aspect in part.aspects.items():
                yield f"    {name:30} {aspect.map_at_10:.4f}  {_interval(aspect.interval)}  {aspect.queries} queries"
        if part.probes is not None:
            yield from probes_text(part.probes)
    for name, value in report.summary.items():
        yield f"{name:26} {value:.4f}"


def probes_text(report: ProbeReport) -> Iterator[str]:
    """Each probe under the question that it answers."""
    yield ""
    yield "Probes. Each line: a figure in [0, 1], its 95 % interval over the queries, and what it is. --json has all of them."
    for name, title in _TITLES.items():
        probe: Probe = getattr(report, name)
        yield ""
        yield title
        if probe.skipped:
            yield f"  not asked: {probe.skipped}"
            continue
        yield from textwrap.wrap(f"({probe.how})", 118, initial_indent="  ", subsequent_indent="   ")
        for key, figure in probe.figures.items():
            if name != "single_modality" or key.endswith("_at_10"):  # the other depths say the same, in --json
                yield f"  {_figure(figure)}  {figure.meaning}"
        if probe.by_attribute:
            yield from _table(probe.by_attribute)


def _table(by_attribute: Mapping[str, Mapping[str, Figure]]) -> Iterator[str]:
    columns = list(dict.fromkeys(name for figures in by_attribute.values() for name in figures))
    widths = [max(len(name), 6) for name in columns]
    first = max(len("by attribute"), *map(len, by_attribute))
    yield f"  {'by attribute':{first}}  " + "  ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))
    for attribute, figures in by_attribute.items():
        values = [_number(figures[name].value) if name in figures else "-" for name in columns]
        yield f"  {attribute:{first}}  " + "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))


def _figure(figure: Figure) -> str:
    return f"{_number(figure.value)}  {_interval(figure.interval):16}"


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _interval(interval: tuple[float, float]) -> str:
    return "-" if math.isnan(interval[0]) else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _line(name: str, value: str) -> str:
    return f"{name:30} {value}"
