"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from ..report import milliseconds, size, table
from ..sections import provenance
from ..targets import Target, targets_table
from .checks import ATOL
from .refresh import OURS


def markdown(results: dict[str, Any], verdicts: list[Target]) -> str:
    """The whole report: targets first, then each section's cases."""
    parts = ["# Zone kernels: measured", targets_table(verdicts)]
    for name, section in results["sections"].items():
        parts += [f"## {name}", provenance(section)]
        if name == "roofline":
            parts += _roofline(section)
        elif name == "scaling":
            parts.append(_scaling(section))
        else:
            parts += [part for case in section["cases"] for part in _case(case)]
        if name == "refresh":
            parts.append(_whole_refresh(section))
    return "\n\n".join(part for part in parts if part) + "\n"


def _case(case: dict[str, Any]) -> list[str]:
    rows = []
    for c in case["contenders"]:
        if c["status"] != "ok":
            rows.append((c["name"], c["status"], *("–",) * 6))
            continue
        timing, answer, memory = c[c["counted"]], c["answer"], c.get("memory")
        other = c["alone"] if c["counted"] == "interleaved" else c["interleaved"]
        rows.append(
            (
                c["name"],
                milliseconds(timing["median_s"]),
                milliseconds(timing["p95_s"]),
                f"{c['counted']}, {timing['rounds']}",
                milliseconds(other["median_s"] if other else None),
                f"{answer['max_score_error']:.1e}",
                f"{100 * answer['same_ids']:.2f} %",
                size(memory["peak_extra_bytes"]) if memory else "–",
            )
        )
    header = ("contender", "median ms", "p95 ms", "counted, rounds", "other way ms", "score error", "same ids", "peak extra")
    notes = [
        f"{c['name']}: {c['answer']['rescored_per_query']:,.0f} of {case['case']['items']:,} items re-scored per query."
        for c in case["contenders"]
        if c.get("answer", {}).get("rescored_per_query") is not None
    ]
    notes += [
        f"{c['name']}: {100 * c['answer']['mid_share']:.2f} % of the items in the mid zone."
        for c in case["contenders"]
        if c.get("answer", {}).get("mid_share") is not None and c["name"].startswith("ours")
    ]
    if "fma_flops_per_s" in case:
        notes.append(f"Multiply-add peak of the same rounds: {case['fma_flops_per_s'] / 1e9:.0f} GFLOP/s.")
    return [f"### {case['label']}", table(header, rows), "\n".join(f"- {note}" for note in notes)]


def _whole_refresh(section: dict[str, Any]) -> str:
    rows, total = [], section["queries"]
    for case in section["cases"]:
        queries = case["case"]["queries"]
        for c in case["contenders"]:
            ours = c["name"] == OURS
            if c["status"] == "ok" and (case is section["cases"][-1] or not ours):  # of ours, the larger slice
                scale = total / queries
                # Ours works in blocks, so its memory is that of a block; the peers hold everything at once.
                memory = c["memory"]["peak_extra_bytes"] * (1 if ours else scale) if c.get("memory") else None
                how = "measured in full" if scale == 1 else f"extrapolated from {queries:,} queries"
                rows.append((c["name"], how, f"{c['median_s'] * scale:,.1f}", size(memory)))
    return f"All {total:,} queries:\n\n" + table(("contender", "how", "seconds", "peak extra memory"), rows)


def _scaling(section: dict[str, Any]) -> str:
    names = list(dict.fromkeys(c["name"] for case in section["cases"] for c in case["contenders"]))
    rows = []
    for case in section["cases"]:
        by_name = {c["name"]: c for c in case["contenders"]}
        cells = [by_name.get(name) for name in names]
        times = ["–" if c is None else c["status"] if c["status"] != "ok" else milliseconds(c["median_s"]) for c in cells]
        rows.append((f"{case['case']['items']:,}", str(case["case"]["batch"]), *times))
    return "Median milliseconds, all in one process.\n\n" + table(("N", "B", *names), rows)


def _roofline(section: dict[str, Any]) -> list[str]:
    p = section["peaks"]
    ceilings = table(
        ("ceiling", "per second"),
        [
            ("multiply-adds in registers", f"{p['fma_flops'] / 1e9:.0f} GFLOP"),
            (f"matrix product by {p['gemm_by']}", f"{p['gemm_flops'] / 1e9:.0f} GFLOP"),
            ("copy, bytes read and written", f"{p['copy_bytes'] / 1e9:.1f} GB"),
            ("read", f"{p['read_bytes'] / 1e9:.1f} GB"),
        ],
    )
    rows = [
        (
            f"{q['name']}, {q['case']}",
            milliseconds(q["median_s"]),
            f"{q['flops'] / q['median_s'] / 1e9:.0f}",
            f"{100 * q['flops'] / q['median_s'] / p['fma_flops']:.0f} %",
            f"{100 * q['flops'] / q['median_s'] / p['gemm_flops']:.0f} %",
            f"{q['bytes'] / q['median_s'] / 1e9:.1f}",
            f"{100 * q['bytes'] / q['median_s'] / p['read_bytes']:.0f} %",
        )
        for q in section["points"]
    ]
    return [ceilings, table(("mode", "ms", "GFLOP/s", "of multiply-adds", "of the product", "GB/s", "of the read"), rows)]


def how_checked() -> str:
    return f"Answers within {ATOL:g} of float64 scores of the vectors as each contender stores them (FAISS f16: see benchmarks/README.md)."
