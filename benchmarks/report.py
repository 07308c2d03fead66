"""Results on disk: one JSON per benchmark whose sections are replaced one at a time, and Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqe_engine.files import atomic_write

SCHEMA = 1
_NUMBERS = re.compile(r"\[[-+.eE\d\s,]+\]")
"""Lists of numbers alone, such as samples: a line each."""


def load(path: Path, benchmark: str) -> dict[str, Any]:
    """What an earlier run wrote, so that a run of some sections keeps the others; empty where there is none of this schema."""
    empty: dict[str, Any] = {"schema": SCHEMA, "benchmark": benchmark, "sections": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return empty
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA and found.get("benchmark") == benchmark else empty


def save_json(path: Path, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=1, allow_nan=False)
    with atomic_write(path, "w") as stream:
        stream.write(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def save_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as stream:
        stream.write(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    value = 1000 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
