"""Bands and intervals by hand and by simulation; timings in blocks; results on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report, sections
from benchmarks.harness import Agreement, AnswerMismatchError, Contender, Rounds, Timing, Turns, interleave, ratio
from benchmarks.serving.fit import fit
from benchmarks.statistics import band, percentiles, wilson
from dqe_training import machine as training_machine


def test_the_band_by_hand() -> None:
    medians = [1.0, 2.0, 4.0]  # logarithms 0, ln 2, 2 ln 2: standard deviation ln 2
    spread = 4.303 * math.log(2) * math.sqrt(4 / 3)
    assert band(medians, around=2.0) == pytest.approx((2 * math.exp(-spread), 2 * math.exp(spread)))
    assert band([3.0, 3.0, 3.0], around=3.0) == (3.0, 3.0)


@pytest.mark.parametrize("medians", [[], [1.0], [1.0, 1.1], [0.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
def test_no_band_from_too_little(medians: list[float]) -> None:
    assert band(medians, around=1.0) is None


@pytest.mark.parametrize("blocks", [3, 4, 6, 12])
def test_another_block_falls_into_the_band(blocks: int) -> None:
    """95 % of the time, where blocks differ at random; four standard errors of 2,000 draws."""
    rng = np.random.default_rng(blocks)
    inside, draws = 0, 2000
    for _ in range(draws):
        *seen, another = np.exp(0.2 * rng.standard_normal(blocks + 1)).tolist()
        found = band(seen, around=float(np.exp(np.mean(np.log(seen)))))
        assert found is not None
        inside += found[0] <= another <= found[1]
    assert inside / draws == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / draws))


def test_percentiles_of_one_to_hundred() -> None:
    assert percentiles(np.arange(101.0)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def test_a_timing_survives_its_record() -> None:
    timing = Timing.of_blocks([[0.1, 0.2, 0.3], [0.2], [0.2, 0.4]])
    assert timing.blocks == (3, 1, 2)
    assert [block.tolist() for block in timing.by_block] == [[0.1, 0.2, 0.3], [0.2], [0.2, 0.4]]
    assert timing.median == 0.2
    assert Timing.of(json.loads(json.dumps(timing.record()))) == timing
    plain = Timing((0.1, 0.2))
    assert plain.band is None
    assert "blocks" not in plain.record()
    assert Timing.of(plain.record()) == plain


def test_ratios_know_the_spread_between_blocks() -> None:
    """Blocks that differ widen the interval; blocks that differ alike for both contenders do not."""
    rng = np.random.default_rng(0)
    noise = lambda: 1 + 0.01 * rng.standard_normal(20)  # noqa: E731
    apart = Timing.of_blocks([(level * noise()).tolist() for level in (1.0, 1.5, 2.0, 2.5)])
    alike = Timing.of_blocks([(0.5 * level * noise()).tolist() for level in (1.0, 1.5, 2.0, 2.5)])
    steady = Timing.of_blocks([noise().tolist() for _ in range(4)])
    times, low, high = ratio(apart, steady)
    assert low < times < high
    assert high / low > 1.5
    times, low, high = ratio(apart, alike)
    assert times == pytest.approx(2, rel=0.05)
    assert high / low < 1.1
    assert ratio(apart, alike) == ratio(apart, alike)  # seeded


class _Counting:
    """A case of two contenders that count their calls; `wrong` gives a wrong answer."""

    label = "counting"

    def __init__(self, *, wrong: bool = False) -> None:
        self.calls = {"one": 0, "two": 0}
        self._wrong = wrong

    def describe(self) -> dict[str, object]:
        return {}

    def small(self) -> _Counting:
        return self

    def inputs(self) -> None:
        return None

    def contenders(self) -> list[Contender]:
        def prepare(name: str) -> object:
            def run() -> int:
                self.calls[name] += 1
                return self.calls[name]

            return lambda inputs: run

        two = Contender("two", prepare("two"), lambda raw: raw[-1] + self._wrong, checked_calls=3)
        return [
            Contender("one", prepare("one"), lambda raw: 3), two, Contender("three", prepare("one"), unavailable=lambda: "not run: no GPU"),
            Contender("four", prepare("one"), package="no_such_package"),
        ]  # fmt: skip

    def checker(self, inputs: None) -> object:
        return lambda answer: Agreement(answer == 3, 0.0, 1.0, f"got {answer}, expected 3")


def test_turns_in_blocks() -> None:
    case = _Counting()
    turns = Turns(case, Rounds(minimum=2, maximum=4, seconds=0.0))
    assert case.calls == {"one": 1, "two": 3}  # checked; warm already, as nothing takes less than no time
    for _ in range(3):
        turns.block()
    one, two, three, four = turns.results()
    assert one.interleaved is not None
    assert two.interleaved is not None
    assert one.interleaved.blocks == two.interleaved.blocks == (2, 2, 2)
    assert (three.status, three.interleaved) == ("not run: no GPU", None)
    assert (four.status, four.best) == ("not installed", None)
    (first, *_) = interleave(_Counting(), Rounds(minimum=2, maximum=4, seconds=0.0))
    assert first.interleaved is not None
    assert first.interleaved.blocks == ()


def test_a_wrong_answer_is_never_timed() -> None:
    case = _Counting(wrong=True)
    with pytest.raises(AnswerMismatchError, match="counting: two: got 4, expected 3"):
        Turns(case, Rounds())
    assert case.calls == {"one": 1, "two": 3}


def test_results_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    assert report.load(path, "latency") == {
        "kind": "benchmark-results", "schema_version": report.SCHEMA, "benchmark": "latency", "sections": {}
    }  # fmt: skip
    results = report.load(path, "latency")
    results["sections"]["query"] = {"samples_s": [1e-07, 2.5, -3], "name": "[1, 2]", "band_s": None, "empty": [], "nested": [[1, 2], [3]]}
    report.save_json(path, results)
    assert report.load(path, "latency") == results
    assert "[ 1e-07, 2.5, -3 ]" in path.read_text()
    assert report.load(path, "zones")["sections"] == {}  # another benchmark's
    path.write_text(json.dumps(results | {"schema_version": report.SCHEMA + 1}))
    assert report.load(path, "latency")["sections"] == {}
    path.write_text("{")
    assert report.load(path, "latency")["sections"] == {}
    with pytest.raises(ValueError, match="Out of range"):
        report.save_json(path, {"sections": {"query": math.nan}})


def test_a_fit_finds_the_costs_again(rng: np.random.Generator) -> None:
    points = [{"call": 1.0, "bytes": b, "flops": f, "idle": x} for b, f, x in rng.random((12, 3)) * (1e9, 1e10, 1.0)]
    cost = {"call": 2e-4, "bytes": 5e-11, "flops": 3e-12, "idle": 0.0}
    seconds = [sum(cost[name] * point[name] for name in cost) for point in points]
    found = fit(points, seconds)
    assert found.coefficients == pytest.approx(cost, rel=1e-6, abs=1e-9)
    other = {"call": 1.0, "bytes": 2e9, "flops": 1e8, "idle": 3.0}
    assert found.error(other, 2 * found(other)) == pytest.approx(-0.5)


def test_a_fit_has_no_negative_costs() -> None:
    """Time falls with the second term; the best non-negative coefficient is 0."""
    points = [{"call": 1.0, "x": float(x)} for x in range(1, 6)]
    found = fit(points, [2.0, 1.9, 1.8, 1.7, 1.6])
    assert found.coefficients["x"] == 0.0
    assert 1.6 < found.coefficients["call"] < 2.0


@pytest.mark.parametrize(("taken", "said"), [(0.5, None), (6.0, 0.6)])
def test_a_machine_is_busy_by_what_is_taken_now(monkeypatch: pytest.MonkeyPatch, taken: float, said: float | None) -> None:
    readings = iter([(1000.0, 5000.0), (1000.0 + taken, 5010.0)])
    monkeypatch.setattr(training_machine, "processor_seconds", lambda: next(readings))
    monkeypatch.setattr(sections, "_LOOK_SECONDS", 0.0)
    assert sections.busy() == (said if said is None else pytest.approx(said, abs=0.01))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    """The last row is the example of Newcombe (1998), table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), rel=0, abs=5e-5)
