"""What a screen's prefix saves an exact search of single vectors whose spectrum decays, beside FAISS's flat and Panorama indexes.

    python -m benchmarks.prefix --size 1000000    # 8 minutes, 6 GiB of memory

Vectors (N, 256) of length 1 lie around N / 1,000 directions, and the variance of their principal components falls as 1, 1 / 2^p, 1 / 3^p,
...; p = 0 is isotropic, without clusters. Queries are drawn like the items. All searches of a query follow one another, and it exits with
1 where their ids differ other than by the rounding of a score. Panorama's time includes its rotation, trained on a tenth of the items.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.prefix import Prefix

from . import machine, report

F32 = NDArray[np.float32]
WIDTH, K, LEVELS = 256, 10, 16
Search = Callable[[F32], tuple[F32, NDArray[np.int64]]]


def vectors(size: int, queries: int, power: float, *, clusters: int, within: float = 0.3) -> tuple[F32, F32]:
    """Items (N, D) and queries (B, D). within: share of the variance that is within clusters."""
    rng = np.random.default_rng(7)
    within = within if power else 1.0
    scale = (np.arange(1, WIDTH + 1) ** (-power / 2)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    centres = rng.standard_normal((clusters, WIDTH), np.float32) * scale
    found = np.empty((size + queries, WIDTH), np.float32)
    for start in range(0, len(found), 1 << 16):
        part = found[start : start + (1 << 16)]
        own = rng.standard_normal(part.shape, np.float32) * scale
        part[:] = (
            centres[rng.integers(clusters, size=len(part))] * np.float32((1 - within) ** 0.5) + own * np.float32(within**0.5)
        ) @ basis
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return found[:size], found[size:]


def contenders(items: F32, threads: int, levels: int) -> tuple[dict[str, Search], str]:
    import faiss

    faiss.omp_set_num_threads(threads)
    screen = Screen.build(items, threads=threads)
    plain = Screen(screen.shards)
    prefix = screen.prefix if screen.lists is None else Prefix.build((items[:, None],), threads=threads)

    def ours(copy: Screen) -> Search:
        def search(queries: F32) -> tuple[F32, NDArray[np.int64]]:
            found = select_zones(queries, items, k=K, screen=copy, threads=threads)
            return found.scores, found.ids

        return search

    def by_faiss(index: Any) -> Search:
        return lambda queries: index.search(queries, K)

    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(items)
    rotation = faiss.PCAMatrix(WIDTH, WIDTH)
    rotation.train(items[::10])
    rotation.have_bias = False  # it would centre items and queries, which changes the order of inner products
    turned = faiss.IndexPreTransform(rotation, faiss.IndexFlatIPPanorama(WIDTH, levels))
    turned.add(items)
    return {
        "screen": ours(screen),
        "codes alone": ours(plain),
        "codes and prefix": ours(Screen(screen.shards, prefix=prefix)),
        "IndexFlatIP": by_faiss(flat),
        "IndexFlatIPPanorama": by_faiss(turned),
    }, screen.describe()


def agrees(one: tuple[F32, NDArray[np.int64]], other: tuple[F32, NDArray[np.int64]], items: F32, query: F32) -> bool:
    """Whether ids are the same, or differ where scores do by rounding alone; FAISS adds up in another order."""
    own, theirs = (np.sort(items[found[1][0]].astype(np.float64) @ query[0].astype(np.float64)) for found in (one, other))
    return bool(np.allclose(own, theirs, rtol=0, atol=2e-6))


def measure(power: float, size: int, batch: int, turns: int, threads: int, clusters: int, levels: int) -> tuple[list[list[str]], bool, str]:
    items, queries = vectors(size, batch * turns, power, clusters=clusters)
    searches, described = contenders(items, threads, levels)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in searches}
    same = True
    for turn in range(turns):
        asked = queries[turn * batch : (turn + 1) * batch]
        found = {}
        for name, search in searches.items():
            wall, processor = time.perf_counter(), time.process_time()
            found[name] = search(asked)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
        same &= all(np.array_equal(found["codes alone"][1], found[name][1]) for name in ("screen", "codes and prefix"))
        same &= all(agrees(found["screen"], other, items, asked) for other in found.values())
    medians = {name: np.median(taken, axis=0) * 1e3 for name, taken in seconds.items()}
    best = medians["screen"]
    rows = [
        [f"{power:g}", str(batch), name, f"{wall:.2f}", f"{processor:.2f}", f"{wall / best[0]:.2f}", f"{processor / best[1]:.2f}"]
        for name, (wall, processor) in medians.items()
    ]
    return rows, same, described


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefix", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=1_000_000, metavar="N", help="items")
    parser.add_argument("--clusters", type=int, default=0, metavar="N", help="directions that they lie around; 0: one for 1,000 items")
    parser.add_argument("--powers", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5], metavar="P", help="of the spectrum")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N", help="queries at once")
    parser.add_argument("--levels", type=int, default=LEVELS, metavar="N", help="of Panorama")
    parser.add_argument("--turns", type=int, default=40, metavar="N", help="searches of each kind")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of all contenders")
    options = parser.parse_args(arguments)
    rows: list[list[str]] = []
    same = True
    for power in options.powers:
        for batch in options.batches:
            clusters = options.clusters or max(1, options.size // 1000)
            found, equal, described = measure(power, options.size, batch, options.turns, options.threads, clusters, options.levels)
            print(f"p = {power:g}, queries = {batch}: {described}", flush=True)
            rows, same = rows + found, same and equal
    head = ["p", "queries", "search", "ms", "ms of processors", "ratio", "ratio of processors"]
    print(report.table(head, rows))
    print(f"load {machine.load_average()}; answers {'agree' if same else 'DIFFER'}")
    print(machine.describe(()))
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
