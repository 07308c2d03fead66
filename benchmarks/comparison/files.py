"""Two result files of one benchmark, figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dqe_engine.errors import InputError

from ..report import milliseconds, table
from .bands import Change, change
from .figures import Results, read


@dataclass(frozen=True, slots=True)
class Comparison:
    """`notes`: what a reader must know before the figures, in sentences."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def compare_files(old: Path, new: Path, *, across_machines: bool = False) -> Comparison:
    """Raises InputError for files of different benchmarks, of different machines unless `across_machines`, or with nothing in common."""
    before, after = read(old), read(new)
    if before.benchmark != after.benchmark:
        raise InputError(f"{old} is of the benchmark {before.benchmark}, {new} of {after.benchmark}; pass two files of the same one")
    notes = [f"Old: {old}, commits {_commits(before)}. New: {new}, commits {_commits(after)}."]
    other = [name for name in before.machines if name in after.machines and before.machines[name] != after.machines[name]]
    if other:
        differ = f"{other[0]}: {before.machines[other[0]]} before, {after.machines[other[0]]} after"
        if not across_machines:
            raise InputError(f"the files come from different machines ({differ}); measure both on one, or pass --across-machines")
        notes.append(f"DIFFERENT MACHINES ({differ}): times say which machine is faster, not which version.")
    notes += _versions(before, after)
    for name in (name for name in before.workloads if name in after.workloads):
        if (was := before.workloads[name]) != (now := after.workloads[name]):
            raise InputError(f"section {name} is of different work, {was} in {old} and {now} in {new}; measure the same in both")
    names = [name for name in after.figures if name in before.figures]
    if not names:
        raise InputError(f"{old} and {new} have no figure in common: other sections, or other sizes (--quick); measure the same in both")
    only = [sum(name not in other.figures for name in mine.figures) for mine, other in ((before, after), (after, before))]
    if any(only):
        notes.append(f"Not compared: {only[0]} figures that only the old file has, {only[1]} that only the new one has.")
    return Comparison(tuple(change(before.figures[name], after.figures[name]) for name in names), tuple(notes))


def _commits(results: Results) -> str:
    return ", ".join(dict.fromkeys(results.commits.values()))


def _versions(before: Results, after: Results) -> list[str]:
    """A sentence on libraries that are not the same."""
    found: dict[str, None] = {}
    for section in (name for name in before.versions if name in after.versions):
        old, new = before.versions[section], after.versions[section]
        found |= dict.fromkeys(f"{name} {old.get(name)} → {new.get(name)}" for name in (old | new) if old.get(name) != new.get(name))
    return [f"Libraries differ too: {', '.join(found)}."] if found else []


def rendered(comparison: Comparison, *, markdown: bool) -> str:
    """Notes, every figure, and a last line that counts what changed."""
    header = ("figure", "old", "new", "new / old", "noise band", "from", "verdict")
    rows = [
        (
            c.name,
            _value(c, c.old),
            _value(c, c.new),
            f"{c.ratio:.3f}",
            f"{c.band[0]:.3f} to {c.band[1]:.3f}",
            c.basis,
            _verdict(c, markdown),
        )
        for c in comparison.changes
    ]
    body = table(header, rows) if markdown else _columns([header, *rows])
    return "\n\n".join((*comparison.notes, body, _explanation(comparison.changes)))


def _value(c: Change, value: float) -> str:
    return f"{milliseconds(value)} ms" if c.unit == "s" else f"{100 * value:.1f} %" if c.unit == "share" else f"{value:,.0f}"


def _verdict(c: Change, markdown: bool) -> str:
    if c.verdict == "within noise":
        return c.verdict if c.basis != "none" else "not judged"
    return f"**{c.verdict}**" if markdown else c.verdict.upper()


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _explanation(changes: Sequence[Change]) -> str:
    counts = {verdict: sum(c.verdict == verdict and c.basis != "none" for c in changes) for verdict in ("better", "worse", "within noise")}
    counts["not judged"] = sum(c.basis == "none" for c in changes)
    lines = [f"{len(changes)} figures: {', '.join(f'{count} {verdict}' for verdict, count in counts.items() if count)}."]
    lines.append(f"A band holds 95 % of ratios where nothing changed, so about {0.05 * len(changes):.1f} of these leave theirs by chance.")
    if any(c.basis == "samples" and c.unit == "s" for c in changes):
        lines.append("Bands from samples know the spread within a run alone, not that of the machine between runs, so they are too narrow.")
    return " ".join(lines)
