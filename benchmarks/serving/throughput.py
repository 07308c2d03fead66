"""Queries per second of several callers that share one engine, each asking again as soon as it was answered; and of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..statistics import band, percentiles
from . import searchers as by
from .cases import EAGER, OURS, main_ways
from .setting import KINDS, Kind, Setting, workload


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers at once, each with batches of that size."""

    callers: int
    batch: int


@dataclass(frozen=True, slots=True)
class Way:
    """A searcher, and the threads that PyTorch gives each query: its pool is one for the process, so it is set before each run."""

    name: str
    searcher: by.Searcher
    torch_threads: int | None = None


ONE_THREAD = ", 1 thread a query"
LOADS = (Load(1, 1), Load(2, 1), Load(4, 1), Load(8, 1), Load(1, 8), Load(1, 64))


def throughput(
    setting: Setting, *, loads: Sequence[Load], blocks: int, seconds: float, step: Callable[[str], None], reached: Callable[[float], None]
) -> dict[str, Any]:
    """Each load on each way for `seconds`, `blocks` times over. Several callers also with one thread a query."""
    plan = [(kind, load, way) for kind in KINDS for load in loads for way in _ways(setting, load)]
    rates: list[list[float]] = [[] for _ in plan]
    requests: list[list[float]] = [[] for _ in plan]
    for block in range(blocks):
        for place, (kind, load, way) in enumerate(plan):
            step(f"{kind} reference, {load.callers} callers, batches of {load.batch}: {way.name}")
            reached((block + place / len(plan)) / blocks)
            _set_torch_threads(way.torch_threads)
            run_load(way.searcher, setting, kind, load, seconds / 10)  # warm
            rate, taken = run_load(way.searcher, setting, kind, load, seconds)
            rates[place].append(rate)
            requests[place] += taken
    _set_torch_threads(setting.threads)
    rows = [
        {
            "kind": kind,
            "name": way.name,
            "callers": load.callers,
            "batch": load.batch,
            "queries_per_s": float(np.median(found)),
            "band": band(found, around=float(np.median(found))),
            "blocks_queries_per_s": found,
            "request_ms": percentiles(taken),
            "samples_ms": [round(value, 3) for value in taken],
        }
        for (kind, load, way), found, taken in zip(plan, rates, requests, strict=True)
    ]
    return {"rows": rows, "missing": main_ways(setting)[1], "seconds_each": seconds}


def _ways(setting: Setting, load: Load) -> list[Way]:
    searchers, _ = main_ways(setting)
    ways = [Way(name, searcher, setting.threads if name == EAGER else None) for name, searcher in searchers.items()]
    if load.callers > 1 and setting.threads > 1:
        ours = by.ours(replace(setting, threads=1), "f32")
        ways += [Way(OURS + ONE_THREAD, ours), Way(EAGER + ONE_THREAD, searchers[EAGER], 1)]
    return ways


def _set_torch_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def run_load(searcher: by.Searcher, setting: Setting, kind: Kind, load: Load, seconds: float) -> tuple[float, list[float]]:
    """Queries per second, and the milliseconds of each request. Every caller asks at least once; what was begun in time is waited for."""
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

    with ThreadPoolExecutor(load.callers, thread_name_prefix="caller") as pool:
        found = [sample for samples in pool.map(call, range(load.callers)) for sample in samples]
    return len(found) * load.batch / (time.perf_counter() - started), found
