"""What was asked of serving, beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from ..harness import SETTLE_SECONDS, Timing, ratio
from ..targets import Target
from .cases import EAGER, OURS

LEAST_RATIO = 2.0
IMPORT_MS, READY_MS, RESIDENT_MB = 400.0, 1500.0, 350.0
MODEL_ERROR = 0.15


def targets(sections: dict[str, Any]) -> list[Target]:
    """All targets that the recorded sections allow to judge."""
    return [
        *(target for case in sections.get("query", {}).get("cases", ()) for target in _query(case)),
        *_cold(sections.get("cold", {})),
        *_model(sections.get("model-size", {})),
    ]


def timing_of(contender: dict[str, Any]) -> Timing:
    """The one that counts."""
    return Timing.of(contender[contender["counted"]])


def _query(case: dict[str, Any]) -> Iterator[Target]:
    """Asked of single queries with a catalogue reference; batches and uploads are in the tables."""
    if case["case"]["kind"] != "catalogue" or case["case"]["batch"] != 1:
        return
    by_name = {c["name"]: c for c in case["contenders"] if c["status"] == "ok"}
    what, asked = f"a warm query against {EAGER}, end to end ({case['label']}", f"≥ {LEAST_RATIO:g} ×"
    if OURS not in by_name or EAGER not in by_name:
        yield Target("query", f"{what})", asked, "not measured", None)
        return
    slow, fast = by_name[EAGER], by_name[OURS]
    pairs = [(f"after a pause of {1e3 * SETTLE_SECONDS:g} ms", timing_of(slow), timing_of(fast))]
    if "busy" in slow and "busy" in fast:
        pairs.insert(0, ("asked at once", Timing.of(slow["busy"]), Timing.of(fast["busy"])))
    for when, peer, ours in pairs:
        times, low, high = ratio(peer, ours)
        yield Target("query", f"{what}, {when})", asked, f"{times:.2f} × [{low:.2f}, {high:.2f}]", times >= LEAST_RATIO)


def _cold(section: dict[str, Any]) -> Iterator[Target]:
    for row in section.get("rows", ()):
        if row["name"] != OURS:
            continue
        phases = row["phases"]
        for what, limit, times in (
            (
                "`import dqe_engine` and its engine",
                IMPORT_MS,
                [s["phases"]["imported"]["ms"] - s["phases"]["interpreter"]["ms"] for s in row["starts"]],
            ),
            ("a process from its start to a ready engine", READY_MS, [s["phases"]["ready"]["ms"] for s in row["starts"]]),
        ):
            median = statistics.median(times)
            measured = f"{median / 1e3:.2f} s [{min(times) / 1e3:.2f}, {max(times) / 1e3:.2f}: all starts]"
            yield Target("cold", what, f"≤ {limit / 1e3:g} s", measured, median <= limit)
        resident = phases["served"]["resident_bytes"] / 1e6
        yield Target("cold", "resident set of a serving process", f"≤ {RESIDENT_MB:g} MB", f"{resident:.0f} MB", resident <= RESIDENT_MB)


def _model(section: dict[str, Any]) -> Iterator[Target]:
    for part, what in (("encoder", "query encoder"), ("search", "search")):
        for row in section.get(part, {}).get("rows", ()):
            if row["held_out"]:
                error = row["error"]
                yield Target(
                    "model-size", f"error of the {what}'s cost model, not fitted there ({row['name']})", f"≤ {100 * MODEL_ERROR:g} %",
                    f"{100 * error:+.0f} %", abs(error) <= MODEL_ERROR,
                )  # fmt: skip
