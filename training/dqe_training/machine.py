"""How much of the processors other processes take while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dqe_engine.processors import affinity

BUSY = 0.15
"""Share of the processors' time that others take, from which on measured times are too long."""


def processor_seconds() -> tuple[float, float] | None:
    """Since the system started, of the processors that this process may use: working, and in all. None where there is no /proc/stat."""
    try:
        lines = Path("/proc/stat").read_text(errors="replace").splitlines()
    except OSError:
        return None
    working = passed = 0.0
    names = {f"cpu{number}" for number in affinity()}
    for line in lines:
        name, *ticks = line.split()
        if name in names:
            of = [int(value) / os.sysconf("SC_CLK_TCK") for value in ticks[:8]]  # guests are in user
            passed += sum(of)
            working += sum(of) - of[3] - of[4]  # idle, and idle while something is read
    return (working, passed) if passed else None


class Company:
    """What other processes took of the processors' time while this one worked `with` it, once or several times.

    Not the load average, which remembers minutes. Children of this process count as others.
    """

    def __init__(self) -> None:
        self._others = self._passed = 0.0

    def __enter__(self) -> None:
        self._before = processor_seconds(), time.process_time()

    def __exit__(self, *error: object) -> None:
        (before, ours_before), after = self._before, processor_seconds()
        if before is not None and after is not None:
            self._others += after[0] - before[0] - (time.process_time() - ours_before)
            self._passed += after[1] - before[1]

    @property
    def share(self) -> float | None:
        """From 0 to 1; None where the system does not say, or too little time passed for its clock."""
        return min(1.0, max(0.0, self._others / self._passed)) if self._passed > 0 else None
