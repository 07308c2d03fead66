"""Many callers of one engine: by themselves, and through the batcher. Catalogue references, nothing remembered.

python -m benchmarks.callers demo        # the folder of `make demo`
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query
from dqe_engine.results import SearchResult

CALLERS = (1, 4, 16, 64)
QUERIES, ROUNDS = 1000, 3

Search = Callable[[Query], SearchResult]


def ask(search: Search, queries: Sequence[Query], callers: int) -> tuple[float, list[float]]:
    """Queries a second, and milliseconds of each, when `callers` threads share the work."""
    taken: list[float] = []

    def work(first: int) -> None:
        for query in queries[first::callers]:
            begun = time.perf_counter()
            search(query)
            taken.append((time.perf_counter() - begun) * 1e3)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(callers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(queries) / (time.perf_counter() - begun), taken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="callers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args(arguments).demo
    records = [json.loads(line) for line in (demo / "garments" / "val.jsonl").read_text().splitlines()[:QUERIES]]
    engine = RetrievalEngine.load(demo / "bundle", kept_bytes=0)
    engine.load_index(demo / "index")
    engine.warm_up()
    queries = [Query(reference_id=record["reference"], text=record["text"]) for record in records]
    alone = [engine.search(query) for query in queries[:200]]
    with engine.batcher() as batcher:
        ways: dict[str, Search] = {"by themselves": engine.search, "batcher": batcher.search}
        found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
        for _ in range(ROUNDS):
            for callers in CALLERS:
                for way, search in ways.items():
                    rate, taken = ask(search, queries, callers)
                    found.setdefault((way, callers), []).append((rate, float(np.median(taken)), float(np.percentile(taken, 99))))
        one = float(np.median([rate for rate, _, _ in found["by themselves", 1]]))
        print("callers  way             queries/s   times one caller   p50 ms   p99 ms   p99 / p50   (medians of rounds)")
        for (way, callers), rounds in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
            rate, p50, p99 = (float(value) for value in np.median(rounds, axis=0))
            print(f"{callers:7}  {way:14} {rate:10.0f} {rate / one:18.2f} {p50:8.2f} {p99:8.2f} {p99 / p50:11.1f}")
        wrong, worst = 0, 0.0

        def check(n: int) -> None:
            nonlocal wrong, worst
            hits = batcher.search(queries[n]).hits
            wrong += [hit.id for hit in hits] != [hit.id for hit in alone[n].hits]
            worst = max(worst, max(abs(a.score - b.score) for a, b in zip(hits, alone[n].hits, strict=True)))

        threads = [threading.Thread(target=check, args=(n,)) for n in range(len(alone))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(
        f"{len(alone)} queries through the batcher at once: {wrong} with other first ten than alone, scores differ by {worst:.1e} at most"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
