"""The demo's page: one self-contained HTML file from `ReportData`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dqe_engine.files import atomic_write

from .comparison import FIGURES, Figure, figure, verdict
from .report_data import ExampleQuery, ModelResult, ReportData

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Tile:
    """One headline number: label, value, and a line that puts it into proportion."""

    label: str
    value: str
    unit: str
    context: str


def render_report(data: ReportData, out: Path) -> None:
    """Write the page to `out`, whole or not at all. Raises InputError for an image that is missing or unreadable."""
    page = report_html(data)
    with atomic_write(Path(out), "w") as stream:
        stream.write(page)


def report_html(data: ReportData) -> str:
    """The page as text. Everything that comes from `data` is escaped."""
    import jinja2
    from markupsafe import Markup

    from . import charts
    from .thumbnails import data_uri

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "number": number,
        "size": size,
        "scientific": scientific,
        "sentence": sentence,
    }
    stages = charts.stage_names(data.latency)
    auc = weight_auc(data.models[0])
    drawn = {
        "comparison": charts.comparison_chart(data.models),
        "auc": charts.auc_chart(auc) if auc else None,
        "delta": charts.delta_chart(data.delta_histogram) if data.delta_histogram else None,
        "curves": charts.curves_chart(data.curves) if any(c.parts or c.recall for c in data.curves) else None,
        "latency": charts.latency_chart(data.latency) if data.latency else None,
    }
    page = environment.get_template(_TEMPLATE).render(
        data=data,
        ours=data.models[0],
        others=data.models[1:],
        summary=data.models[0].reports[0],
        tiles=tiles(data),
        columns=[(key, label) for key, label in FIGURES.items() if any(figure(m, key) for m in data.models)],
        figure=figure,
        reference_rows=reference_rows(data),
        verdicts=[(other, verdict(data.models[0], other)) for other in data.models[1:]],
        auc=auc,
        charts={name: Markup(svg) if svg else None for name, svg in drawn.items()},
        image=cache(lambda name: data_uri(data.image_root, name)),
        largest_weight=largest_weight,
        wall=wall_summary(data.examples),
        outcome=outcome,
        entered=entered,
        stages=[(name, charts.stage_colour(stages, name)) for name in stages],
        by_stage=lambda profile: {s.stage: s for s in profile.stages},
        model_colours=charts.MODELS,
        zone_colours=charts.ZONES,
        goal_auc=charts.GOAL_AUC,
    )
    return page.lstrip()


def tiles(data: ReportData) -> list[Tile]:
    """The headline numbers, each beside what it is to be held against."""
    ours = data.models[0]
    found: list[Tile] = []
    for key, label in (
        ("recall_at_10", "Recall@10"),
        ("attribute_precision_at_10", "Attribute precision@10"),
        ("heldout_recall_at_10", "Recall@10, unseen combinations"),
    ):
        if (value := figure(ours, key)) is None:
            continue
        against = [f"{m.name} {percent(f.value)} %" for m in data.models[1:2] if (f := figure(m, key))]
        found.append(Tile(label, percent(value.value), "%", against[0] if against else f"± {100 * value.half:.1f}"))
    if data.latency:
        first = data.latency[0]
        found.append(
            Tile(
                "Median query",
                f"{first.total.p50_ms:.1f}",
                "ms",
                f"{first.name[:1].lower()}{first.name[1:]}, p95 {first.total.p95_ms:.1f} ms",
            )
        )
    found.append(Tile("Training", *_split(duration(ours.training_seconds)), f"{number(ours.steps)} steps, {data.environment.cores} cores"))
    return found


def _split(text: str) -> tuple[str, str]:
    value, _, unit = text.partition(" ")
    return value, unit


def reference_rows(data: ReportData) -> list[tuple[str, dict[str, float], str]]:
    """(name, Report key → share, explanation): chance, and the most that can be expected where that is known."""
    first = data.models[0].reports[0]
    candidates = max(1, first.gallery - 1)
    chance = {f"recall_at_{k}": min(1.0, k / candidates) for k in (1, 5, 10, 50)}
    if first.heldout_recall_at_10 is not None:
        chance["heldout_recall_at_10"] = chance["recall_at_10"]
    rows = [("Chance", chance, "a random ranking of the gallery")]
    attainable = dict(data.attainable or {})
    if first.attainable_recall_at_1 is not None:
        attainable.setdefault("recall_at_1", first.attainable_recall_at_1)
    if attainable:
        rows.append(("Attainable", attainable, "several images answer a query equally well, one of them is labelled: the most to expect"))
    return rows


def weight_auc(model: ModelResult) -> dict[str, float]:
    """Mean over seeds, per attribute."""
    found = [r.weight_auc for r in model.reports if r.weight_auc]
    names = list(dict.fromkeys(name for auc in found for name in auc))
    return {n: _mean([auc[n] for auc in found if n in auc]) for n in names}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def wall_summary(examples: tuple[ExampleQuery, ...]) -> dict[str, Any]:
    """Counts over the queries shown, so that the wall says how it did instead of looking good."""
    return {
        "queries": len(examples),
        "found": sum(any(h.is_target for h in q.hits) for q in examples),
        "valid": sum(h.valid for q in examples for h in q.hits),
        "possible": sum(_possible(q) for q in examples),
        "held_out": sum(q.held_out for q in examples),
    }


def _possible(query: ExampleQuery) -> int:
    """How many of the hits could be valid: the gallery may hold fewer such images than there are hits."""
    return len(query.hits) if query.valid_images is None else min(query.valid_images, len(query.hits))


def outcome(query: ExampleQuery) -> str:
    """How one query went: "2 of 3 valid images found, labelled target at rank 2"."""
    valid = f"{sum(h.valid for h in query.hits)} of {_possible(query)} valid images found"
    places = [i for i, hit in enumerate(query.hits, start=1) if hit.is_target]
    rank = places[0] if places else query.target_rank
    if rank is None:
        return f"{valid}, labelled target not in the top {len(query.hits)}"
    return f"{valid}, labelled target at rank {rank:,}"


def entered(before: ExampleQuery, after: ExampleQuery) -> int:
    """How many hits of `after` were not among those of `before`."""
    return len({h.image for h in after.hits} - {h.image for h in before.hits})


def largest_weight(queries: Sequence[ExampleQuery]) -> float:
    """The weight that fills a bar, so that bars compare across `queries`."""
    return max((w for q in queries for w in q.weights.values()), default=1.0) or 1.0


def percent(value: float | Figure | None) -> str:
    """A share as a percentage with one decimal, a small one with two significant digits, a missing one as a dash."""
    share = value.value if isinstance(value, Figure) else value
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.2g}" if 0 < share < 0.005 else f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """0.42 → "0.42 s", 42 → "42 s", 252 → "4:12 min", 4000 → "1:06 h"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def number(value: float) -> str:
    return f"{value:,}"


def size(count: int) -> str:
    """Bytes in MB: 16_912_334 → "16.9 MB"."""
    return f"{count / 1e6:.1f} MB"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def scientific(value: float) -> str:
    """3.1e-06 → "3.1 × 10⁻⁶"; 0 stays "0"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
