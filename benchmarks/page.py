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
    "latency": ("Latency, end to end", "latency"),
    "query-full-size": ("A query at BLIP-2's full size", "query_full_size"),
    "recall": ("Recall: precisions, storage, approximation", "recall"),
    "zones": ("Zone kernels", "bench_zones --full"),
    SHORT: ("Zone kernels, a short run", "bench_zones --short"),
    "train": ("Training", "train_throughput"),
    "export": ("Exports at full size", "export_full_size"),
}
"""By the name of the result file: a title, and what follows `python -m benchmarks.` to measure it."""
WORDS = (
    "A *target* is a goal that the project set itself: *asked* is the goal, *measured* the ratio or figure with its 95 % interval over "
    "repeated calls, *met* whether it reaches the goal. [Performance](../../../docs/performance.md) has the main figures in words, and "
    "says why targets are missed and how other processors differ. The load average counts other programs and the run's own threads."
)
PAGE = "README.md"


def page(folder: Path) -> str:
    """Markdown: of each benchmark in `folder`, when and on what it ran, its targets, its plots, and where its tables are."""
    parts = [f"# Measured: {folder.name}", "Written by `python -m benchmarks.page`; [how it is measured](../../README.md).", WORDS]
    for name, (title, command) in BENCHMARKS.items():
        if name == SHORT and (folder / "zones.json").exists():
            continue
        results = report.load(folder / f"{name}.json", "zones" if name == SHORT else name)
        if results["sections"]:
            ran = [f"`python -m benchmarks.{command}`. {_ran(results)}", *_on(results)]
            parts += [f"## {title}", " ".join(ran), *_targets(results), *_plots(folder, name), _links(folder, name)]
    return "\n\n".join(parts) + "\n"


def _ran(results: dict[str, Any]) -> str:
    lines = dict[str, list[str]]()
    for name, section in results["sections"].items():
        on = section.get("machine", {})
        commit = f"commit {(on.get('commit') or 'unknown')[:10]}{' with local changes' if on.get('dirty') else ''}"
        lines.setdefault(f"{section.get('started', '')[:10]}, {commit}", []).append(name)
    return "; ".join(f"{when}: {', '.join(names)}" for when, names in lines.items()) + "."


def _on(results: dict[str, Any]) -> list[str]:
    """The machine and versions of the first section, and the least and most load before a section."""
    sections = list(results["sections"].values())
    loads = sorted(section["load_before"][0] for section in sections if "load_before" in section)
    if not loads or "machine" not in sections[0]:
        return []
    on = sections[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version)
    kind = f"{on['cpu']}, {on['cores']} cores{', virtual' if on.get('virtual') else ''}, {on['memory_bytes'] / 2**30:.0f} GiB"
    return [f"{kind}; {versions}. Load average before: {loads[0]:.1f} to {loads[-1]:.1f}."]


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
