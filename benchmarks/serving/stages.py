"""Where a query's time goes: the stages of the engine beside the same stages in PyTorch, block by block in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..harness import SETTLE_SECONDS
from ..isolated import OwnProcess
from ..machine import limit_threads
from ..statistics import band, percentiles
from .cases import ZONES, main_ways, open_way
from .setting import KINDS, Kind, Setting, workload

STAGES = ("decode", "preprocess", "tokenise", "vision", "query", "attributes", "compose", "search")
"""As `SearchResult.timings_ms` names them. In PyTorch, attributes and composing are inside "query"."""
OTHER, TOTAL = "other", "total"
"""What no stage has: building results, checks of arguments. `TOTAL` is the whole call, by a clock around it."""
WARM_QUERIES = 5
"""Before each block: another process had the caches."""

Block = list[dict[str, float]]
"""Milliseconds by stage, of each query."""


def stages(setting: Setting, *, queries: int, blocks: int, step: Callable[[str], None], reached: Callable[[float], None]) -> dict[str, Any]:
    """Milliseconds of `blocks` times `queries` single queries, for each kind of reference and each way in a process of its own."""
    ways, missing = main_ways(setting)
    ways = [*ways, ZONES]
    taken: dict[tuple[Kind, str], list[Block]] = {(kind, name): [] for kind in KINDS for name in ways}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(OwnProcess()) for name in ways}
        for block in range(blocks):
            for place, (kind, name) in enumerate(taken):
                step(f"{kind} reference, block {block + 1} of {blocks}: {name}")
                reached((block + place / len(taken)) / blocks)
                taken[kind, name].append(processes[name].call(measure_block, setting, name, kind, block * queries, queries))
    rows = [{"kind": kind, "name": name, "stages": _summary(found)} for (kind, name), found in taken.items()]
    return {"rows": rows, "missing": missing, "queries": queries * blocks}


def measure_block(setting: Setting, name: str, kind: Kind, first: int, count: int) -> Block:
    """Milliseconds of each of `count` queries by stage, after a few that are not counted."""
    searcher, work = open_way(setting, name), workload(setting)
    limit_threads(setting.threads)
    samples: Block = []
    for number in range(first - WARM_QUERIES, first + count):
        references, texts = work.batch(kind, number, 1)
        time.sleep(SETTLE_SECONDS)
        started = time.perf_counter()
        searcher.search(references, texts, setting.k)
        total = (time.perf_counter() - started) * 1e3
        if number >= first:
            found = searcher.timings_ms
            samples.append(dict(found) | {OTHER: max(total - sum(found.values()), 0.0), TOTAL: total})
    return samples


def _summary(blocks: list[Block]) -> dict[str, Any]:
    """By stage: percentiles, the band of the median, and every sample."""
    out = {}
    for stage in (*STAGES, OTHER, TOTAL):
        split = [[sample.get(stage, 0.0) for sample in block] for block in blocks]
        samples = [value for block in split for value in block]
        if any(samples):
            figures = percentiles(samples)
            medians = [float(np.median(block)) for block in split]
            out[stage] = figures | {
                "band": band(medians, around=figures["p50"]), "blocks": list(map(len, split)), "samples_ms": [round(v, 4) for v in samples]
            }  # fmt: skip
    return out
