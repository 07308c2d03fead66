"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report import milliseconds, table
from ..sections import told

_LABELS = {
    "recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "recall_at_50": "R@50", "map_at_10": "mAP@10",
    "overlap_at_10": "overlap",
}  # fmt: skip


def markdown(results: dict[str, Any], *, heading: bool = True) -> str:
    """The whole report, section by section."""
    writers = {"precision": _precision, "storage": _storage, "pareto": _pareto, "public": _public}
    return told(results["sections"], writers, title="Recall: measured" if heading else None)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _gap(gap: Sequence[float] | None) -> str:
    """A difference in percentage points with its interval."""
    if gap is None:
        return "–"
    if not any(gap):
        return "0"
    value, low, high = (100 * part for part in gap)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _figures(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in row.get("figures", ()) for row in rows)]


def _precision(section: dict[str, Any]) -> list[str]:
    rows = section["rows"]
    names = _figures(rows, list(_LABELS))
    cells = []
    for row in rows:
        if row["status"] != "ok":
            cells.append((row["name"], row["status"], *("–",) * len(names)))
            continue
        size = f"{row['graph_bytes'] / 1e6:.1f}" if "graph_bytes" in row else "–"
        cells.append((row["name"], size, *(_percent(row["figures"].get(name)) for name in names)))
    gaps = [
        (row["name"], *(_gap(row["difference"].get(name)) for name in names if name != "overlap_at_10"))
        for row in rows
        if "difference" in row
    ]
    return [
        f"{section['queries']:,} queries over {section['gallery']:,} images, exact search. Percent; overlap: of the top 10 with PyTorch's.",
        table(("model", "graphs, MB", *(_LABELS[name] for name in names)), cells),
        "Differences from PyTorch in points, with 95 % intervals over queries (paired bootstrap):",
        table(("model", *(_LABELS[name] for name in names if name != "overlap_at_10")), gaps),
    ]


def _storage(section: dict[str, Any]) -> list[str]:
    said = (
        f"{section['queries']:,} queries over {section['gallery']:,} images, the {section['k']} best of each, the reference left out. "
        "Percent; overlap: of the top 10 with exact search in float32. Bytes are of all that a search reads."
    )
    return [said, _points(section["rows"], section["real_items"], section["gallery"]), _methods(section["rows"])]


def _pareto(section: dict[str, Any]) -> list[str]:
    d = section["distractors"]
    parts = [
        f"{section['queries']:,} queries, the {section['k']} best of each. {d['real']:,} real items; the others are distractors: "
        f"points up to {d['mixed']:g} of the way between two real items, token by token, plus noise of norm {d['noise']:g}, "
        "to unit norm, as float16. "
        "They are valid answers to nothing, so recall falls with their number whatever the method; read the overlap with exact search."
    ]
    for gallery in section["galleries"]:
        parts += [f"### {gallery['label']}", _points(gallery["rows"], gallery["real_items"], gallery["items"])]
    return [*parts, _methods(section["galleries"][0]["rows"])] if section["galleries"] else parts


def _points(rows: Sequence[dict[str, Any]], real: int, items: int) -> str:
    names = _figures(rows, [name for name in _LABELS if name != "recall_at_50" or items == real])
    batches = list(dict.fromkeys(batch for row in rows for batch in row.get("batches", ())))
    header = [
        "method",
        *(_LABELS[name] for name in names),
        "R@10 − exact",
        "bytes / item",
        *(f"ms / query, B = {b}" for b in batches),
        "build s",
    ]
    cells = []
    for row in rows:
        if row["status"] != "ok":
            cells.append((row["name"], row["status"], *("–",) * (len(header) - 2)))
            continue
        times = [milliseconds(row["batches"][b]["median_s"] / int(b)) for b in batches]
        figures = [_percent(row["figures"].get(name)) for name in names]
        gap = _gap(row["difference"]["recall_at_10"])
        cells.append((row["name"], *figures, gap, f"{row['bytes'] / items:,.0f}", *times, f"{row['build_s']:.1f}"))
    return table(header, cells)


def _methods(rows: Sequence[dict[str, Any]]) -> str:
    hows = dict.fromkeys((row["method"], row["how"]) for row in rows)
    return "What each does:\n\n" + "\n".join(f"- {name}: {how}" for name, how in hows)


def _public(section: dict[str, Any]) -> list[str]:
    parts = []
    for dataset in section["datasets"]:
        if dataset["status"] != "ok":
            parts.append(f"{dataset['name']}: {dataset['status']}.")
            continue
        ran = [row for row in dataset["rows"] if row["status"] == "ok"]
        parts.append(f"### {dataset['name']}, {dataset['split']}\n\n{ran[0]['report']['protocol']}")
        figures = {row["name"]: _flat(row["report"]) for row in ran}
        names = list(dict.fromkeys(name for found in figures.values() for name in found))
        parts.append(table(("figure", *figures), [(name, *(_percent(found.get(name)) for found in figures.values())) for name in names]))
        parts += [f"{row['name']}: {row['status']}." for row in dataset["rows"] if row["status"] != "ok"]
    return parts


def _flat(report: dict[str, Any]) -> dict[str, float]:
    """Every set's figures, then the summary's, under one name each."""
    out = {f"{part['name']} {name}": value for part in report["sets"] for name, value in part["figures"].items()}
    return out | {f"summary {name}": value for name, value in report["summary"].items()}
