"""The page's charts: figures in, one inline SVG string out. Matplotlib is imported when a chart is drawn, not before.

Text stays text (the page's font, selectable, readable aloud); one SVG unit is one CSS pixel at the width asked for.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .comparison import FIGURES, figure
from .report_data import DeltaHistogram, LatencyProfile, ModelResult, TrainingCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#18222d", "#5a6672", "#dde3e8"
MODELS = ("#0b5fa5", "#8a95a1", "#b4690e", "#6b4c9a")  # the model shown, then what it is compared with
ZONES = {"near": "#d9822b", "mid": "#0b5fa5", "easy": "#9aa5b1"}
# Wong's colour-blind-safe palette, in an order whose neighbours differ in lightness too.
STAGES = ("#b9c2cb", "#5a6672", "#f0c75e", "#0b5fa5", "#7cc0ea", "#d59ac0", "#00795c", "#c2541b")
PARTS = {
    "total": "total",
    "kl": "relevance distribution (KL)",
    "infonce": "contrastive (InfoNCE)",
    "rank": "ranking over the TRNS negative",
    "attribute": "attribute margin",
    "presence": "attribute presence",
}
GOAL_AUC = 0.9

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


def comparison_chart(models: Sequence[ModelResult], *, width: int = 560) -> str:
    """A dot per model and figure with its 95 % interval, in percent."""
    rows = [(key, label) for key, label in FIGURES.items() if any(figure(m, key) for m in models)]

    def draw(canvas: Figure) -> None:
        axes = canvas.add_subplot()
        for i, model in enumerate(models):
            for y, (key, _) in enumerate(rows):
                if (f := figure(model, key)) is None:
                    continue
                place = y + (i - (len(models) - 1) / 2) * 0.26
                low, high = max(0.0, f.value - f.half), min(1.0, f.value + f.half)
                axes.plot([100 * low, 100 * high], [place, place], color=MODELS[i % len(MODELS)], linewidth=2, alpha=0.55)
                axes.plot(100 * f.value, place, "os"[i % 2], color=MODELS[i % len(MODELS)], markersize=7, markeredgecolor="white")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label for _, label in rows], color=INK, fontsize=12)
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent; bars are 95 % intervals over queries")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    names = " and ".join(m.name for m in models)
    return _svg("comparison", f"Recall and precision of {names} with 95 % intervals", width, 50 + 38 * len(rows), draw)


def auc_chart(auc: dict[str, float], *, width: int = 560) -> str:
    """One lollipop per attribute from 0.5 (a coin) to 1, with the goal marked."""

    def draw(canvas: Figure) -> None:
        axes = canvas.add_subplot()
        axes.plot([GOAL_AUC, GOAL_AUC], [-0.62, len(auc)], color=MUTED, linewidth=1, dashes=(3, 3))
        axes.text(
            GOAL_AUC,
            -0.72,
            f"goal {GOAL_AUC:g}",
            color=MUTED,
            ha="center",
            fontsize=11,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )
        for y, value in enumerate(auc.values()):
            if math.isnan(value):
                axes.text(0.505, y, "–", va="center", color=MUTED)
                continue
            axes.plot([0.5, value], [y, y], color=MODELS[0], linewidth=3)
            axes.plot(value, y, "o", color=MODELS[0], markersize=9, markeredgecolor="white")
            axes.annotate(f"{value:.3f}", (value, y), (10, 0), textcoords="offset points", va="center", fontsize=12)
        axes.set_yticks(range(len(auc)), list(auc), color=INK, fontsize=12)
        axes.set_ylim(len(auc) - 0.4, -1.1)
        lowest = min((v for v in auc.values() if not math.isnan(v)), default=0.5)
        axes.set_xlim(min(0.495, lowest - 0.03), 1.06)
        axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        axes.set_xlabel("AUC; 0.5 is chance")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    listed = ", ".join(f"{name} unknown" if math.isnan(value) else f"{name} {value:.3f}" for name, value in auc.items())
    return _svg("auc", f"Area under the ROC curve of the attribute weights: {listed}", width, 92 + 34 * len(auc), draw)


def delta_chart(histogram: DeltaHistogram, *, width: int = 560) -> str:
    """Bars coloured by zone, zones shaded, bounds marked."""
    h = histogram
    filled = [i for i, count in enumerate(h.counts) if count] or [0]
    first, last = h.edges[filled[0]], h.edges[filled[-1] + 1]  # empty bins at both ends are not drawn

    def zone(middle: float) -> str:
        return "near" if middle < h.lo else "mid" if middle <= h.hi else "easy"

    def draw(canvas: Figure) -> None:
        axes = canvas.add_subplot()
        spans = {"near": (h.edges[0], h.lo), "mid": (h.lo, h.hi), "easy": (h.hi, h.edges[-1])}
        for name, (left, right) in spans.items():
            axes.axvspan(max(left, h.edges[0]), min(right, h.edges[-1]), color=ZONES[name], alpha=0.10, linewidth=0)
        for left, right, count in zip(h.edges, h.edges[1:], h.counts, strict=False):
            axes.bar(left, count, width=(right - left) * 0.9, align="edge", color=ZONES[zone((left + right) / 2)])
        top = max(h.counts, default=1) or 1
        for name, bound, side in (("lo", h.lo, "right"), ("hi", h.hi, "left")):
            axes.axvline(bound, color=INK, linewidth=1, dashes=(3, 3))
            axes.annotate(
                f"{name} {bound:.3f}",
                (bound, top * 1.07),
                (-5 if side == "right" else 5, 0),
                textcoords="offset points",
                ha=side,
                fontsize=11,
            )
        axes.set_xlim(min(first, h.lo), max(last, h.hi))
        axes.set_ylim(0, top * 1.16)
        axes.yaxis.set_major_formatter(_short)
        axes.set_ylabel("pairs")
        axes.set_xlabel("Δ = s(q, target) − s(q, candidate)")
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)

    shares = f"near {100 * h.near_share:.1f} %, mid {100 * h.mid_share:.1f} %, easy {100 * h.easy_share:.1f} %"
    return _svg("delta", f"Histogram of delta scores; {shares}", width, 300, draw)


def curves_chart(curves: Sequence[TrainingCurve], *, width: int = 1200) -> str:
    """Small multiples: recall where measured, then one panel per loss part, a line per model that has it."""
    names = [n for n in PARTS if any(n in c.parts for c in curves)]
    names += sorted({n for c in curves for n in c.parts} - set(PARTS))
    panels: list[tuple[str, list[tuple[int, Sequence[tuple[float, float]]]]]] = []
    if any(c.recall for c in curves):
        panels.append(
            ("R@10 on the validation queries, %", [(i, [(x, 100 * y) for x, y in c.recall]) for i, c in enumerate(curves) if c.recall])
        )
    panels += [(f"loss: {PARTS.get(n, n)}", [(i, c.parts[n]) for i, c in enumerate(curves) if c.parts.get(n)]) for n in names]
    columns = min(3, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns)
    longest = max((x for _, lines in panels for _, line in lines for x, _ in line), default=1.0)
    unit, scale = ("minutes", 60.0) if longest >= 120 else ("seconds", 1.0)

    def draw(canvas: Figure) -> None:
        canvas.set_layout_engine("constrained", h_pad=10 / 72, w_pad=10 / 72)
        for k, (title, lines) in enumerate(panels):
            axes = canvas.add_subplot(rows, columns, k + 1)
            for i, line in reversed(lines):
                _curve(axes, [x / scale for x, _ in line], [y for _, y in line], MODELS[i % len(MODELS)], raw=not title.startswith("R@"))
            axes.set_title(title, color=INK, pad=8)
            axes.set_xlim(0, longest / scale)
            axes.set_ylim(bottom=0)
            axes.locator_params(nbins=5)
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)
            if k // columns == rows - 1 or k + columns >= len(panels):
                axes.set_xlabel(f"training, {unit}")

    return _svg("curves", f"Training curves of {' and '.join(c.model for c in curves)}", width, 40 + 210 * rows, draw)


def latency_chart(profiles: Sequence[LatencyProfile], *, width: int = 1200) -> str:
    """Medians of the stages stacked in one bar per profile; a tick marks the 95th percentile of whole queries."""
    stages = stage_names(profiles)

    def draw(canvas: Figure) -> None:
        axes = canvas.add_subplot()
        longest = max((max(p.total.p95_ms, p.total.p50_ms, sum(s.p50_ms for s in p.stages)) for p in profiles), default=1.0) or 1.0
        for y, profile in enumerate(profiles):
            start = 0.0
            for stage in (s for s in profile.stages if s.p50_ms > 0):
                axes.barh(
                    y, stage.p50_ms, left=start, height=0.46, color=stage_colour(stages, stage.stage), edgecolor="white", linewidth=0.8
                )
                if stage.p50_ms > 0.07 * longest:
                    text = f"{stage.stage} {stage.p50_ms:.1f}"
                    axes.text(
                        start + stage.p50_ms / 2,
                        y,
                        text,
                        ha="center",
                        va="center",
                        fontsize=11,
                        color=_on(stage_colour(stages, stage.stage)),
                    )
                start += stage.p50_ms
            axes.plot([profile.total.p95_ms] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=2)
            axes.text(profile.total.p95_ms, y - 0.36, f"p95 {profile.total.p95_ms:.1f}", ha="center", va="bottom", fontsize=11, color=MUTED)
        axes.set_yticks(range(len(profiles)), [p.name for p in profiles], color=INK, fontsize=12)
        axes.set_ylim(len(profiles) - 0.5, -0.7)
        axes.set_xlim(0, longest * 1.06)
        axes.set_xlabel("milliseconds per query, medians of the stages")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)

    listed = "; ".join(f"{p.name}: median {p.total.p50_ms:.1f} ms" for p in profiles)
    return _svg("latency", f"Latency by stage. {listed}", width, 56 + 66 * len(profiles), draw)


def stage_names(profiles: Sequence[LatencyProfile]) -> list[str]:
    """Every stage of any profile, in the order of the profile that has most."""
    ordered = sorted(profiles, key=lambda profile: -len(profile.stages))
    return list(dict.fromkeys(stage.stage for profile in ordered for stage in profile.stages))


def stage_colour(stages: Sequence[str], stage: str) -> str:
    return STAGES[stages.index(stage) % len(STAGES)]


def _on(colour: str) -> str:
    """White or ink, whichever reads better on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def _curve(axes: Axes, x: list[float], y: list[float], colour: str, *, raw: bool) -> None:
    """A line; noisy ones faintly, with a centred moving average over them."""
    if not raw or len(y) < 20:
        axes.plot(x, y, color=colour, linewidth=2, marker="o" if len(y) < 20 else None, markersize=4)
        return
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
    reach = max(2, len(y) // 40)
    windows = [y[max(0, i - reach) : i + reach + 1] for i in range(len(y))]
    axes.plot(x, [sum(w) / len(w) for w in windows], color=colour, linewidth=2)


def _short(value: float, _: float = 0) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _svg(name: str, label: str, width: int, height: int, draw: Any) -> str:
    """Draw on a fresh figure and return `<svg>` alone: no prolog, no metadata, ids prefixed, the same bytes every time."""
    from html import escape

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = _STYLE | {"svg.hashsalt": name}  # matplotlib types the keys as a Literal of its own version's
    with rc_context(style):
        canvas = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(canvas)
        raw = io.StringIO()
        canvas.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = raw.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"font-family: 'DejaVu Sans'; ", "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # would style the whole page
    head = f'<svg role="img" aria-label="{escape(label)}" class="chart" viewBox="0 0 {width} {height}">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, text).strip()
