"""What a metadata filter costs a search of the index: `python -m benchmarks.filters` from the repository root.

Three tables: filtered over unfiltered time by the share of items that passes, the first search with a new filter by operator, and
memory. Vectors are random; contenders alternate in one process, and every figure is a median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.doctor.machine import processor_name
from dqe_engine.index import GalleryIndex
from dqe_engine.processors import cores

SHARES = (0.001, 0.01, 0.1, 0.4, 0.49, 0.51, 0.9, 0.99)
WIDTH, K = 256, 20
_BLOCK = 50_000


def make_index(size: int, screened: bool | None) -> GalleryIndex:
    """`size` random unit vectors; `at` is the item's place in a random order, so `{"at": {"<": n}}` passes n scattered items."""
    rng = np.random.default_rng(0)
    index = GalleryIndex(model_hash="random", target_shape=(1, WIDTH), image_shape=(1, 1), screened=screened)
    places = rng.permutation(size).tolist()
    for start in range(0, size, _BLOCK):
        ids = range(start, min(size, start + _BLOCK))
        rows = unit(rng.standard_normal((len(ids), 1, WIDTH), np.float32))
        metadata = [
            {
                "at": places[i],
                "brand": f"brand {places[i] % 300}",
                "sku": f"sku-{i}",
                "sale": i % 3 == 0,
                "tags": [f"tag {i % 50}", f"tag {i % 7}"],
            }
            for i in ids
        ]
        index.add([f"i{i}" for i in ids], rows, metadata=metadata)
    return index


def passing(index: GalleryIndex, share: float) -> dict[str, Any]:
    """A filter that this share of the items passes."""
    return {"at": {"<": round(share * len(index))}}


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(index: GalleryIndex, batch: int, rounds: int) -> list[str]:
    """By share: filtered time over that of the unfiltered search beside it."""
    queries = unit(np.random.default_rng(1).standard_normal((batch, WIDTH), np.float32))
    cells, plain_times = [], []
    for share in SHARES:
        check(index, queries[:1], share)
        pairs = []
        for at in range(rounds + 1):
            plain, filtered = (seconds(partial(index.search, queries, K, filter=filter)) for filter in (None, passing(index, share)))
            if at:  # the first one evaluates the filter
                pairs.append((plain, filtered))
        plain_times += [plain for plain, _ in pairs]
        cells.append(f"{statistics.median(filtered / plain for plain, filtered in pairs):.2f}")
    return [f"{statistics.median(plain_times) * 1e3:.2f}", *cells]


def check(index: GalleryIndex, query: NDArray[np.float32], share: float) -> None:
    """Raise unless a filtered search finds what a long unfiltered list has of the items that pass."""
    most = round(share * len(index))
    everything = index.search(query, min(len(index), round(3 * K / share) + 1000))[0].matches
    wanted = [match.id for match in everything if match.metadata is not None and match.metadata["at"] < most][:K]
    found = [match.id for match in index.search(query, K, filter=passing(index, share))[0].matches]
    if found != wanted:
        raise RuntimeError(f"wrong answer where {share:.1%} pass: {found}, expected {wanted}")


def operators(size: int) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Filters by operator; each call with another number gives one that was never seen."""
    return {
        "equal": lambda n: {"brand": f"brand {n}"},
        "not equal": lambda n: {"brand": {"!=": f"brand {n}"}},
        "bool and range": lambda n: {"sale": True, "at": {">=": n}},
        "range of numbers": lambda n: {"at": {">=": n, "<": size // 2 + n}},
        "range of strings, all distinct": lambda n: {"sku": {">=": f"sku-{n}"}},
        "in, 1,000 numbers": lambda n: {"at": {"in": list(range(n, n + 1000))}},
        "in, 1,000 strings": lambda n: {"sku": {"in": [f"sku-{i}" for i in range(n, n + 1000)]}},
    }


def new_operators() -> dict[str, Callable[[int], dict[str, Any]]]:
    return {
        "contains": lambda n: {"tags": {"contains": f"tag {n}"}},
        "exists": lambda n: {"sku": {"exists": True}, "at": {"!=": n}},
        "or of four": lambda n: {"or": [{"brand": f"brand {n + i}"} for i in range(4)]},
        "not": lambda n: {"not": [{"brand": f"brand {n}"}]},
    }


def first_searches(index: GalleryIndex, known: dict[str, Callable[[int], dict[str, Any]]], rounds: int) -> list[tuple[str, float]]:
    """By operator: how much longer a search takes with a filter that was never seen than once more with the same."""
    queries = unit(np.random.default_rng(2).standard_normal((1, WIDTH), np.float32))
    rows = []
    for name, make in known.items():
        extra = []
        for n in range(rounds):
            first, again = (seconds(partial(index.search, queries, K, filter=make(n))) for _ in range(2))
            extra.append(first - again)
        rows.append((name, statistics.median(extra)))
    return rows


def memory(index: GalleryIndex, batch: int) -> list[tuple[str, int]]:
    """What a batch takes at most beside the index, without and with filters."""
    queries = unit(np.random.default_rng(3).standard_normal((batch, WIDTH), np.float32))
    rows = []
    for share in (None, 0.1, 0.4, 0.9):
        search = partial(index.search, queries, K, filter=None if share is None else passing(index, share))
        search()
        rows.append((f"{batch} queries, {'no filter' if share is None else f'{share:.0%} pass'}", peak_growth(search)))
    return rows


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory grew at most while `work` ran (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(prog="filters", description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=15, help="of single queries; batches take a quarter as many (default: %(default)s)")
    parser.add_argument("--screened", action=argparse.BooleanOptionalAction, help="default: what the index chooses by its size")
    parser.add_argument("--only-known", action="store_true", help="leave out the operators that older versions did not have")
    options = parser.parse_args()
    print(f"{processor_name()}, {cores()} threads; M=1, D={WIDTH}, float32, k={K}\n")
    print("| items | queries | unfiltered ms | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |")
    print("|---" * (3 + len(SHARES)) + "|", flush=True)
    later: list[str] = []
    for size in options.items:
        index = make_index(size, options.screened)
        for batch in options.batches:
            rounds = options.rounds if batch == 1 else max(3, options.rounds // 4)
            print("| " + " | ".join([f"{size:,}", str(batch), *ratios(index, batch, rounds)]) + " |", flush=True)
        known = operators(size) | ({} if options.only_known else new_operators())
        later += [f"| {size:,} | {name} | {extra * 1e3:.2f} |" for name, extra in first_searches(index, known, max(5, options.rounds))]
        later += [f"| {size:,} | memory, {text} | {grown / 2**20:.0f} MiB |" for text, grown in memory(index, max(options.batches))]
    print("\n| items | first search with a filter | ms more than the second |\n|---|---|---|")
    print("\n".join(itertools.chain(later)))


if __name__ == "__main__":
    main()
