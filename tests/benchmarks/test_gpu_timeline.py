from __future__ import annotations

from benchmarks.gpu_timeline import CALL, Span, timeline


def test_a_timeline_has_gaps_overlaps_and_the_host() -> None:
    """A kernel that starts early counts once; a gap before it is negative."""
    call = Span(CALL, 100.0, 400.0)
    kernels = [Span("scan", 148.0, 330.0), Span("begin", 130.0, 135.0), Span("sample", 140.0, 150.0)]
    *lines, total = timeline(call, kernels)
    assert [line.split()[-1] for line in lines] == ["begin", "sample", "scan"]
    assert [float(line.split("gap")[1].split()[0]) for line in lines] == [0.0, 5.0, -2.0]
    assert total == "call 300.0 us: device 195.0, host before 30.0, gaps 5.0, host after 70.0"


def test_a_kernel_within_another_adds_nothing() -> None:
    *_, total = timeline(Span(CALL, 0.0, 50.0), [Span("a", 10.0, 40.0), Span("b", 20.0, 30.0)])
    assert "device 30.0" in total
    assert "host after 10.0" in total
    assert timeline(Span(CALL, 0.0, 1.0), []) == ["no kernel was seen"]
