"""Eight threads that call the compiled kernels in every form at once, and a shared index that changes meanwhile.

Calls share the work among threads of their own as well: lists and prefixes are built and searched by 0 to 4 of them.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.samples import unit

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.index import GalleryIndex
from dqe_engine.zones import Screen, select_zones
from dqe_engine.zones.lists import TokenLists
from dqe_engine.zones.prefix import Prefix

SIZE, TOKENS, WIDTH, QUERIES = 3001, 4, 64, 9


def _screen(items: NDArray[Any], *, threads: int) -> Screen:
    """Codes, and lists with prefixes or prefixes alone, by turns, however few the tokens are."""
    codes = Screen.build(items, lists=False, prefix=False, threads=threads)
    if len(items) % 2 == 0:
        return Screen(codes.shards, prefix=Prefix.build((items,), threads=threads, least=1, width=16))
    lists = TokenLists.build((items,), threads=threads, least=1)
    return Screen(codes.shards, lists and lists.prefixed((items,), threads=threads, width=16))


def hammer(each: int) -> None:
    """So many searches by every thread, and what else goes on between them. Raises what a thread raised."""
    rng = np.random.default_rng(0)
    items = unit(rng.standard_normal((SIZE, TOKENS, WIDTH)))
    galleries = [(array, _screen(array, threads=2)) for array in (items, items.astype(np.float16))]
    queries, words = unit(rng.standard_normal((QUERIES, WIDTH))), (SIZE + 63) // 64
    allowed = rng.integers(0, 2**63, (QUERIES, words), dtype=np.uint64)
    allowed[:, -1] &= np.uint64((1 << SIZE % 64) - 1)
    index = GalleryIndex(model_hash="m", target_shape=(TOKENS, WIDTH), image_shape=(3, 5), screened=True)
    index.add([f"i{n}" for n in range(500)], items[:500], metadata=[{"n": n} for n in range(500)])
    failures = list[BaseException]()

    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for call in range(thread, thread + each):
            batch, (array, screen), threads = int(rng.integers(1, QUERIES + 1)), galleries[rng.integers(2)], int(rng.integers(5))
            options: dict[str, object] = {"allowed": allowed[:batch] if rng.random() < 0.5 else allowed[0]} if rng.random() < 0.5 else {}
            if rng.random() < 0.5:
                options["screen"] = screen
            if rng.random() < 0.5:
                bounds, policy = rng.choice(["absolute", "rank", "pooled"]), rng.choice(["hardest", "uniform", "softmax"])
                zones = ZoneSpec(lo=0.1, hi=0.6, bounds=str(bounds), policy=str(policy))  # type: ignore[arg-type]
                options |= {"zones": zones, "picks": 3, "counts": True, "anchor": rng.integers(0, SIZE, batch)}
            if rng.random() < 0.3:
                options["exclude"] = rng.integers(0, SIZE, (batch, 4))
            select_zones(queries[:batch], array, k=7, threads=threads, backend="cpu", **options)  # type: ignore[arg-type]
            if call % 5 == 0:
                _screen(array[: int(rng.integers(1, 400))], threads=max(1, threads))
            elif call % 5 == 1:
                index.search(queries[:batch], 5, filter={"n": {"<": int(rng.integers(1, 500))}}, threads=threads)
            elif call % 5 == 2 and thread < 2:
                index.add([f"t{thread}"], items[:1], metadata=[{"n": 3}])
                index.search(queries[:1], 5)
                index.remove([f"t{thread}"])

    def caught(thread: int) -> None:
        try:
            work(thread)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=caught, args=(thread,)) for thread in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    hammer(int(sys.argv[1]))
    print(_kernels.__file__)
