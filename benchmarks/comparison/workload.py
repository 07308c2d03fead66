"""The small benchmark that two versions of this project run in turns: `python workload.py SECTION OPTIONS`, a JSON on standard output.

Nothing but the runtime's public calls and NumPy: an earlier version must be able to run it as it stands.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ITEMS, TOKENS, WIDTH, BATCHES = 50_000, 8, 64, (1, 64)
CALLS = 5
"""Timed calls of a case in each round, at least."""
SECONDS = 0.25
MOST_CALLS = 200


def zones(options: dict[str, Any]) -> dict[str, list[float]]:
    """Exact search, MaxSim, and zone counts with picks, over random unit vectors."""
    from dqe_engine.contracts.zones import ZoneSpec
    from dqe_engine.zones import select_zones

    rng = np.random.default_rng(0)
    count = options["items"]
    tokens = _unit(rng.standard_normal((count, TOKENS, WIDTH), np.float32))
    single = _unit(np.ascontiguousarray(tokens.reshape(count, TOKENS * WIDTH)[:, : 4 * WIDTH]))
    spec = ZoneSpec(lo=0.1, hi=0.17, policy="softmax")  # from the own best; the mid zone holds about 1 % of the items
    out: dict[str, list[float]] = {}
    for batch in BATCHES:
        narrow, wide = (_unit(rng.standard_normal((batch, width), np.float32)) for width in (WIDTH, 4 * WIDTH))
        out[f"top 50, B = {batch}"] = _timed(partial(select_zones, wide, single, k=50))
        out[f"MaxSim top 50, B = {batch}"] = _timed(partial(select_zones, narrow, tokens, k=50))
        zoned = partial(select_zones, narrow, tokens, k=50, zones=spec, picks=16, counts=True)
        out[f"MaxSim zones and 16 picks, B = {batch}"] = _timed(zoned)
    return out


def search(options: dict[str, Any]) -> dict[str, list[float]]:
    """Whole searches of a bundle's index: references by id, and as image files."""
    from dqe_engine.engine import RetrievalEngine

    try:
        from dqe_engine.query import Query
    except ImportError:  # the other version may be one before queries
        return _search_by_pairs(options)
    engine = RetrievalEngine.load(options["bundle"], kept_bytes=0)
    engine.load_index(options["index"])
    references, texts, images = options["references"], options["texts"], Path(options["images"])
    out: dict[str, list[float]] = {}
    for batch in BATCHES:
        ids, asked = references[:batch], texts[:batch]
        by_id = [Query(reference_id=id, text=text) for id, text in zip(ids, asked, strict=True)]
        uploaded = [Query(image=images / id, text=text) for id, text in zip(ids, asked, strict=True)]
        out[f"catalogue reference, B = {batch}"] = _timed(partial(engine.search_batch, by_id))
        out[f"uploaded reference, B = {batch}"] = _timed(partial(engine.search_batch, uploaded))
    return out


def _search_by_pairs(options: dict[str, Any]) -> dict[str, list[float]]:
    """`search` of versions whose batches were references, ids as strings, and texts."""
    from dqe_engine.engine import RetrievalEngine

    engine: Any = RetrievalEngine.load(options["bundle"])
    engine.load_index(options["index"])
    references, texts, images = options["references"], options["texts"], Path(options["images"])
    out: dict[str, list[float]] = {}
    for batch in BATCHES:
        ids, asked = references[:batch], texts[:batch]
        out[f"catalogue reference, B = {batch}"] = _timed(partial(engine.search_batch, ids, asked))
        out[f"uploaded reference, B = {batch}"] = _timed(partial(engine.search_batch, [images / id for id in ids], asked))
    return out


def _timed(call: Callable[[], Any]) -> list[float]:
    """Seconds of each call, after two that are not counted."""
    for _ in range(2):
        call()
    samples: list[float] = []
    while len(samples) < CALLS or (sum(samples) < SECONDS and len(samples) < MOST_CALLS):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return samples


def _unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def main() -> int:
    import dqe_engine

    section, options = sys.argv[1], json.loads(sys.argv[2])
    samples = {"zones": zones, "search": search}[section](options)
    json.dump({"package": str(Path(dqe_engine.__file__).resolve().parent), "samples_s": samples}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
