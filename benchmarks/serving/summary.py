"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..harness import SETTLE_SECONDS
from ..report import milliseconds, size, table
from ..sections import provenance
from ..targets import Target, targets_table
from .cold import PHASES
from .sizing import MERGE_MS
from .stages import OTHER, STAGES, TOTAL

_BAND = "Bands say where another run on this machine is expected (benchmarks/README.md)."


def markdown(results: dict[str, Any], verdicts: list[Target]) -> str:
    """The whole report: targets first, then each section."""
    parts = ["# Latency, end to end: measured", targets_table(verdicts), _BAND]
    for name, section in results["sections"].items():
        warning = "**A quick run: sizes are small and figures worth nothing.**" if section["quick"] else ""
        parts += [f"## {name}", provenance(section), warning, *_TABLES[name](section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ms(value: float | None) -> str:
    return milliseconds(None if value is None else value / 1e3)


def _band(band: Sequence[float] | None, shown: Callable[[float | None], str]) -> str:
    return "–" if band is None else f"{shown(band[0])} to {shown(band[1])}"


def _query(section: dict[str, Any]) -> list[str]:
    parts = [f"Milliseconds of a call, after a pause of {1e3 * SETTLE_SECONDS:g} ms and asked at once after the last answer."]
    header = (
        "contender", "median ms", "band", "p95 ms", "at once ms", "band", "p95", "recall of the exact ten", "counted, runs", "other way ms",
    )  # fmt: skip
    for case in section["cases"]:
        rows = []
        for c in case["contenders"]:
            if c["status"] != "ok":
                rows.append((c["name"], c["status"], *("–",) * 8))
                continue
            timing, busy = c[c["counted"]], c.get("busy", {})
            other = c["alone"] if c["counted"] == "interleaved" else c["interleaved"]
            rows.append(
                (
                    c["name"],
                    milliseconds(timing["median_s"]),
                    _band(timing.get("band_s"), milliseconds),
                    milliseconds(timing["p95_s"]),
                    milliseconds(busy.get("median_s")),
                    _band(busy.get("band_s"), milliseconds),
                    milliseconds(busy.get("p95_s")),
                    f"{100 * c['answer']['same_ids']:.1f} %",
                    f"{c['counted']}, {timing['rounds']}",
                    milliseconds(other["median_s"] if other else None),
                )
            )
        parts += [f"### {case['label']}", table(header, rows)]
    return parts


def _stages(section: dict[str, Any]) -> list[str]:
    parts = [f"Milliseconds of {section['queries']} single queries each: median (p95, p99)."]
    for kind in dict.fromkeys(row["kind"] for row in section["rows"]):
        rows = [row for row in section["rows"] if row["kind"] == kind]
        lines = []
        for stage in (*STAGES, OTHER, TOTAL):
            cells = [row["stages"].get(stage) for row in rows]
            if any(cells):
                lines.append((stage, *("–" if c is None else f"{_ms(c['p50'])} ({_ms(c['p95'])}, {_ms(c['p99'])})" for c in cells)))
        lines.append(("band of the total", *(_band(row["stages"][TOTAL]["band"], _ms) for row in rows)))
        parts += [f"### {kind} reference", table(("stage", *(row["name"] for row in rows)), lines)]
    return parts + _missing(section)


def _throughput(section: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{row['kind']}, {row['name']}",
            str(row["callers"]),
            str(row["batch"]),
            f"{row['queries_per_s']:,.0f}",
            _band(row["band"], lambda value: f"{value or 0:,.0f}"),
            *(_ms(row["request_ms"][name]) for name in ("p50", "p95", "p99")),
        )
        for row in section["rows"]
    ]
    return [table(("reference, way", "callers", "batch", "queries/s", "band", "request p50 ms", "p95", "p99"), rows), *_missing(section)]


def _gallery(section: dict[str, Any]) -> list[str]:
    done = [row for row in section["rows"] if row["status"] == "ok"]
    rows = [
        (
            f"{row['tokens']} × {row['width']}, {row['name']}",
            f"{row['items']:,}",
            _ms(row["search_ms"]["p50"]),
            _band(row["search_ms"]["band"], _ms),
            _ms(row["total_ms"]["p50"]),
            _ms(row["total_ms"]["p95"]),
            f"{100 * row['same_ids']:.0f} %",
        )
        for row in done
    ]
    skipped = [f"{row['items']:,} items of {row['tokens']} tokens: {row['status']}." for row in section["rows"] if row["status"] != "ok"]
    memory = [
        (
            f"{row['name']}, {row['tokens']} tokens",
            size(row["resident_bytes"] * 1e6 / row["items"]),
            size(row["anonymous_bytes"] * 1e6 / row["items"]),
            f"{row['items']:,}",
        )
        for row in section["resident"]
    ]
    return [
        "Single queries with an uploaded reference; the search is a part of the whole query. Items lie around the real gallery's.",
        table(("tokens × D, way", "items", "search ms", "band", "whole query ms", "p95", "recall of the exact ten"), rows),
        "\n".join(f"- {line}" for line in skipped),
        "### Memory of a million items",
        "Resident set that a loaded and searched index adds; mapped pages count, the system may drop them.",
        table(("way", "resident", "of that not mapped", "measured with"), memory),
        *_missing(section),
    ]


def _cold(section: dict[str, Any]) -> list[str]:
    rows = []
    for phase in PHASES:
        row = [phase]
        for found in (way["phases"][phase] for way in section["rows"]):
            row += [f"{found['median_ms']:,.0f}", _band(found["band"], lambda value: f"{value or 0:,.0f}"), size(found["resident_bytes"])]
        rows.append(tuple(row))
    rows.append(("peak", *(text for way in section["rows"] for text in ("–", "–", size(way["peak_bytes"])))))
    header = ("until", *(f"{row['name']}: {what}" for row in section["rows"] for what in ("ms", "band", "resident")))
    return [
        f"Since the process was spawned; {len(section['rows'][0]['starts'])} starts, files in the page cache.",
        table(header, rows),
        *_missing(section),
    ]


def _model_size(section: dict[str, Any]) -> list[str]:
    parts = []
    for part in ("encoder", "search"):
        fitted = section[part]
        terms = " + ".join(f"{value:.3g} · {name}" for name, value in fitted["coefficients"].items() if value)
        rows = [
            (
                row["name"] + (" (**held out**)" if row["held_out"] else ""),
                milliseconds(row["median_s"]),
                _band(row.get("band_s"), milliseconds),
                milliseconds(row["predicted_s"]),
                f"{100 * row['error']:+.0f} %",
            )
            for row in fitted["rows"]
        ]
        parts += [f"### {part}", f"seconds = {terms}", table(("size", "measured ms", "band", "model ms", "error"), rows)]
    large = [
        (f"{row['items']:,}", str(row["nodes"]), milliseconds(row["search_s"]), size(row["bytes_per_node"])) for row in section["galleries"]
    ]
    shape = section["galleries"][0]
    assumed = (
        f"One query, {shape['tokens']} tokens × {shape['width']} in float32, without the screen. Assumed: nodes like this machine, items "
        f"split evenly and in memory, {MERGE_MS:g} ms to send a query to all and merge, no node slower than the others; beyond the sizes "
        "fitted, time is linear."
    )
    return [*parts, "### large galleries, by the model", assumed, table(("items", "nodes", "search ms", "vectors per node"), large)]


def _missing(section: dict[str, Any]) -> list[str]:
    return ["\n".join(f"- {name}: {reason}." for name, reason in section["missing"].items())]


_TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "query": _query,
    "stages": _stages,
    "throughput": _throughput,
    "gallery": _gallery,
    "cold": _cold,
    "model-size": _model_size,
}
