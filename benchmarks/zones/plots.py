"""The scaling and roofline plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..plotting import STYLE, save

_COLOURS = {
    "ours f16": "#c1272d",
    "ours": "#7a0c12",
    "ours screened": "#e8853b",
    "PyTorch matmul + topk": "#3566a8",
    "FAISS flat, BLAS forced": "#2f7d4f",
    "FAISS flat, default": "#8fbf9f",
    "FAISS f16": "#7c6aa8",
}
_MARKERS = {"ours f16": "o", "ours": "o", "ours screened": "D"}


def draw(sections: dict[str, Any], folder: Path) -> list[Path]:
    """Plots of the sections that are there; the paths written."""
    drawn = {"scaling": _scaling, "roofline": _roofline}
    return [drawn[name](sections[name], folder / f"zones-{name}.png") for name in drawn if name in sections]


def _scaling(section: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        base = section["items"]
        views = ((left, "items", "items N", "16 queries", {"batch": 16}), (right, "batch", "queries B", f"{base:,} items", {"items": base}))
        for axes, axis, label, title, fixed in views:
            for name, points in _series(section["cases"], axis, fixed).items():
                x, y = zip(*sorted(points), strict=True)
                thick = 2.2 if name.startswith("ours") else 1.3
                axes.plot(x, np.array(y) * 1e3, marker=_MARKERS.get(name, "s"), ms=4, lw=thick, color=_COLOURS.get(name), label=name)
            axes.set(xscale="log", yscale="log", xlabel=label, title=title)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"))
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_ylabel("milliseconds (median)")
        handles = {label: handle for axes in (left, right) for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        return save(figure, path)


def _series(cases: list[dict[str, Any]], axis: str, fixed: dict[str, int]) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        if all(case["case"][name] == value for name, value in fixed.items()):
            for c in case["contenders"]:
                if c["status"] == "ok":
                    out.setdefault(c["name"], []).append((case["case"][axis], c["median_s"]))
    return out


def _roofline(section: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter

    peaks, points = section["peaks"], section["points"]
    intensity = np.array([p["flops"] / p["bytes"] for p in points])
    reached = np.array([p["flops"] / p["median_s"] / 1e9 for p in points])
    x = np.geomspace(intensity.min() / 2, intensity.max() * 3, 200)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        top = peaks["fma_flops"] / 1e9
        for name, rate, style in (("read", peaks["read_bytes"], "-"), ("copy", peaks["copy_bytes"], "--")):
            axes.plot(x, np.minimum(rate / 1e9 * x, top), style, color="#444444", lw=1.3, label=f"plain {name}, {rate / 1e9:.1f} GB/s")
        for name, rate, style in (
            ("multiply-adds in registers", top, "-"),
            (f"plain matrix product ({peaks['gemm_by']})", peaks["gemm_flops"] / 1e9, ":"),
        ):
            axes.axhline(rate, ls=style, color="#9a6a00", lw=1.3, label=f"{name}, {rate:.0f} GFLOP/s")
        halo = [withStroke(linewidth=2.5, foreground="white")]
        for name, many in dict.fromkeys((p["name"], p["tokens"] > 1) for p in points):
            mine = [i for i, p in enumerate(points) if p["name"] == name and (p["tokens"] > 1) == many]
            point: dict[str, Any] = {"marker": "^" if many else "o", "s": 46, "color": _COLOURS[name], "edgecolor": "white", "lw": 0.6}
            label = f"{name}, {points[mine[0]]['tokens']} tokens an item" if many else name
            axes.scatter(intensity[mine], reached[mine], label=label, zorder=3, **point)
            for i in mine:
                axes.annotate(
                    f"B={points[i]['batch']}",
                    (intensity[i], reached[i]),
                    xytext=(0, -7 if many else 7),
                    textcoords="offset points",
                    ha="center",
                    va="top" if many else "bottom",
                    fontsize=8,
                    color=_COLOURS[name],
                    path_effects=halo,
                )
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of items, read once", ylabel="GFLOP/s")
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(min(reached.min(), top) / 3, max(reached.max(), top) * 2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.legend(loc="lower right", fontsize=8, frameon=True)
        return save(figure, path)
