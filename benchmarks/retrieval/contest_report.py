"""The contest's tables, and time against the number of items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqe_engine.tuning.frontier import described

from ..plotting import STYLE, save
from ..report import milliseconds, size, table
from ..sections import told
from .contest import EARLY, ENOUGH, LISTS, SCREEN, K

_LOOKS = {
    LISTS: ("#7a0c12", "o"),
    SCREEN: ("#e8853b", "D"),
    EARLY: ("#d0587e", "*"),
    "FAISS IndexFlatIP": ("#3566a8", "s"),
    "FAISS IndexFlatIPPanorama, PCA": ("#1f9e9e", "^"),
    "FAISS IVF-Flat": ("#2f7d4f", "v"),
    "FAISS IVF-PQ, re-scored": ("#8fbf9f", "P"),
    "FAISS IVF-Flat, 8 cells a root": ("#1d5c38", "1"),
    "FAISS IVF-PQ, re-scored, 8 cells a root": ("#a9c7b4", "2"),
    "FAISS HNSW": ("#7c6aa8", "X"),
    "FAISS HNSW, pooled, re-scored": ("#b06a9a", "h"),
    "numkong dots_packed": ("#8a5a2b", "<"),
    "numkong maxsim_packed": ("#c9a227", ">"),
    "maxsim-cpu": ("#6f6f6f", "p"),
}


def markdown(results: dict[str, Any], *, heading: bool = True) -> str:
    """The whole report, section by section."""
    writers = {"growth": _growth, "data": _data, "batches": _batches}
    return told(results["sections"], writers, title="Exact search with lists, measured" if heading else None)


def draw(sections: dict[str, Any], folder: Path) -> list[Path]:
    return [_plot(sections["growth"], folder / "lists-growth.png")] if "growth" in sections else []


def _growth(section: dict[str, Any]) -> list[str]:
    galleries = section["galleries"]
    head = (
        f"The {K} best items of one query, in milliseconds (medians), over garments of {galleries[0]['tokens']} tokens of "
        f"{galleries[0]['width']} numbers. {_encoded(galleries)} Exact answers were compared before they were timed. An approximate index "
        f"has the fastest of its settings that finds {ENOUGH:.1%} of the exact {K}; where none does, its recall stands beside its time."
    )
    parts = [head]
    for threads in section["by_threads"]:
        parts.append(f"### {threads} thread{'s' * (threads > 1)}")
        parts.append(_by_gallery(galleries, threads, [f"{gallery['items']:,}" for gallery in galleries]))
    last = galleries[-1]
    parts += [f"### What each is, at {last['items']:,} items", _built(last["rows"], last["items"]), _hows(section["how"])]
    return parts


def _encoded(galleries: Sequence[dict[str, Any]]) -> str:
    most = max(gallery["encoded"] for gallery in galleries)
    if most == galleries[-1]["items"]:
        return "All items are encoded images."
    return f"{most:,} are encoded images, and the others lie between two of these, which clusters more than as many photos would."


def _data(section: dict[str, Any]) -> list[str]:
    head = (
        f"The {K} best items of one query, in milliseconds (medians), all exact. *gain* is the time without lists over the time with them. "
        "Garments and photos are encoded by the demo's model, which has never seen a photo."
    )
    out = [head]
    for threads in section["by_threads"]:
        rows = []
        for gallery in section["galleries"]:
            by_name = {row["name"]: row for row in gallery["rows"] if row.get("threads") == threads}
            names = list(dict.fromkeys(row["name"] for row in section["galleries"][0]["rows"]))
            cells = [milliseconds(by_name[name]["median_s"]) if name in by_name else "–" for name in names]
            gain = by_name[SCREEN]["median_s"] / by_name[LISTS]["median_s"]
            shape = f"{gallery['items']:,} × {gallery['tokens']} × {gallery['width']}"
            rows.append([gallery["label"], shape, *cells, f"{gain:.2f}"])
        out += [f"### {threads} thread{'s' * (threads > 1)}", table(["vectors", "items", *names, "gain"], rows)]
    return out


def _batches(section: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["label"], row.get("levels", "lists, wanted or not") or "neither", f"{row['items']:,}", str(row["batch"]),
            milliseconds(row["swept_s"]), milliseconds(row["listed_s"]),
            f"{row['swept_s'] / row['listed_s']:.2f}", f"{row['coding_s']:.2f} + {row['listing_s']:.2f}",
        ]
        for row in section["rows"]
    ]  # fmt: skip
    head = f"Batches: the {K} best of each query, by codes alone and by what `Screen.build` keeps, in milliseconds a batch (medians)."
    return [head, table(["tokens", "kept", "items", "queries", "codes alone", "as built", "ratio", "build: codes + rest, s"], rows)]


def _by_gallery(galleries: Sequence[dict[str, Any]], threads: int, heads: Sequence[str]) -> str:
    names = list(dict.fromkeys(row["name"] for gallery in galleries for row in gallery["rows"]))
    rows = []
    for name in names:
        cells = [_cell(gallery["rows"], name, threads) for gallery in galleries]
        if any(cell != "–" for cell in cells):
            rows.append([name, *cells])
    return table(["", *heads], rows)


def _cell(rows: Sequence[dict[str, Any]], name: str, threads: int) -> str:
    mine = [row for row in rows if row["name"] == name]
    for row in mine:
        if row["status"] != "ok":
            return str(row["status"]).partition(":")[0]
        if row["threads"] == threads:
            short = "" if row["recall"] >= ENOUGH else f" ({row['recall']:.1%})"
            return milliseconds(row["median_s"]) + short
    return "–"


def _built(rows: Sequence[dict[str, Any]], items: int) -> str:
    cells = []
    for row in rows:
        if row["status"] != "ok":
            cells.append([row["name"], row["status"], "–", "–", "–", "–"])
        else:
            recall = "exact" if row["exact"] else f"{row['recall']:.2%}"
            cells.append(
                [row["name"], str(row["threads"]), recall, described(row["settings"]) or "–", size(row["bytes"]), f"{row['build_s']:.1f}"]
            )
    return table(["", "threads", "recall", "setting", "memory", "build, s"], cells)


def _hows(how: dict[str, str]) -> str:
    return "What each does:\n\n" + "\n".join(f"- {name}: {what}" for name, what in how.items())


def _plot(section: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(section["by_threads"]), 5.6), layout="constrained")
        panels = figure.subplots(1, len(section["by_threads"]), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, threads in zip(panels, section["by_threads"], strict=True):
            for name, (colour, marker) in _LOOKS.items():
                points = [
                    (gallery["items"], 1e3 * row["median_s"], row["recall"] >= ENOUGH)
                    for gallery in section["galleries"]
                    for row in gallery["rows"]
                    if row["name"] == name and row.get("threads") == threads
                ]
                if not points:
                    continue
                x, y, enough = zip(*points, strict=True)
                look = {"color": colour, "marker": marker, "ms": 5, "zorder": 3}
                look |= {"lw": 2.4, "zorder": 4} if name == LISTS else {"lw": 1.3}
                (line,) = axes.plot(x, y, ls="-" if all(enough) else ":", **look)
                handles.setdefault(name + ("" if all(enough) else f" (below {ENOUGH:.1%})"), line)
            axes.set(xscale="log", yscale="log", xlabel="items", title=f"{threads} thread{'s' * (threads > 1)}")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].set_ylabel("milliseconds of one query (median)")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        return save(figure, path)
