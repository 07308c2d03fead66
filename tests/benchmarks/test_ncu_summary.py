"""What is read off a profile of kernels."""

from __future__ import annotations

from benchmarks.ncu_summary import summary

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def test_a_launch_is_two_lines_with_the_largest_stalls_first() -> None:
    stalls = {"wait": "2.5", "barrier": "1,000.5", "selected": "1", "membar": "no data", "drain": "0.1", "gmma": "0.2", "sleeping": "0"}
    names = ["Kernel Name", "Grid Size", "gpu__time_duration.sum", "gpu__time_duration.max", *(STALL.format(name) for name in stalls)]
    values = ["scan<1>", "(1, 2, 1)", "10,528", "99", *stalls.values()]
    units = ["", "", "ns", "ns", *("" for _ in stalls)]
    lines = ["==PROF== Connected"] + [",".join(f'"{cell}"' for cell in row) for row in (names, units, values, values)]
    first, waits, *second = summary(lines)
    assert first == "scan<1>, grid (1, 2, 1): duration 10,528 ns"
    assert waits == "  stalls: barrier 1000.50, wait 2.50, selected 1.00, gmma 0.20, drain 0.10"
    assert second == [first, waits]


def test_nothing_profiled_is_said() -> None:
    assert summary(["==ERROR== The user does not have permission"]) == ["no launch was profiled"]
