"""The times in an export's report: how far apart the calls were, and whether the machine was busy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dqe_engine.contracts.graphs import GRAPHS
from dqe_engine.contracts.parsing import parse_json
from dqe_export import latency
from dqe_export.latency import BATCHES, Spread, time_graphs
from dqe_export.report import ExportReport, report_html
from dqe_training.checkpointing.checkpoint import load_checkpoint
from dqe_training.machine import BUSY

pytestmark = pytest.mark.usefixtures("one_thread")


def test_spread_is_of_the_calls() -> None:
    assert Spread.of([0.004, 0.001, 0.002, 0.005, 0.003]) == Spread(p25=2.0, median=3.0, p75=4.0)
    assert Spread.of([0.25]) == Spread(p25=250.0, median=250.0, p75=250.0)


@pytest.fixture
def report(bundle_path: Path) -> ExportReport:
    return parse_json(ExportReport, (bundle_path / "report.json").read_bytes(), where="report")


def test_the_report_says_how_noisy_its_times_are(report: ExportReport) -> None:
    assert [graph.graph for graph in report.graphs] == [spec.name for spec in GRAPHS]
    for graph in report.graphs:
        assert [measured.batch for measured in graph.latency] == list(BATCHES)
        for measured in graph.latency:
            assert 1 <= measured.calls <= 20
            for spread in (measured.pytorch, measured.runtime):
                assert 0 < spread.p25 <= spread.median <= spread.p75
    assert report.company is None or 0 <= report.company <= 1


def test_calls_end_when_they_took_long_enough(checkpoint_path: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_checkpoint(checkpoint_path).model
    for limits, calls in ((((3, 0.0),), 3), (((1000, 0.0), (2, 1e-9)), 2)):
        monkeypatch.setattr(latency, "_CALLS", limits)
        found, _ = time_graphs(model, bundle_path)
        assert {measured.calls for graph in found.values() for measured in graph} == {calls}


@pytest.mark.parametrize(
    ("company", "said", "marked"),
    [
        (None, "How busy the machine was meanwhile is not known.", False),
        (BUSY, "Other processes took 15 % of the processors' time meanwhile.", False),
        (0.43, "The machine was busy: other processes took 43 % of the processors' time", True),
    ],
)
def test_the_page_says_whether_the_machine_was_busy(report: ExportReport, company: float | None, said: str, marked: bool) -> None:
    page = report_html(msgspec.structs.replace(report, company=company))
    assert said in page
    assert ('<p class="busy">' in page) == marked
    first = report.graphs[0].latency[0].pytorch
    assert f"{first.median:.2f} ms<br><small>{first.p25:.2f} to {first.p75:.2f}</small>" in page
