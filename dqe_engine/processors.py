"""How many processors this process may use: what the machine has, what it was confined to, and what its container is given."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_CGROUPS, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@cache
def available_cpus() -> int:
    """What "one thread per processor" means: processors of this process's affinity, no more than its container's quota, rounded up.

    Asked once: the answer takes microseconds, of which a small search has two hundred.
    """
    quota = core_quota()
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def give_way(niceness: int) -> None:
    """Lower this thread's priority by `niceness` (0 to 19), and so that of the threads it starts from now on. It can't be taken back. Only
    Linux has priorities of threads; elsewhere nothing happens."""
    if niceness:
        be_as_nice_as(niceness_here() + niceness)


def niceness_here() -> int:
    """Of this thread; 0 where threads have none."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 0


def be_as_nice_as(niceness: int) -> None:
    """Lower this thread's priority to that of this niceness, unless the thread that started it has one as low."""
    if sys.platform == "linux" and niceness_here() < niceness:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, niceness))


def affinity() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> int:
    """How many processors this process may use. A container's quota is apart: see `core_quota`."""
    return len(affinity())


def core_quota() -> float | None:
    """How many processors' time the container may take in all, such as 1.5; None for no limit."""
    quotas = []
    for group in control_groups("cpu"):
        both = read_text(group / "cpu.max").split() or [read_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(value.isdecimal() for value in both) and int(both[1]):  # not "max", and not -1
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def control_groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, innermost first, of either version of the interface."""
    for line in read_text(_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controllers
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == root or root in folder.parents)


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
