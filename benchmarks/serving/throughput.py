"""Queries per second of several callers that share one engine, each asking again as soon as it was answered; and of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import band, percentiles
from . import searchers as by
from .cases import EAGER, INT8, OURS
from .setting import KINDS, Kind, Setting, workload


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers at once, each with batches of that size."""

    callers: int
    batch: int


LOADS = (Load(1, 1), Load(2, 1), Load(4, 1), Load(8, 1), Load(1, 8), Load(1, 64))


def throughput(
    setting: Setting, *, loads: Sequence[Load], blocks: int, seconds: float, step: Callable[[str], None], reached: Callable[[float], None]
) -> dict[str, Any]:
    """Each load on each way for `seconds`, `blocks` times over."""
    ways: dict[str, by.Searcher] = {OURS: by.ours(setting, "f32"), EAGER: by.pytorch(setting)}
    if setting.int8_missing is None:
        ways[INT8] = by.ours(setting, "int8")
    plan = [(kind, load, name) for kind in KINDS for load in loads for name in ways]
    rates: list[list[float]] = [[] for _ in plan]
    requests: list[list[float]] = [[] for _ in plan]
    for block in range(blocks):
        for place, (kind, load, name) in enumerate(plan):
            step(f"{kind} reference, {load.callers} callers, batches of {load.batch}: {name}")
            reached((block + place / len(plan)) / blocks)
            run_load(ways[name], setting, kind, load, seconds / 10)  # warm; threads start
            rate, taken = run_load(ways[name], setting, kind, load, seconds)
            rates[place].append(rate)
            requests[place] += taken
    rows = [
        {
            "kind": kind, "name": name, "callers": load.callers, "batch": load.batch, "queries_per_s": float(np.median(found)),
            "band": band(found, around=float(np.median(found))), "blocks_queries_per_s": found,
            "request_ms": percentiles(taken), "samples_ms": [round(value, 3) for value in taken],
        }
        for (kind, load, name), found, taken in zip(plan, rates, requests, strict=True)
    ]  # fmt: skip
    missing = {} if setting.int8_missing is None else {INT8: setting.int8_missing}
    return {"rows": rows, "missing": missing, "seconds_each": seconds}


def run_load(searcher: by.Searcher, setting: Setting, kind: Kind, load: Load, seconds: float) -> tuple[float, list[float]]:
    """Queries per second, and the milliseconds of each request. A request that was begun in time is waited for and counted."""
    work = workload(setting)
    batches = [work.batch(kind, number, load.batch) for number in range(max(1, setting.pool // load.batch))]
    started = time.perf_counter()
    stop = started + seconds

    def call(caller: int) -> list[float]:
        taken, number = [], caller
        while (begun := time.perf_counter()) < stop:
            searcher.search(*batches[number % len(batches)], setting.k)
            taken.append((time.perf_counter() - begun) * 1e3)
            number += load.callers
        return taken

    with ThreadPoolExecutor(load.callers, thread_name_prefix="caller") as pool:
        found = [sample for samples in pool.map(call, range(load.callers)) for sample in samples]
    return len(found) * load.batch / (time.perf_counter() - started), found
