"""plot.png: every arm's difference from the first one, with its interval and its single seeds. Imports Matplotlib when called."""

from __future__ import annotations

from pathlib import Path

from dqe_engine.files import atomic_write

from .comparison import FIGURES, Comparison, shown

INK, MUTED, RULE, CLEAR = "#18222d", "#5a6672", "#dde3e8", "#0b5fa5"
_SHOWN = ("recall_at_10", "subset_recall_at_1", "map_at_10", "attribute_precision_at_10", "near_confusion", "heldout_recall_at_10")


def plot(comparison: Comparison, path: Path) -> bool:
    """Write the picture; False, and nothing, where no two arms can be compared. One panel a figure, one row an arm."""
    arms = [arm for arm in comparison.arms if arm.differences]
    names = {name: title for name, title in shown(comparison, FIGURES).items() if name in _SHOWN}
    if not arms or not names:
        return False
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(1.5 + 2.3 * len(names), 1.5 + 0.42 * len(arms)), dpi=150, layout="constrained")
    panels = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        axes.axvline(0, color=MUTED, linewidth=1)
        for y, arm in enumerate(arms):
            if (difference := arm.differences.get(name)) is None:
                continue
            colour = CLEAR if difference.verdict in ("higher", "lower") else MUTED
            seeds = [100 * value for value in difference.values]
            axes.plot(seeds, [y + 0.25] * len(seeds), "o", color=INK, alpha=0.4, markersize=3)
            if difference.half is not None:
                ends = [100 * (difference.value - difference.half), 100 * (difference.value + difference.half)]
                axes.plot(ends, [y, y], color=colour, linewidth=2)
            axes.plot(100 * difference.value, y, "o", color=colour, markersize=7, markeredgecolor="white")
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.grid(axis="x", color=RULE)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8, colors=MUTED)
        axes.locator_params(axis="x", nbins=5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    panels[0].set_yticks(range(len(arms)), [arm.label for arm in arms], color=INK, fontsize=9)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    said = f"percentage points from {comparison.against}, equal {comparison.budget}"
    canvas.supxlabel(f"{said}; bars are 95 % intervals, blue where zero is outside, dots are seeds", fontsize=8, color=MUTED)
    with atomic_write(path) as stream:
        canvas.savefig(stream, format="png")
    return True
