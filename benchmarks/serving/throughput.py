"""Queries per second of several callers, each asking again as soon as it was answered; and of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..isolated import OwnProcess
from ..machine import limit_threads
from ..statistics import band, percentiles
from . import searchers as by
from .cases import EAGER, main_ways, open_way
from .setting import KINDS, Kind, Setting, workload


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers at once, each with batches of that size."""

    callers: int
    batch: int


LOADS = (Load(1, 1), Load(2, 1), Load(4, 1), Load(8, 1), Load(1, 8), Load(1, 64))
WORKERS = "PyTorch eager, a process a caller"
"""As servers of PyTorch models are deployed on processors: each with a thread and a copy of the model of its own."""


def throughput(
    setting: Setting, *, loads: Sequence[Load], blocks: int, seconds: float, step: Callable[[str], None], reached: Callable[[float], None]
) -> dict[str, Any]:
    """Each load on each way for `seconds`, `blocks` times over, each way in a process of its own (`WORKERS`: in several)."""
    ways, missing = main_ways(setting)
    plan = [(kind, load, name) for kind in KINDS for load in loads for name in (*ways, WORKERS) if name != WORKERS or load.callers > 1]
    rates: list[list[float]] = [[] for _ in plan]
    requests: list[list[list[float]]] = [[] for _ in plan]
    with ExitStack() as stack:
        processes = {name: [stack.enter_context(OwnProcess())] for name in ways}
        processes[WORKERS] = [stack.enter_context(OwnProcess()) for _ in range(max(load.callers for load in loads))]
        for block in range(blocks):
            for place, (kind, load, name) in enumerate(plan):
                step(f"{kind} reference, {load.callers} callers, batches of {load.batch}: {name}")
                reached((block + place / len(plan)) / blocks)
                rate, taken = _measured(processes[name], setting, name, kind, load, seconds)
                rates[place].append(rate)
                requests[place].append(taken)
    rows = [
        {
            "kind": kind,
            "name": name,
            "callers": load.callers,
            "batch": load.batch,
            "queries_per_s": float(np.median(found)),
            "band": band(found, around=float(np.median(found))),
            "blocks_queries_per_s": found,
            "request_ms": percentiles([value for block in taken for value in block]),
            "blocks": list(map(len, taken)),
            "samples_ms": [round(value, 3) for block in taken for value in block],
        }
        for (kind, load, name), found, taken in zip(plan, rates, requests, strict=True)
    ]
    return {"rows": rows, "missing": missing, "seconds_each": seconds}


def _measured(
    processes: Sequence[OwnProcess], setting: Setting, name: str, kind: Kind, load: Load, seconds: float
) -> tuple[float, list[float]]:
    if name != WORKERS:
        return processes[0].call(measure_load, setting, name, kind, load, seconds)
    each = replace(setting, threads=1), EAGER, kind, Load(1, load.batch)
    callers = processes[: load.callers]
    for opened in [process.begin(measure_load, *each, 0.0) for process in callers]:
        opened.result()
    found = [measured.result() for measured in [process.begin(measure_load, *each, seconds) for process in callers]]
    return sum(rate for rate, _ in found), [sample for _, taken in found for sample in taken]


def measure_load(setting: Setting, name: str, kind: Kind, load: Load, seconds: float) -> tuple[float, list[float]]:
    """`run_load` on the way of that name, after a tenth of the time that is not counted."""
    searcher = open_way(setting, name)
    limit_threads(setting.threads)
    enter = _one_torch_thread if name == EAGER else None
    run_load(searcher, setting, kind, load, seconds / 10, enter)
    return run_load(searcher, setting, kind, load, seconds, enter)


def _one_torch_thread() -> None:
    """Of this caller alone: each thread that calls PyTorch has an OpenMP team, and teams that outnumber the processors sleep and are
    woken in every operation (three times as long a query, and what is set in the first thread does not reach the others)."""
    import torch

    torch.set_num_threads(1)


def run_load(
    searcher: by.Searcher, setting: Setting, kind: Kind, load: Load, seconds: float, enter: Callable[[], None] | None = None
) -> tuple[float, list[float]]:
    """Queries per second, and the milliseconds of each request. Every caller asks at least once; what was begun in time is waited for.

    One caller is the thread that calls; several are threads of their own, which call `enter` first.
    """
    work = workload(setting)
    batches = [work.batch(kind, number, load.batch) for number in range(max(1, setting.pool // load.batch))]
    started = time.perf_counter()
    stop = started + seconds

    def call(caller: int) -> list[float]:
        taken: list[float] = []
        while not taken or time.perf_counter() < stop:
            begun = time.perf_counter()
            searcher.search(*batches[(caller + len(taken) * load.callers) % len(batches)], setting.k)
            taken.append((time.perf_counter() - begun) * 1e3)
        return taken

    if load.callers == 1:
        found = call(0)
    else:
        with ThreadPoolExecutor(load.callers, "caller", enter) as pool:
            found = [sample for samples in pool.map(call, range(load.callers)) for sample in samples]
    return len(found) * load.batch / (time.perf_counter() - started), found
