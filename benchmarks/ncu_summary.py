"""A few lines per kernel launch of what `ncu --csv --page raw` wrote: duration, how busy memory and tensor cores were, why warps waited.

python -m benchmarks.ncu_summary ncu.csv
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_SHOWN = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe",
    "sm__issue_active.avg.pct_of_peak_sustained_active": "issue active",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
}
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_STALLS = 5


def summary(lines: Iterable[str]) -> list[str]:
    """Two lines per launch. Stalls: warps that waited for that reason, per issued instruction; the largest first."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))  # the rest is what ncu says about itself
    if not rows:
        return ["no launch was profiled"]
    names, units, *launches = rows
    shown = []
    for launch in launches:
        values = dict(zip(names, zip(launch, units, strict=True), strict=True))
        figures = [f"{short} {' '.join(values[name])}" for name, short in _SHOWN.items() if name in values]
        stalls = sorted(((_number(values[name][0]), found[1]) for name in names if (found := _STALL.fullmatch(name))), reverse=True)
        shown.append(f"{values['Kernel Name'][0][:90]}, grid {values['Grid Size'][0]}: {', '.join(figures)}")
        shown.append("  stalls: " + ", ".join(f"{name} {value:.2f}" for value, name in stalls[:_STALLS]))
    return shown


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "no data"
        return 0.0


def main() -> int:
    print("\n".join(summary(Path(sys.argv[1]).read_text().splitlines())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
