"""Results on disk: one JSON per benchmark whose sections are replaced one at a time, and Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from msgspec import to_builtins
from msgspec.structs import replace

from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write

SCHEMA = 2
"""Version 1 had no `kind`, and called itself `schema`."""
_NUMBERS = re.compile(r"\[[-+.eE\d\s,]+\]")
"""Lists of numbers alone, such as samples: a line each."""


class BenchmarkResults(Versioned, frozen=True, kw_only=True):
    """A result file: sections by name, each as its benchmark likes. `targets` and `hardware` where the benchmark has them once for all."""

    kind: Literal["benchmark-results"] = "benchmark-results"
    schema_version: int = SCHEMA
    benchmark: str
    sections: dict[str, Any]
    targets: list[Any] | None = None
    hardware: dict[str, Any] | None = None

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "schema_version" in data:
            return data
        return {("schema_version" if key == "schema" else key): value for key, value in data.items()}


def read(path: Path) -> BenchmarkResults:
    """Raises InputError for what is no result file of ours, FileNotFoundError and NotADirectoryError where there is none."""
    return read_document(BenchmarkResults, path, remedy="measure again with this version", error=InputError)


def load(path: Path, benchmark: str) -> dict[str, Any]:
    """What an earlier run wrote, so that a run of some sections keeps the others; empty where there is none of this schema."""
    found = BenchmarkResults(benchmark=benchmark, sections={})
    with suppress(InputError, OSError):
        if (earlier := read(path)).benchmark == benchmark:
            found = replace(earlier, schema_version=SCHEMA)
    return {key: value for key, value in to_builtins(found).items() if value is not None}


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
