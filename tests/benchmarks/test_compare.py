"""The comparison of result files and of versions: figures found, bands that hold, what is refused, and exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare, pinned
from benchmarks.comparison import versions, workload
from benchmarks.comparison.bands import change, paired_change
from benchmarks.comparison.figures import Figure, read
from dqe_engine.errors import InputError

MACHINE = {"cpu": "Abacus 3000", "cores": 2, "commit": "0123456789abcdef", "versions": {"numpy": "2.0"}}


def timing(samples: list[float], blocks: list[int] | None = None) -> dict[str, Any]:
    return {"median_s": float(np.median(samples)), "samples_s": samples} | ({"blocks": blocks} if blocks else {})


def zones_file(path: Path, seconds: float, *, benchmark: str = "zones", machine: dict[str, Any] = MACHINE, label: str = "N = 10") -> Path:
    """One contender timed twice, of which the one alone counts, and a spread of half a per cent."""
    samples = [seconds * (1 + 0.001 * (at % 7 - 3)) for at in range(21)]
    contender = {"name": "ours", "interleaved": timing([9.0, 9.1]), "alone": timing(samples), "counted": "alone", "median_s": seconds}
    skipped = {"name": "theirs", "interleaved": None, "alone": None, "counted": None, "median_s": None}
    section = {"machine": machine, "threads": 2, "cases": [{"label": label, "contenders": [contender, skipped]}]}
    path.write_text(json.dumps({"schema": 1, "benchmark": benchmark, "sections": {"top-k": section}}))
    return path


def recall_file(path: Path, ranks: list[int]) -> Path:
    row = {"name": "ours", "figures": {}, "per_query": {"rank": ranks, "overlap": [1.0] * len(ranks)}}
    section = {"machine": MACHINE, "threads": 2, "rows": [row, {"name": "x", "status": "left out"}]}
    path.write_text(json.dumps({"schema": 1, "benchmark": "recall", "sections": {"storage": section}}))
    return path


# -- figures ----------------------------------------------------------------------------------------------------------------


def test_the_counted_timing_is_the_figure(tmp_path: Path) -> None:
    found = read(zones_file(tmp_path / "a.json", 0.5))
    (figure,) = found.figures.values()
    assert figure.name == "top-k / N = 10 / ours"
    assert figure.value == pytest.approx(0.5)
    assert found.machines == {"top-k": "cpu Abacus 3000, cores 2, threads 2"}


def test_outcomes_by_query_are_shares(tmp_path: Path) -> None:
    figures = read(recall_file(tmp_path / "a.json", [1, 7, 0, 40])).figures
    assert {name.rpartition(" / ")[2]: figure.value for name, figure in figures.items()} == {
        "recall_at_1": 0.25, "recall_at_5": 0.25, "recall_at_10": 0.5, "recall_at_50": 0.75, "overlap_at_10": 1
    }  # fmt: skip
    assert all(figure.paired and not figure.lower_is_better for figure in figures.values())


def test_trainings_are_figures_of_each_version(tmp_path: Path) -> None:
    trainings = [
        {"version": version, "seed": seed, "triplets": 100, "steps_s": 2.0, "wall_s": 3.0 + seed, "recall_at_10": 0.5}
        for seed in (1, 0) for version in ("old", "now")
    ]  # fmt: skip
    path = tmp_path / "train.json"
    path.write_text(
        json.dumps({"schema": 1, "benchmark": "train", "sections": {"against old": {"machine": MACHINE, "trainings": trainings}}})
    )
    figures = read(path).figures
    assert figures["against old / now / triplets per second"].value == 50
    assert figures["against old / old / wall"].samples.tolist() == [3, 4]
    assert len(figures) == 6


def test_rows_in_milliseconds_and_rates_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"name": "ours", "items": items, "tokens": 8, "blocks": [2, 1], "search_ms": {"p50": 2.0, "samples": [1.0, 2.0, 3.0]}}
        for items in (10, 20)
    ]  # fmt: skip
    rows.append({"name": "ours", "kind": "catalogue", "callers": 4, "samples_ms": [4.0, 6.0], "blocks_queries_per_s": [10.0, 20.0]})
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"schema": 1, "benchmark": "latency", "sections": {"gallery": {"machine": MACHINE, "rows": rows}}}))
    figures = read(path).figures
    assert {name: figure.value for name, figure in figures.items()} == {
        "gallery / ours, items 10, tokens 8 / search": 0.002, "gallery / ours, items 20, tokens 8 / search": 0.002,
        "gallery / ours, kind catalogue, callers 4 / request": 0.005, "gallery / ours, kind catalogue, callers 4 / queries per second": 15,
    }  # fmt: skip
    assert figures["gallery / ours, items 10, tokens 8 / search"].blocks == (2, 1)
    assert not figures["gallery / ours, kind catalogue, callers 4 / queries per second"].lower_is_better


@pytest.mark.parametrize("benchmark", ["zones", "train"])
def test_results_that_are_kept_here_can_be_read(benchmark: str) -> None:
    (path,) = (Path(compare.__file__).parent / "results").glob(f"intel-*/{benchmark}.json")
    assert len(read(path).figures) > 5


# -- bands ------------------------------------------------------------------------------------------------------------------


def figure(samples: Any, blocks: tuple[int, ...] = (), **options: Any) -> Figure:
    return Figure("f", np.asarray(samples, np.float64), blocks=blocks, **options)


@pytest.mark.parametrize("blocks", [(), (10, 10, 10, 10)])
def test_a_band_holds_what_did_not_change_and_not_what_did(blocks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)

    def run(slower: float) -> Figure:
        state = np.repeat(rng.normal(0, 0.03 if blocks else 0, 4), 10)  # the machine's, for as long as a block
        return figure(slower * np.exp(state + rng.normal(0, 0.02, 40)), blocks)

    unchanged = [change(run(1), run(1)).verdict for _ in range(200)]
    assert unchanged.count("within noise") >= 180
    assert all(change(run(1), run(1.5)).verdict == "worse" for _ in range(20))
    assert all(change(run(1.5), run(1)).verdict == "better" for _ in range(20))


def test_blocks_widen_a_band() -> None:
    steady = [1.0, 1.01, 0.99] * 3
    drifting = [1.0, 1.01, 0.99, 1.2, 1.21, 1.19, 0.8, 0.81, 0.79]
    assert change(figure(steady, (3, 3, 3)), figure(drifting, (3, 3, 3))).basis == "blocks"
    narrow, wide = change(figure(steady), figure(drifting)), change(figure(steady, (3, 3, 3)), figure(drifting, (3, 3, 3)))
    assert wide.band[1] > narrow.band[1]
    assert change(figure(steady, (5, 4)), figure(steady, (5, 4))).basis == "samples"  # two blocks say little of a third


def test_a_share_that_falls_is_worse() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.8).astype(float)
    after = np.where(np.arange(500) < 40, 0, before)
    shares: dict[str, Any] = {"unit": "share", "lower_is_better": False, "paired": True}
    found = change(figure(before, **shares), figure(after, **shares))
    assert found.ratio < 1
    assert found.verdict == "worse"
    assert found.regressed(1.01)
    assert not found.regressed(2)
    assert change(figure(before, **shares), figure(before, **shares)).verdict == "within noise"


@pytest.mark.parametrize(("old", "new"), [([1.0], [2.0]), ([0.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])])
def test_what_has_no_band_is_not_judged(old: list[float], new: list[float]) -> None:
    found = change(figure(old), figure(new))
    assert found.basis == "none"
    assert found.verdict == "within noise"
    assert not found.regressed(1)


def test_turns_are_judged_by_the_ratio_within_a_round() -> None:
    """The machine gets slower by half over the run; the versions stay three per cent apart."""
    state = np.linspace(1, 1.5, 7)
    found = paired_change("f", list(state), list(1.03 * state * np.array([1.002, 0.998, 1.001, 1, 0.999, 1.001, 0.999])))
    assert found.ratio == pytest.approx(1.03, abs=1e-3)
    assert found.verdict == "worse"
    assert paired_change("f", list(state), list(state * np.array([1.1, 0.9, 1.05, 1, 0.95, 1.1, 0.9]))).verdict == "within noise"
    assert math.isnan(paired_change("f", [1.0], [2.0]).band[0])


# -- the command ------------------------------------------------------------------------------------------------------------


def test_a_regression_is_said_and_ends_with_1_only_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = zones_file(tmp_path / "old.json", 0.5), zones_file(tmp_path / "new.json", 0.6)
    assert compare.main([str(old), str(new)]) == 0
    assert "1.200" in (text := capsys.readouterr().out)
    assert "WORSE" in text
    assert "1 worse" in text
    assert compare.main([str(old), str(new), "--fail-above", "1.1"]) == 1
    assert "worse by more than 1.1: top-k / N = 10 / ours" in capsys.readouterr().err
    assert compare.main([str(old), str(new), "--fail-above", "1.3"]) == 0
    assert compare.main([str(new), str(old), "--fail-above", "1"]) == 0
    capsys.readouterr()
    assert compare.main([str(old), str(new), "--markdown"]) == 0
    assert "| top-k / N = 10 / ours | 500 ms | 600 ms | 1.200 |" in capsys.readouterr().out


def test_different_machines_are_refused_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = zones_file(tmp_path / "old.json", 0.5)
    new = zones_file(tmp_path / "new.json", 0.5, machine=MACHINE | {"cpu": "Slide rule", "versions": {"numpy": "2.1"}})
    assert compare.main([str(old), str(new)]) == 2
    assert "different machines" in capsys.readouterr().err
    assert compare.main([str(old), str(new), "--across-machines"]) == 0
    text = capsys.readouterr().out
    assert "DIFFERENT MACHINES" in text
    assert "Slide rule" in text
    assert "numpy 2.0 → 2.1" in text


def _write(text: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "no such file or directory; check the path; expected a JSON that a benchmark wrote"),
        (_write("{"), "not valid JSON"),
        (_write("[]"), "this is something else, not the results of a benchmark"),
        (_write('{"benchmark": "zones", "sections": {}, "schema": 99}'), "schema version 99 is newer than the supported 2; upgrade"),
        (lambda path: zones_file(path, 0.5, benchmark="latency"), "of the benchmark zones"),
        (lambda path: zones_file(path, 0.5, label="N = 20"), "no figure in common"),
    ],
)
def test_bad_files_end_with_2_and_one_line(
    make: Callable[[Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = zones_file(tmp_path / "old.json", 0.5)
    assert compare.main([str(old), str(make(tmp_path / "new.json"))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "pass two result files"),
        (["a.json"], "pass two result files"),
        (["a.json", "b.json", "--pinned", "main"], "pass two result files"),
        (["a.json", "b.json", "--only", "zones"], "--only chooses what --pinned measures"),
        (["--pinned", "main", "--rounds", "2"], "expected 3 or more"),
        (["a.json", "b.json", "--fail-above", "0.9"], "expected a factor of 1 or more"),
    ],
)
def test_bad_options_end_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# -- versions ---------------------------------------------------------------------------------------------------------------


def test_turns_alternate() -> None:
    order = [(number, name) for number, name, _ in pinned.turns({"old": Path("a"), "now": Path("b")}, 3)]
    assert order == [(0, "now"), (0, "old"), (1, "old"), (1, "now"), (2, "now"), (2, "old")]


def test_a_pinned_comparison_is_of_medians_within_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(version: str, commands: Path, section: str, options: Any) -> dict[str, list[float]]:
        calls.append(version)
        return {"case": [2.0, 2.0, 9.0] if version == versions.PRESENT else [1.0, 1.0, 5.0]}

    monkeypatch.setattr(pinned, "install", lambda commit, work: tmp_path)
    monkeypatch.setattr(versions, "run", run)
    found = versions.compare_versions("abc", ["zones"], rounds=3, work=tmp_path, demo=tmp_path)
    (result,) = found.changes
    assert result.name == "zones / case"
    assert result.ratio == pytest.approx(2)
    assert sorted(calls) == ["abc"] * 3 + [versions.PRESENT] * 3


def test_the_workload_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    options = versions.workload_options("zones", Path("none")) | {"items": 200}
    found = versions.run(versions.PRESENT, pinned.present(), "zones", options)
    assert {f"top 50, B = {batch}" for batch in workload.BATCHES} < found.keys()
    assert all(len(samples) >= workload.CALLS and min(samples) > 0 for samples in found.values())
    with pytest.raises(InputError, match="loaded the present tree's package"):
        versions.run("abc", pinned.present(), "zones", options)


def test_a_version_that_cannot_run_a_section_is_named() -> None:
    with pytest.raises(InputError, match=r"abc cannot run search \(.*no-such-bundle.*--only"):
        versions.run("abc", Path(sys.executable).parent, "search", {"bundle": "no-such-bundle"})


def test_unknown_commits_and_a_missing_demo_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--pinned", "no-such-commit", "--only", "zones"]) == 2
    assert "--pinned no-such-commit: no such commit here" in capsys.readouterr().err
    assert compare.main(["--pinned", "no-such-commit", "--only", "search", "--demo", str(tmp_path)]) == 2
    assert "make demo" in capsys.readouterr().err


def test_a_build_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def install(commit: str, into: Path) -> Path:
        raise subprocess.CalledProcessError(1, ["pip", "install"])

    monkeypatch.setattr(pinned, "install", install)
    assert compare.main(["--pinned", "HEAD", "--only", "zones"]) == 2
    assert "cannot be built; pip ended with code 1" in capsys.readouterr().err
