"""One page of what was measured on a machine, from the results that are there: `python -m benchmarks.page`, `make bench`'s last step."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, report
from .targets import Target, targets_table

SHORT = "zones-short"
BENCHMARKS = {
    "latency": "Latency, end to end",
    "query-full-size": "A query at BLIP-2's full size",
    "recall": "Recall: precisions, storage, approximation",
    "zones": "Zone kernels",
    SHORT: "Zone kernels, a short run",
    "train": "Training",
    "export": "Exports at full size",
}
PAGE = "README.md"


def page(folder: Path) -> str:
    """Markdown: of each benchmark in `folder`, when and on what it ran, its targets, its plots, and where its tables are."""
    parts = [f"# Measured: {folder.name}", "Written by `python -m benchmarks.page`; [how it is measured](../../README.md)."]
    for name, title in BENCHMARKS.items():
        if name == SHORT and (folder / "zones.json").exists():
            continue
        results = report.load(folder / f"{name}.json", "zones" if name == SHORT else name)
        if results["sections"]:
            parts += [f"## {title}", _ran(results), *_targets(results), *_plots(folder, name), _links(folder, name)]
    return "\n\n".join(parts) + "\n"


def _ran(results: dict[str, Any]) -> str:
    lines = dict[str, list[str]]()
    for name, section in results["sections"].items():
        on = section.get("machine", {})
        commit = f"commit {(on.get('commit') or 'unknown')[:10]}{' with local changes' if on.get('dirty') else ''}"
        lines.setdefault(f"{section.get('started', '')[:10]}, {commit}", []).append(name)
    return "; ".join(f"{when}: {', '.join(names)}" for when, names in lines.items()) + "."


def _targets(results: dict[str, Any]) -> list[str]:
    found = [Target(**target) for target in results.get("targets", ())]
    return [targets_table(found)] if found else []


def _plots(folder: Path, name: str) -> list[str]:
    return [f"![{file.stem.replace('-', ', ', 1)}]({file.name})" for file in sorted(folder.glob(f"{name}-*.png"))]


def _links(folder: Path, name: str) -> str:
    files = [file for file in (f"{name}.md", f"{name}.json") if (folder / file).exists()]
    return "All of it: " + ", ".join(f"[{file}]({file})" for file in files) + "."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="page", description=__doc__)
    default = Path(__file__).parent / "results" / machine.slug()
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="of results (default: this machine's)")
    folder = parser.parse_args(arguments).folder
    if not any((folder / f"{name}.json").exists() for name in BENCHMARKS):
        parser.exit(2, f"error: {folder}: no results here; measure first, with make bench\n")
    report.save_text(folder / PAGE, page(folder))
    print(folder / PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
