"""One query at a time while the index changes: after adds, after saves, and while another thread reads image tokens from the disk.

python -m benchmarks.index_life        # 100,000 items x 256, random
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dqe_engine.index import GalleryIndex

WIDTH, IMAGE = 256, (65, 192)
ADDS, SAVES = 1000, 20


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def show(label: str, taken: Sequence[float], base: float | None = None) -> float:
    p50, p99 = float(np.median(taken)), float(np.percentile(taken, 99))
    beside = "" if base is None else f"   {p50 / base:5.2f} x the median without"
    print(f"{label:56} p50 {p50:8.3f} ms   p99 {p99:8.3f} ms{beside}", flush=True)
    return p50


def unit(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    found: NDArray[np.float32] = rng.standard_normal((rows, 1, WIDTH), np.float32)
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="index_life", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    items, rng = parser.parse_args(arguments).items, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index = GalleryIndex(model_hash="m", target_shape=(1, WIDTH), image_shape=IMAGE, image_storage="f16", screened=True)
        tokens = rng.standard_normal((1000, *IMAGE), np.float32).astype(np.float16)
        for start in range(0, items, 1000):
            index.add([f"i{n}" for n in range(start, start + 1000)], unit(rng, 1000), tokens)
        print(f"{items} items: first save {timed(lambda: index.save(path)):.0f} ms")
        queries = unit(rng, ADDS)[:, 0]

        def search(n: int) -> float:
            return timed(lambda: index.search(queries[n : n + 1], 10))

        print(f"first search, which makes the screen: {search(0):.0f} ms")
        base = show("search, nothing changes", [search(n) for n in range(ADDS)])
        after, before = [], []
        for n in range(ADDS):
            before.append(search(n))
            index.add([f"new{n}"], unit(rng, 1), tokens[:1])
            after.append(search(n))
        show("search before an add", before, base)
        show("search after an add", after, base)
        print(f"{'':56} median of after / before, pair by pair: {np.median(np.array(after) / before):.2f}")
        saved, searched = [], []
        for n in range(SAVES):
            index.add([f"more{n}"], unit(rng, 1), tokens[:1])
            saved.append(timed(lambda: index.save(path)))
            searched.append(search(n))
        show("save of one added item", saved)
        show("first search after a save", searched, base)
        reader = GalleryIndex.load(path, screened=True)
        reader.search(queries[:1], 10)
        show("refresh, nothing new", [timed(reader.refresh) for _ in range(SAVES)])
        followed = []
        for n in range(SAVES):
            index.add([f"yet{n}"], unit(rng, 1), tokens[:1])
            index.save(path)
            followed.append(timed(reader.refresh))
        show("refresh after a save of one item", followed)
        show("search while image tokens are read from the disk", _beside_reads(index, path, search), base)
        print(index.stats())
    return 0


def _beside_reads(index: GalleryIndex, path: Path, search: Callable[[int], float]) -> list[float]:
    """Searches of this thread, while another reads tokens of items that the page cache has been told to forget."""
    stop, ids, rng = threading.Event(), index.ids, np.random.default_rng(1)
    (file,) = path.glob("*.images")

    def read() -> None:
        with open(file, "rb") as stream:
            while not stop.is_set():
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for n in rng.integers(0, len(ids), 20):
                    index.image_tokens(ids[n])

    thread = threading.Thread(target=read)
    thread.start()
    taken = [search(n) for n in range(ADDS)]
    stop.set()
    thread.join()
    return taken


if __name__ == "__main__":
    sys.exit(main())
