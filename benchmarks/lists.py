"""What certified lists of tokens save an exact search, on trained tokens and on random ones, which they cannot help.

    python -m benchmarks.lists demo --rendered 60000 --sizes 17000 120000 1000000    # 10 minutes, 6 GiB of memory

The first items are the demo's garments and, after them, garments that are drawn and encoded now; beyond these, items lie between two of
them (a mixture of up to 30 % of the other), and the table says how many. Each search is timed beside the same one without lists, and exits
with 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dqe_engine import Query, RetrievalEngine
from dqe_engine.processors import available_cpus
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.arrays import F32
from dqe_engine.zones.lists import TokenLists
from dqe_training.data.garments.catalog import ALL_GARMENTS
from dqe_training.data.garments.render import render
from dqe_training.data.records import ImageRecord, TripletRecord, read_jsonl

from . import machine, report

BATCHES = (1, 4, 16, 64, 256)
K, BATCH_IMAGES = 10, 128


def encoded(demo: Path, rendered: int) -> tuple[F32, F32]:
    """The tokens (N, M, D) of the demo's images and of `rendered` new ones; the queries (B, D) of its test split."""
    engine = RetrievalEngine.load(demo / "bundle")
    engine.load_index(demo / "index")
    files = [demo / "garments/images" / record.image for record in read_jsonl(demo / "garments/images.jsonl", ImageRecord)]
    size = len(files) + rendered
    tokens = [
        engine.encode_images(
            [files[at] if at < len(files) else drawn(at) for at in range(start, min(start + BATCH_IMAGES, size))]
        ).target_tokens
        for start in range(0, size, BATCH_IMAGES)
    ]
    asked = [Query(reference_id=record.reference, text=record.text) for record in read_jsonl(demo / "garments/test.jsonl", TripletRecord)]
    return np.concatenate(tokens), engine.encode_queries(asked).queries


def drawn(number: int) -> bytes:
    rng = np.random.default_rng([17, number])
    picture = io.BytesIO()
    render(ALL_GARMENTS[rng.integers(len(ALL_GARMENTS))], rng).save(picture, "JPEG", quality=92)
    return picture.getvalue()


def between(tokens: F32, count: int) -> F32:
    """`count` items between two of these each."""
    rng = np.random.default_rng(3)
    one, other = rng.integers(len(tokens), size=(2, count))
    share = rng.random((count, 1, 1), np.float32) * np.float32(0.3)
    mixed: F32 = (1 - share) * tokens[one] + share * tokens[other]
    mixed /= np.linalg.norm(mixed, axis=2, keepdims=True)
    return mixed


def measure(kind: str, items: F32, queries: F32) -> tuple[list[list[str]], bool]:
    """A row for each size of batch, and whether all answers were the same."""
    begun = time.perf_counter()
    swept = Screen.build(items, lists=False)
    coded = time.perf_counter()
    lists = TokenLists.build((items,), threads=available_cpus())
    listed = Screen(swept.shards, lists)
    build = f"{coded - begun:.2f} + {time.perf_counter() - coded:.2f}"
    rows, same = [], True
    for batch in BATCHES:
        seconds: list[tuple[float, float]] = []
        for turn in range(max(5, min(40, 400 // batch))):
            start = turn * batch % (len(queries) - batch + 1)
            asked = queries[start : start + batch]
            first = time.perf_counter()
            plain = select_zones(asked, items, k=K, screen=swept)
            second = time.perf_counter()
            found = select_zones(asked, items, k=K, screen=listed)
            seconds.append((second - first, time.perf_counter() - second))
            same &= np.array_equal(plain.ids, found.ids) and np.array_equal(plain.scores, found.scores)
        without, with_lists = np.median(seconds, axis=0) * 1e3
        ratio = f"{without / with_lists:.2f}"
        rows.append([kind, f"{len(items):,}", str(batch), f"{without:.2f}", f"{with_lists:.2f}", ratio, build])
        build = ""
    return rows, same


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lists", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("demo", type=Path, help="what `make demo` made")
    parser.add_argument("--rendered", type=int, default=0, metavar="N", help="garments to draw and encode besides")
    parser.add_argument("--sizes", type=int, nargs="+", default=[17_000], metavar="N", help="items of the galleries")
    options = parser.parse_args(arguments)
    tokens, queries = encoded(options.demo, options.rendered)
    print(f"{len(tokens):,} items are encoded images; those beyond lie between them")
    rng = np.random.default_rng(5)
    rows: list[list[str]] = []
    same = True
    for size in options.sizes:
        items = np.concatenate([tokens[:size], between(tokens, max(0, size - len(tokens)))])
        found, equal = measure("garments", items, queries)
        rows, same = rows + found, same and equal
        del items
    size = min(options.sizes[-1], len(tokens))
    random = rng.standard_normal((size, *tokens.shape[1:]), np.float32)
    random /= np.linalg.norm(random, axis=2, keepdims=True)
    found, equal = measure("random", random, rng.standard_normal(queries.shape).astype(np.float32))
    print(report.table(["tokens", "items", "queries", "swept, ms", "by lists, ms", "ratio", "build: codes + lists, s"], rows + found))
    print(machine.describe(()))
    return int(not (same and equal))


if __name__ == "__main__":
    raise SystemExit(main())
