"""Many tasks of one event loop, through the batcher: how long the loop is kept from its other work, and whether memory grows.

python -m benchmarks.tasks demo                       # the folder of `make demo`
python -m benchmarks.tasks demo --memory 100000       # random pairs of reference and text, and the process's memory
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dqe_engine.engine import QueryBatcher, RetrievalEngine
from dqe_engine.query import Query

TASKS, QUERIES, ROUNDS = 64, 1000, 3
TEXTS = ("is red", "is blue and has stripes", "is shorter", "has no sleeves and is green", "is yellow with dots", "is the same but longer")


def photographs(count: int, rng: np.random.Generator) -> list[bytes]:
    """JPEGs of 12 megapixels, as telephones make them."""
    small = rng.integers(0, 256, (count, 24, 32, 3), np.uint8)
    found = []
    for pixels in small:
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((4000, 3000)).save(stream, "jpeg")
        found.append(stream.getvalue())
    return found


async def watched(stalls: list[float]) -> None:
    """Milliseconds by which a task that wants to run each millisecond is late."""
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(0.001)
        stalls.append((time.perf_counter() - begun) * 1e3 - 1)


@contextmanager
def steps_timed(taken: list[float]) -> Iterator[None]:
    """Milliseconds of processor time of each step of the event loops meanwhile: what runs in their threads, whoever else is busy."""
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begun = time.thread_time()
        run(handle)
        taken.append((time.thread_time() - begun) * 1e3)

    asyncio.Handle._run = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]


async def asked(batcher: QueryBatcher, make: Callable[[int], Query], count: int, tasks: int) -> tuple[float, list[float], list[float]]:
    """Queries a second, milliseconds of each, and the loop's stalls."""
    left, taken, stalls = iter(range(count)), list[float](), list[float]()

    async def work() -> None:
        for n in left:
            begun = time.perf_counter()
            await batcher.search_async(make(n), timeout=60)
            taken.append((time.perf_counter() - begun) * 1e3)

    watching = asyncio.create_task(watched(stalls))
    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(tasks)))
    seconds = time.perf_counter() - begun
    watching.cancel()
    return count / seconds, taken, stalls


def resident() -> float:
    """Megabytes of this process that are its own; an index's mapped files are apart."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


async def grows(batcher: QueryBatcher, ids: Sequence[str], count: int, rng: np.random.Generator) -> None:
    for part in range(20):
        references, texts = rng.integers(0, len(ids), count // 20), rng.integers(0, len(TEXTS), (count // 20, 2))

        def make(n: int, references: np.ndarray = references, texts: np.ndarray = texts) -> Query:
            first, second = texts[n]
            return Query(reference_id=ids[references[n]], text=f"{TEXTS[first]} and {TEXTS[second]}")

        rate, _, _ = await asked(batcher, make, count // 20, TASKS)
        print(f"{(part + 1) * (count // 20):8} queries   {rate:6.0f} / s   {resident():8.1f} MB", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--memory", type=int, default=0, help="queries whose memory is watched")
    parser.add_argument("--only", default="", help="kinds of queries with this in their name")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    engine = RetrievalEngine.load(options.demo / "bundle", kept_bytes=(64 << 20) if options.memory else 0)
    engine.load_index(options.demo / "index")
    engine.warm_up()
    ids = engine.index.ids
    with engine.batcher() as batcher:
        if options.memory:
            asyncio.run(grows(batcher, ids, options.memory, rng))
            return 0
        photos = photographs(8, rng)
        large = {"in": [f"value {n}" for n in range(1000)]}
        kinds: dict[str, tuple[Callable[[int], Query], int]] = {
            "catalogue references": (lambda n: Query(reference_id=ids[n], text=TEXTS[n % len(TEXTS)]), QUERIES),
            "with a filter of 1,000 values": (
                lambda n: Query(reference_id=ids[n], text=TEXTS[n % len(TEXTS)], filter={"not": [{"brand": large}]}), QUERIES),
            "uploads of 12 megapixels": (lambda n: Query(image=photos[n % 8] + bytes(n), text=TEXTS[n % len(TEXTS)]), QUERIES // 25),
            "equal uploads": (lambda n: Query(image=photos[n // 100], text=TEXTS[n % len(TEXTS)]), QUERIES // 5),
        }  # fmt: skip
        print(f"{'':66}the loop was late a step's processor time")
        print("medians of rounds              tasks   queries/s   p50 ms   p99 ms   p99 ms  most ms   p99 ms  most ms")
        for tasks in (1, TASKS):
            for kind, (make, count) in kinds.items():
                if options.only not in kind:
                    continue
                rounds = []
                for _ in range(ROUNDS):
                    steps: list[float] = []
                    with steps_timed(steps):
                        rate, taken, stalls = asyncio.run(asked(batcher, make, count if tasks > 1 else count // 5, tasks))
                    low, high = np.percentile(taken, (50, 99))
                    rounds.append((rate, low, high, np.percentile(stalls, 99), max(stalls), np.percentile(steps, 99), max(steps)))
                rate, p50, p99, *rest = (float(value) for value in np.median(rounds, axis=0))
                print(f"{kind:30} {tasks:6} {rate:11.0f} {p50:8.2f} {p99:8.2f} " + " ".join(f"{value:8.2f}" for value in rest), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
