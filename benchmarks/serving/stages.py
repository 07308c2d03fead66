"""Where a query's time goes: the stages of the engine beside the same stages in PyTorch, query by query in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..harness import SETTLE_SECONDS
from ..statistics import band, percentiles
from . import searchers as by
from .cases import main_ways
from .setting import KINDS, Kind, Setting, workload

STAGES = ("decode", "preprocess", "tokenise", "vision", "query", "attributes", "compose", "search")
"""As `SearchResult.timings_ms` names them. In PyTorch, attributes and composing are inside "query"."""
OTHER, TOTAL = "other", "total"
"""What no stage has: building results, checks of arguments. `TOTAL` is the whole call, by a clock around it."""
ZONES = "ours f32, zones"


def stages(setting: Setting, *, queries: int, blocks: int, step: Callable[[str], None], reached: Callable[[float], None]) -> dict[str, Any]:
    """Milliseconds of `blocks` times `queries` single queries, for each kind of reference and each way."""
    ways, missing = main_ways(setting)
    ways[ZONES] = by.EngineSearcher(by.ours(setting, "f32").served, zones=True)
    taken: dict[tuple[Kind, str], list[list[dict[str, float]]]] = {(kind, name): [] for kind in KINDS for name in ways}
    for kind in KINDS:
        for searcher in ways.values():
            searcher.search(*workload(setting).batch(kind, 0, 1), setting.k)  # warm
    for block in range(blocks):
        for half, kind in enumerate(KINDS):
            step(f"{kind} reference, block {block + 1} of {blocks}")
            reached((block + half / len(KINDS)) / blocks)
            for samples, (_, name) in zip(_block(setting, ways, kind, block * queries, queries), ((kind, n) for n in ways), strict=True):
                taken[kind, name].append(samples)
    rows = [{"kind": kind, "name": name, "stages": _summary(found)} for (kind, name), found in taken.items()]
    return {"rows": rows, "missing": missing, "queries": queries * blocks}


def _block(setting: Setting, ways: Mapping[str, by.Searcher], kind: Kind, first: int, count: int) -> list[list[dict[str, float]]]:
    """Per way, the milliseconds of each query by stage."""
    out: list[list[dict[str, float]]] = [[] for _ in ways]
    for number in range(first, first + count):
        references, texts = workload(setting).batch(kind, number, 1)
        for searcher, samples in zip(ways.values(), out, strict=True):
            time.sleep(SETTLE_SECONDS)
            started = time.perf_counter()
            searcher.search(references, texts, setting.k)
            total = (time.perf_counter() - started) * 1e3
            found = searcher.timings_ms
            samples.append(dict(found) | {OTHER: max(total - sum(found.values()), 0.0), TOTAL: total})
    return out


def _summary(blocks: list[list[dict[str, float]]]) -> dict[str, Any]:
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
