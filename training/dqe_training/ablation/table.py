"""table.md: means ± standard deviations, differences with intervals, and what follows from them in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .comparison import COSINE_FIGURES, FIGURES, ZONE_FIGURES, ArmResult, Comparison, shown
from .statistics import Difference, Summary


class Unit(NamedTuple):
    scale: float
    digits: int


PER_CENT, AS_IS = Unit(100, 1), Unit(1, 4)


def table(comparison: Comparison) -> str:
    """The page, in Markdown: shares in per cent, differences of cosines as they are, in a table of their own."""
    if not comparison.arms:
        return "No cell is finished yet.\n"
    figures, cosines, zone = (shown(comparison, names) for names in (FIGURES, COSINE_FIGURES, ZONE_FIGURES))
    parts = [
        f"{comparison.data}; equal {comparison.budget}; {'; '.join(comparison.machines)}.",
        _unfinished(comparison),
        "Mean ± standard deviation over seeds, in per cent.",
        _figures(comparison.arms, figures, work=True),
    ]
    others = [arm for arm in comparison.arms if arm.differences]
    if others:
        parts += [
            f"Difference from {comparison.against}, paired by seed and query, in percentage points, with 95 % intervals (Student's t over "
            "seeds and the normal distribution over queries, in quadrature). **Bold**: zero is outside.",
            _differences(others, figures),
            _in_words(others, figures, comparison.against),
        ]
    if cosines:
        parts += ["Differences of cosines, as they are:", _figures(comparison.arms, cosines, AS_IS)]
        if any(name in arm.differences for arm in others for name in cosines):
            parts += [f"Difference from {comparison.against}, as above, but not in points:", _differences(others, cosines, AS_IS)]
    if zone:
        parts += ["The mid zone when training ends, and what the last refresh picked (docs/method.md):", _figures(comparison.arms, zone)]
    if told := [[arm.label, ", ".join(arm.settings)] for arm in comparison.arms if arm.settings]:
        parts += [f"What an arm sets otherwise than {comparison.against}:", _rows(["", "settings"], told)]
    if comparison.left_out:
        parts.append("Left out, as no configuration can have it: " + "; ".join(comparison.left_out) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def _unfinished(comparison: Comparison) -> str:
    return f"**{comparison.unfinished} cells are not finished**; the same command goes on with them." if comparison.unfinished else ""


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(arms: Sequence[ArmResult], names: Mapping[str, str], unit: Unit = PER_CENT, *, work: bool = False) -> str:
    header = ["", *(("seeds", "steps", "seconds", "refreshes") if work else ()), *names.values()]
    rows = []
    for arm in arms:
        if not any(name in arm.figures for name in names):
            continue
        did = [str(len(arm.seeds)), *(_spell(value, Unit(1, 0)) for value in (arm.steps, arm.seconds, arm.refreshes))] if work else []
        rows.append([arm.label, *did, *(_spell(arm.figures.get(name), unit) for name in names)])
    return _rows(header, rows)


def _spell(summary: Summary | None, unit: Unit) -> str:
    if summary is None:
        return ""
    mean = f"{unit.scale * summary.mean:.{unit.digits}f}".replace("-", "−")
    return mean if not summary.deviation else f"{mean} ± {unit.scale * summary.deviation:.{unit.digits}f}"


def _differences(arms: Sequence[ArmResult], names: Mapping[str, str], unit: Unit = PER_CENT) -> str:
    return _rows(["", *names.values()], [[arm.label, *(interval(arm.differences.get(name), unit) for name in names)] for arm in arms])


def interval(difference: Difference | None, unit: Unit) -> str:
    """The difference with its interval, bold where that leaves zero out; empty for None."""
    if difference is None:
        return ""
    value, half = difference.value, difference.half
    if half is None:
        return f"{_signed(value, unit)} (one seed)"
    text = f"{_signed(value, unit)} [{_signed(value - half, unit)}, {_signed(value + half, unit)}]"
    return f"**{text}**" if difference.verdict in ("higher", "lower") else text


def _signed(value: float, unit: Unit) -> str:
    """0.061 in per cent -> +6.1, with a true minus sign."""
    return f"{unit.scale * value:+.{unit.digits}f}".replace("-", "−")


def _in_words(arms: Sequence[ArmResult], names: Mapping[str, str], against: str) -> str:
    found = [(arm.label, name, arm.differences[name]) for arm in arms for name in names if name in arm.differences]
    if all(difference.verdict == "one seed" for _, _, difference in found):
        return "With one seed the spread between trainings is unknown: nothing can be concluded. Run more with `--seeds`."
    judged = [(label, name, difference) for label, name, difference in found if difference.half is not None]
    clear = [f"{label} {names[name]} {difference.verdict}" for label, name, difference in judged if difference.verdict != "unclear"]
    said = f"Against {against}: {', '.join(clear)}." if clear else f"No figure of any arm differs measurably from {against}'s."
    halves = sorted(100 * difference.half for _, _, difference in judged if difference.half is not None)
    return (
        f"{said} Of {len(judged)} intervals, one in twenty leaves zero outside by chance. Their half-widths are {halves[0]:.1f} to "
        f"{halves[-1]:.1f} points, {halves[len(halves) // 2]:.1f} at the median: smaller differences cannot be seen here."
    )
