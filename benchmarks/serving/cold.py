"""From the start of a process to its first answer, the engine beside PyTorch, in turns; and what a serving process holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..statistics import band
from .cases import EAGER, OURS, gpu_not_measured
from .searchers import TorchFiles
from .setting import Setting, workload

WAYS = {OURS: "engine", EAGER: "torch"}
PHASES = ("interpreter", "imported", "ready", "first answer", "served")
_ROOT = Path(__file__).parents[2]


def cold(setting: Setting, *, repetitions: int, step: Callable[[str], None], reached: Callable[[float], None]) -> dict[str, Any]:
    """Milliseconds since the spawn at the end of each phase. Files are in the page cache after the first start, which is not counted."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for repetition in range(-1, repetitions):
        for name, way in WAYS.items():
            step(f"{name}: start {max(repetition + 1, 0)} of {repetitions}")
            started = start(setting, way)
            if repetition >= 0:
                found[name].append(started)
        reached((repetition + 1) / repetitions)
    rows = [{"name": name, "starts": starts, **_summary(starts)} for name, starts in found.items()]
    return {"rows": rows, "missing": gpu_not_measured()}


def start(setting: Setting, way: str) -> dict[str, Any]:
    """One start; after the first answer, queries alternate between the two kinds of reference."""
    work = workload(setting)
    described = {
        "bundle": str(setting.bundle.absolute()), "index": str(setting.index_of("f32").absolute()),
        "threads": setting.threads, "k": setting.k,
        "references": [work.ids[row] for row in work.rows],
        "files": [str(setting.data.absolute() / "images" / work.ids[row]) for row in work.rows],
        "texts": work.texts, "torch": asdict(TorchFiles.of(setting)),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.serving.start", way, str(time.monotonic_ns()), json.dumps(described)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"a cold start of {way} ended with code {done.returncode}: {done.stderr[-500:]}")
    started: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return started


def _summary(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by phase, with bands: every start is a block of its own."""
    out = {}
    for phase in PHASES:
        times = [one["phases"][phase]["ms"] for one in starts]
        median = float(np.median(times))
        resident = float(np.median([one["phases"][phase]["resident_bytes"] for one in starts]))
        out[phase] = {"median_ms": median, "band": band(times, around=median), "resident_bytes": resident}
    return {"phases": out, "peak_bytes": float(np.median([one["peak_bytes"] for one in starts]))}
