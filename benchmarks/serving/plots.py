"""Plots: the query by contender, its stages, throughput, and galleries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plotting import STYLE, save
from .cases import EAGER, INT8, OURS
from .stages import OTHER, STAGES, TOTAL
from .throughput import WORKERS

_COLOURS = {
    OURS: "#c1272d",
    INT8: "#e8853b",
    EAGER: "#3566a8",
    WORKERS: "#7fb2e5",
    "ours, GPU": "#7a0c12",
    "PyTorch eager, GPU": "#1f3d66",
    "ours f32 screened": "#7a0c12",
    "ours f16": "#d98880",
    "ours f16 screened": "#e8853b",
}
_PEER = "#9aa5b1"
_STAGE_COLOURS = ("#4c78a8", "#72b7b2", "#b279a2", "#f58518", "#e45756", "#ff9da6", "#eeca3b", "#54a24b", "#bab0ac")


def draw(sections: dict[str, Any], folder: Path) -> list[Path]:
    """Plots of the sections that are there; the paths written."""
    drawn = {"query": _query, "stages": _stages, "throughput": _throughput, "gallery": _gallery}
    return [drawn[name](sections[name], folder / f"latency-{name}.png") for name in drawn if name in sections]


def _query(section: dict[str, Any], path: Path) -> Path:
    """Bars of single queries, with bands."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cases = [case for case in section["cases"] if case["case"]["batch"] == 1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, case in zip(np.atleast_1d(figure.subplots(1, max(len(cases), 1), sharey=True)), cases, strict=True):
            done = [c for c in case["contenders"] if c["status"] == "ok"][::-1]
            medians = [1e3 * c["median_s"] for c in done]
            bands = [c[c["counted"]].get("band_s") or (c["median_s"],) * 2 for c in done]
            spread = np.abs(1e3 * np.array(bands).T - np.array(medians))
            axes.barh([c["name"] for c in done], medians, xerr=spread, color=[_COLOURS.get(c["name"], _PEER) for c in done], capsize=2)
            busy = [(1e3 * c["busy"]["median_s"], at) for at, c in enumerate(done) if "busy" in c]
            if busy:
                axes.plot(*zip(*busy, strict=True), "D", color="white", markeredgecolor="black", ms=5, ls="", label="asked at once")
                axes.legend(loc="upper right", frameon=False, fontsize=8)
            for at, (c, value) in enumerate(zip(done, medians, strict=True)):
                share = c["answer"]["same_ids"]
                note = "" if share > 0.9995 else f", recall {100 * share:.0f} %"
                axes.annotate(f"{value:.3g}{note}", (value, at), xytext=(4, 7), textcoords="offset points", fontsize=8)
            axes.set(
                title=f"{case['case']['kind']} reference, {case['case']['items']:,} items",
                xlabel="milliseconds after a pause: median and band",
            )
            axes.set_xlim(0, 1.35 * max(medians))  # a wide band is cut off; the table has it
        return save(figure, path)


def _stages(section: dict[str, Any], path: Path) -> Path:
    """A stacked bar for each kind of reference and way."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    bars = [row for row in section["rows"] if row["name"] in (OURS, INT8, EAGER)][::-1]
    names = [f"{row['kind']}, {row['name']}" for row in bars]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(bars))
        for stage, colour in zip((*STAGES, OTHER), _STAGE_COLOURS, strict=True):
            widths = np.array([row["stages"].get(stage, {"p50": 0.0})["p50"] for row in bars])
            axes.barh(names, widths, left=left, color=colour, label=stage)
            left += widths
        for at, row in enumerate(bars):
            axes.text(left[at], at, f"  {row['stages'][TOTAL]['p50']:.2f} ms", va="center", fontsize=9)
        axes.set(xlabel="milliseconds: medians by stage; the number is the median of the whole")
        axes.margins(x=0.12)
        figure.legend(loc="outside lower center", ncols=len(STAGES) + 1, frameon=False, fontsize=9)
        return save(figure, path)


def _throughput(section: dict[str, Any], path: Path) -> Path:
    """Queries per second against callers, and against batches."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        views = (("callers", "batch", "callers, a query each"), ("batch", "callers", "batch of one caller"))
        for axes, (axis, other, title) in zip(figure.subplots(1, 2), views, strict=True):
            for kind, style in (("catalogue", "-"), ("uploaded", "--")):
                for name in dict.fromkeys(row["name"] for row in section["rows"]):
                    mine = [row for row in section["rows"] if (row["kind"], row["name"], row[other]) == (kind, name, 1)]
                    x, y = [row[axis] for row in mine], [row["queries_per_s"] for row in mine]
                    axes.plot(x, y, style, marker="o", ms=5, color=_COLOURS[name], label=f"{name}, {kind}")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set(xlabel=title)
            axes.set_ylim(bottom=0)
        figure.axes[0].set_ylabel("queries per second (median of blocks)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return save(figure, path)


def _gallery(section: dict[str, Any], path: Path) -> Path:
    """The search (solid) and the whole query (dotted) against the number of items, a panel for each number of tokens."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    done = [row for row in section["rows"] if row["status"] == "ok"]
    panels = list(dict.fromkeys(row["tokens"] for row in done))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        for axes, tokens in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
            for name in dict.fromkeys(row["name"] for row in done):
                mine = [row for row in done if row["name"] == name and row["tokens"] == tokens]
                items = [row["items"] for row in mine]
                axes.plot(items, [row["search_ms"]["p50"] for row in mine], marker="o", ms=4, color=_COLOURS[name], label=name)
                axes.plot(items, [row["total_ms"]["p50"] for row in mine], ":", color=_COLOURS[name])
            axes.set(xscale="log", yscale="log", xlabel="items", title=f"{tokens} token{'s' if tokens > 1 else ''} an item")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        figure.axes[0].set_ylabel("milliseconds (median); dotted: the whole query")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        return save(figure, path)
