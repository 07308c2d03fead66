"""The demo's page and picture: every figure there, text escaped, nothing fetched, and the verdict computed."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from dqe_engine.contracts.parsing import parse_json, to_json
from dqe_engine.errors import InputError
from dqe_export.demo.comparison import FIGURES, compare, figure, verdict
from dqe_export.demo.picture import write_picture
from dqe_export.demo.report import duration, outcome, percent, render_report, report_html, scientific, sentence
from dqe_export.demo.report_data import (
    Agreement,
    DatasetSizes,
    DeltaHistogram,
    Environment,
    ExampleHit,
    ExampleQuery,
    LatencyProfile,
    ModelResult,
    ModelSize,
    OverrideExample,
    ReportData,
    StageLatency,
    TrainingCurve,
    curve_from_metrics,
)
from dqe_training.evaluation.protocol import Report


def report(recall: float = 0.643, **changes: Any) -> Report:
    figures: dict[str, Any] = {
        "queries": 1000,
        "gallery": 5001,
        "recall_at_1": recall / 3,
        "recall_at_5": recall / 1.3,
        "recall_at_10": recall,
        "recall_at_50": recall + (1 - recall) / 2,
        "recall_at_10_interval": (recall - 0.0295, recall + 0.0295),
    }
    return Report(**figures | changes)


def model(name: str, *recalls: float, margin: float | None = 0.02, **changes: Any) -> ModelResult:
    margins = {} if margin is None else dict.fromkeys(FIGURES, margin)
    reports = tuple(report(r, **changes) for r in recalls)
    return ModelResult(name=name, reports=reports, training_seconds=301.0, steps=2210, margins=margins)


def query(text: str = "in teal", *, target: int | None = 2, rank: int | None = None) -> ExampleQuery:
    hits = tuple(
        ExampleHit(
            image=f"{i}.jpg",
            score=0.9 - i / 50,
            delta=i / 50,
            valid=i < 3,
            is_target=i == target,
            misfit=() if i < 3 else ("length",),
            label=f"coat {i}",
        )
        for i in range(10)
    )
    weights = {"colour": 1.37, "shape": 0.04}
    return ExampleQuery(
        reference="10.jpg", text=text, target="11.jpg", hits=hits, weights=weights, named=("colour",), held_out=True, target_rank=rank
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(12):
        Image.linear_gradient("L").resize((96, 96)).rotate(30 * i).convert("RGB").save(folder / f"{i}.jpg")
    return folder


def minimal(**changes: Any) -> ReportData:
    parts: dict[str, Any] = {
        "models": (model("DQE-CIR", 0.643), model("InfoNCE baseline", 0.411)),
        "dataset": DatasetSizes(name="garments", train_images=12_345, train_triplets=48_001, gallery_images=5001, val_queries=1000),
        "model_size": ModelSize(parameters=3_912_448, bundle_bytes=16_912_334),
        "environment": Environment(cpu="Some CPU", cores=2, python="3.12.4", versions={"torch": "2.8.7"}, date="2026-03-01"),
        "seconds": {"Train DQE-CIR": 301.0, "Page": 3.41},
    }
    return ReportData(**parts | changes)


@pytest.fixture(scope="module")
def full(images: Path) -> ReportData:
    dqe = model(
        "DQE-CIR", 0.643, heldout_queries=166, heldout_recall_at_10=0.5241, map_at_10=0.571, map_at_50=0.602,
        attribute_precision_at_10=0.7022, attainable_precision_at_10=0.613, attainable_recall_at_1=0.263,
        weight_auc={"colour": 0.9812, "length": 0.8934},
    )  # fmt: skip
    stages = (StageLatency(stage="query", p50_ms=3.61, p95_ms=4.72), StageLatency(stage="search", p50_ms=1.43, p95_ms=1.84))
    total = StageLatency(stage="total", p50_ms=5.17, p95_ms=6.93)
    curve = TrainingCurve(model="DQE-CIR", parts={"kl": ((1.0, 3.0), (2.0, 2.0)), "own": ((1.0, 1.0),)}, recall=((1.0, 0.2), (2.0, 0.6)))
    return minimal(
        models=(dqe, model("InfoNCE baseline", 0.411)),
        image_root=str(images),
        examples=(query(), query("make it longer", target=None, rank=1234)),
        overrides=(OverrideExample(attribute="colour", factor=3, predicted=query(), overridden=query()),),
        curves=(curve,),
        latency=(LatencyProfile(name="Catalogue reference", queries=321, stages=stages, total=total),),
        delta_histogram=DeltaHistogram(
            edges=(-0.1, 0.2, 0.5, 0.8),
            counts=(5, 20, 75),
            lo=0.123,
            hi=0.456,
            near_share=0.051,
            mid_share=0.202,
            easy_share=0.747,
            queries=222,
        ),
        agreement=Agreement(queries=987, runtime_top10_agreement=0.9987, embedding_max_abs_diff=3.1e-6, recall_identical=True),
        attainable={"recall_at_10": 0.941},
        zones_note="Bounds are pooled.",
    )


@pytest.fixture(scope="module")
def page(full: ReportData) -> str:
    return report_html(full)


class Checker(HTMLParser):
    """Collects links, image alternatives, ids and unclosed elements."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.alts: list[str | None] = []
        self.ids: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [(tag, values[k] or "") for k in ("src", "href") if k in values]
        if tag == "img":
            self.alts.append(values.get("alt"))
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


@pytest.mark.parametrize(
    "figure",
    [
        "64.3", "21.4", "49.5", "82.2", "61.4 to 67.2", "52.4", "70.2", "57.1", "60.2", "61.3", "26.3", "94.1", "41.1", "0.02",  # the table
        "1,000", "166", "5,001", "2,210", "5:01",
        "0.900", "0.880", "Δ 0.020", "1.37", "0.04", "≠ length", "rank 3", "rank 1,234", "1 of 2", "6 of 20", "×3",  # queries
        "0.981", "0.893",   # weights
        "0.123", "0.456", "5.1", "20.2", "74.7", "222",  # zones
        "3.61", "4.72", "1.43", "1.84", "5.17", "6.93", "321",  # latency
        "99.9", "987", "3.1 × 10⁻⁶", "recall identical",  # agreement
        "12,345", "48,001", "3,912,448", "16.9 MB", "3.41 s", "2.8.7", "3.12.4", "Some CPU", "2026-03-01", "make demo",
    ],
)  # fmt: skip
def test_page_contains_every_figure(page: str, figure: str) -> None:
    assert figure in page


def test_page_is_self_contained_and_well_formed(page: str) -> None:
    found = checked(page)
    outside = [(tag, link) for tag, link in found.links if not link.startswith(("data:image/", "#"))]
    assert outside == [("a", "https://arxiv.org/abs/2603.04037")]
    assert "<script" not in page
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert all(found.alts)
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(found.ids)


def test_page_is_the_same_every_time() -> None:
    assert report_html(minimal()) == report_html(minimal())


def test_text_is_escaped(full: ReportData) -> None:
    nasty = '<script>alert("1")</script> & "quotes" <b>'
    example = msgspec.structs.replace(query(nasty), reference_label='"><img src=x>')
    named = msgspec.structs.replace(model("<i>DQE</i>", 0.6), note="<u>")
    text = report_html(minimal(examples=(example,), models=(named,), command="<script>x", image_root=full.image_root))
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#34;1&#34;)" in text
    assert "<i>DQE" not in text
    assert "<img src=x" not in text
    checked(text)


def test_optional_parts_may_be_missing() -> None:
    text = report_html(minimal())
    checked(text)
    for section in ("queries", "override", "weights", "delta", "curves", "latency"):
        assert f'id="{section}"' not in text
    assert "64.3" in text
    alone = report_html(minimal(models=(model("DQE-CIR", 0.643),), seconds={}))
    assert "nothing is compared" in alone
    checked(alone)


def test_missing_values_show_as_a_dash() -> None:
    dqe = model("DQE-CIR", 0.6, map_at_10=float("nan"), weight_auc={"colour": float("nan"), "shape": 0.95})
    text = report_html(minimal(models=(dqe, model("Other", 0.6))))
    assert "nan" not in re.sub(r"[A-Za-z]nan|nan[A-Za-z]", "", text)
    assert "Below the goal: colour" in text


def test_failed_page_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(InputError, match=r"10\.jpg: no such image file"):
        render_report(minimal(examples=(query(),), image_root=str(tmp_path)), out)
    assert list(tmp_path.iterdir()) == []


def test_render_writes_the_page(tmp_path: Path) -> None:
    render_report(minimal(), tmp_path / "demo" / "report.html")
    assert (tmp_path / "demo" / "report.html").read_text(encoding="utf-8") == report_html(minimal())


def test_verdict_follows_the_figures() -> None:
    better = verdict(model("DQE", 0.64), model("base", 0.41))
    assert better[0].startswith("DQE beats the base on all 4 figures")
    assert not any("worse" in s or "No measurable" in s for s in better)

    close = verdict(model("DQE", 0.64), model("base", 0.63))
    assert close[0] == "DQE does not beat the base on any figure."
    assert close[1].startswith("No measurable difference on R@1 (+0.3 ± ")

    worse = verdict(model("DQE", 0.41), model("base", 0.64))
    assert "DQE is worse on R@1 (−7.7 ± 2.0), R@5 (−17.7 ± 2.0), R@10 (−23.0 ± 2.0) and R@50 (−11.5 ± 2.0)." in worse

    mixed = ModelResult(name="DQE", reports=(report(0.64, recall_at_1=0.5, recall_at_50=0.2),), training_seconds=1, steps=1)
    sentences = verdict(mixed, model("base", 0.64))
    assert sentences[0] == "DQE beats the base on R@1 (+28.7)."
    assert sentences[1].startswith("No measurable difference on R@5")
    assert sentences[2] == "DQE is worse on R@50 (−62.0 ± 2.0)."
    assert "spread between trainings is not measured" in sentences[-1]


def test_verdict_is_on_the_page(full: ReportData, page: str) -> None:
    assert all(sentence in page for sentence in verdict(*full.models))
    worse = report_html(minimal(models=(model("DQE-CIR", 0.41), model("InfoNCE baseline", 0.64))))
    assert "DQE-CIR is worse on" in worse
    assert "DQE-CIR beats" not in worse


def test_seeds_that_disagree_are_no_difference() -> None:
    ours, other = model("DQE", 0.70, 0.60), model("base", 0.55, 0.61)
    outcomes = {d.label: d.outcome for d in compare(ours, other)}
    assert outcomes["R@10"] == "unclear"
    assert {d.outcome for d in compare(model("DQE", 0.76, 0.70), other)} == {"better"}
    text = report_html(minimal(models=(ours, other)))
    assert "2 seeds each" in text
    assert "seeds 60.0 to 70.0" in text
    assert "One seed of DQE and 2 seeds of base" in verdict(model("DQE", 0.7), other)[-1]


def test_difference_needs_more_than_its_margin() -> None:
    """The margin of the paired difference, not the 4.17 points that the models' own intervals of ± 2.95 add up to."""
    for gap, expected in ((0.019, "unclear"), (0.021, "better"), (-0.021, "worse")):
        found = {d.label: d for d in compare(model("a", 0.5 + gap, margin=None), model("b", 0.5))}["R@10"]
        assert (found.outcome, found.margin) == (expected, 0.02)
    unknown = {d.outcome for d in compare(model("a", 0.9), model("b", 0.5, margin=None))}
    assert unknown == {"unclear"}
    assert "±" not in verdict(model("a", 0.9), model("b", 0.5, margin=None))[1]


def test_an_interval_by_query_is_taken_where_it_is_known() -> None:
    """Wilson's takes each query's average precision for yes or no, and is too wide."""
    plain = model("a", 0.5, map_at_10=0.69)
    known = msgspec.structs.replace(plain, halves={"map_at_10": 0.0201})
    wide, narrow = (figure(one, "map_at_10") for one in (plain, known))
    assert wide is not None
    assert narrow is not None
    assert (round(wide.half, 4), narrow.half) == (0.0286, 0.0201)


def test_models_without_common_figures_are_not_compared() -> None:
    nothing = {f"recall_at_{k}": float("nan") for k in (1, 5, 10, 50)}
    assert "cannot be compared" in verdict(model("a", 0.5, **nothing), model("b", 0.5))[0]


def test_formats() -> None:
    assert [duration(s) for s in (0.42, 42, 59.6, 252, 4000)] == ["0.42 s", "42 s", "1:00 min", "4:12 min", "1:06 h"]
    assert [percent(v) for v in (0.6434, 1.0, 0.0, 0.0002, None, math.nan)] == ["64.3", "100.0", "0.0", "0.02", "–", "–"]
    assert [scientific(v) for v in (3.14e-6, 0.0, 12.0)] == ["3.1 × 10⁻⁶", "0", "1.2 × 10¹"]
    assert [sentence(t) for t in ("bounds at 1", "Done.")] == ["Bounds at 1.", "Done."]
    assert outcome(query(target=None)) == "3 of 10 valid images found, labelled target not in the top 10"
    assert outcome(msgspec.structs.replace(query(target=None), valid_images=4)).startswith("3 of 4 valid images found")


def test_data_survives_json(full: ReportData) -> None:
    assert parse_json(ReportData, to_json(full), where="report data") == full


def test_contradictory_data_is_refused() -> None:
    with pytest.raises(ValueError, match="2 counts need 3 edges, got 2"):
        DeltaHistogram(edges=(0, 1), counts=(1, 2), lo=0, hi=1, near_share=0, mid_share=1, easy_share=0, queries=1)
    with pytest.raises(ValueError, match="no reports"):
        ModelResult(name="DQE", reports=(), training_seconds=1, steps=1)
    with pytest.raises(ValueError, match="different queries"):
        ModelResult(name="DQE", reports=(report(), report(queries=10)), training_seconds=1, steps=1)
    with pytest.raises(ValueError, match="no models"):
        minimal(models=())


def test_curve_from_metrics(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"event":"step","step":1,"epoch":0,"seconds":0.5,"loss/kl":4.1,"loss/total":4.5}\n'
        '{"event":"refresh","epoch":1,"seconds":2.0}\n'
        '{"event":"step","step":2,"epoch":1,"seconds":3.0,"loss/kl":3.9,"loss/rank":0.2,"loss/total":4.2}\n',
        encoding="utf-8",
    )
    curve = curve_from_metrics("DQE", log)
    assert curve.parts == {"kl": ((0.5, 4.1), (3.0, 3.9)), "total": ((0.5, 4.5), (3.0, 4.2)), "rank": ((3.0, 0.2),)}
    log.write_text('{"event":"step"', encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        curve_from_metrics("DQE", log)
    with pytest.raises(InputError, match="no such file"):
        curve_from_metrics("DQE", tmp_path / "absent.jsonl")


def test_large_and_odd_images_are_embedded_small(images: Path, tmp_path: Path) -> None:
    from dqe_export.demo.thumbnails import data_uri, open_thumbnail

    Image.effect_noise((900, 600), 60).save(tmp_path / "big.png")
    assert open_thumbnail(str(tmp_path), "big.png").size == (192, 128)
    assert data_uri(str(tmp_path), "big.png").startswith("data:image/jpeg;base64,")
    assert len(data_uri(str(tmp_path), "big.png")) < 40_000
    assert data_uri(str(images), "0.jpg").startswith("data:image/jpeg;base64,/9j/")


def test_picture(full: ReportData, tmp_path: Path) -> None:
    long = query("make it " + "very " * 80 + "long")
    data = msgspec.structs.replace(full, examples=(query(), long, query("plus long en été"), query("W" * 300)))
    write_picture(data, tmp_path / "a.jpg", rows=3)
    write_picture(data, tmp_path / "b.jpg")
    with Image.open(tmp_path / "a.jpg") as three, Image.open(tmp_path / "b.jpg") as four:
        assert three.width == four.width == 1200
        assert four.height > three.height
    assert (tmp_path / "b.jpg").stat().st_size < 300_000
    with pytest.raises(InputError, match=r"\.jpg"):
        write_picture(data, tmp_path / "a.png")
    with pytest.raises(InputError, match="no queries"):
        write_picture(minimal(), tmp_path / "c.jpg")
