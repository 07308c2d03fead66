"""Recall against latency, and against memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plotting import STYLE, save

_OURS = {"ours f32": "#7a0c12", "ours f16": "#c1272d", "ours f32, screened": "#b5651d", "ours f16, screened": "#e8a33b"}
_PEERS = ("#3566a8", "#2f7d4f", "#7c6aa8", "#6f6f6f", "#1f9e9e", "#8a5a2b", "#8fbf9f", "#b06a9a", "#4a4a8a", "#a0a030")
_MARKERS = ("s", "^", "v", "D", "P", "X", "<", ">", "p")
"""One fewer than the colours, so that pairs repeat late."""


def draw(sections: dict[str, Any], folder: Path) -> list[Path]:
    """Plots of the sections that are there; the paths written."""
    drawn = {"pareto": _pareto, "storage": _storage}
    return [drawn[name](sections[name], folder / f"recall-{name}.png") for name in drawn if name in sections]


def curves(rows: Sequence[dict[str, Any]], batch: str) -> dict[str, list[tuple[float, float]]]:
    """Per method: (milliseconds a query, overlap with exact search), in the order of its settings."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if batch in row.get("batches", ()):
            at = 1e3 * row["batches"][batch]["median_s"] / int(batch)
            out.setdefault(row["method"], []).append((at, row["figures"]["overlap_at_10"]))
    return out


def _looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all panels."""
    looks: dict[str, dict[str, Any]] = {}
    peers = [name for name in methods if name not in _OURS]
    for name in methods:
        if name in _OURS:
            looks[name] = {"color": _OURS[name], "marker": "o", "ms": 8, "zorder": 4}
        else:
            number = peers.index(name)
            looks[name] = {"color": _PEERS[number % len(_PEERS)], "marker": _MARKERS[number % len(_MARKERS)], "ms": 5, "zorder": 3}
        looks[name]["lw"] = 1.3
    return looks


def _pareto(section: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    galleries = section["galleries"]
    batches = list(dict.fromkeys(b for g in galleries for row in g["rows"] for b in row.get("batches", ())))
    looks = _looks(list(dict.fromkeys(row["method"] for g in galleries for row in g["rows"] if row["status"] == "ok")))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(batches), 4 * len(galleries) + 0.8), layout="constrained")
        panels = figure.subplots(len(galleries), len(batches), sharex=True, sharey=True, squeeze=False)
        for row, gallery in zip(panels, galleries, strict=True):
            for axes, batch in zip(row, batches, strict=True):
                for method, points in curves(gallery["rows"], batch).items():
                    x, y = zip(*points, strict=True)
                    axes.plot(x, [100 * value for value in y], label=method, **looks[method])
                axes.set(xscale="log", title=f"{gallery['label']}, {'one query' if batch == '1' else f'{batch} queries'} a call")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes in panels[-1]:
            axes.set_xlabel("milliseconds a query (median)")
        for row in panels:
            row[0].set_ylabel("overlap with exact top 10, %")
        handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
        return save(figure, path)


def _storage(section: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in section["rows"] if row["status"] == "ok"]
    looks = _looks(list(dict.fromkeys(row["method"] for row in rows)))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 5), layout="constrained")
        axes = figure.subplots()
        for method, look in looks.items():
            points = [(row["bytes"] / section["gallery"], 100 * row["figures"]["recall_at_10"]) for row in rows if row["method"] == method]
            axes.plot(*zip(*points, strict=True), label=method, **look | {"lw": 0.8})
        axes.set(xscale="log", xlabel="bytes an item, all that a search reads", ylabel="recall@10, %")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else ""))
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        return save(figure, path)
