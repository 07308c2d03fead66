"""Some requests to the CUDA kernels, each compared with NumPy's reference, without PyTorch. What sanitizers watch.

    python -m benchmarks.gpu_requests        # exit code 1 if an answer differs

Coordinates are small whole numbers: every dot product is exact in any order of additions, so answers must be equal to the bit.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.device_arrays import CudaMemory
from dqe_engine.zones import cuda, select_zones

EVERYTHING = ZoneSpec(lo=-math.inf, hi=math.inf, policy="softmax", seed=5, temperature=0.7)
ABSOLUTE = ZoneSpec(lo=0, hi=7, policy="hardest")
RANKS = ZoneSpec(lo=0.01, hi=0.3, bounds="rank", policy="uniform")
POOLED = ZoneSpec(lo=0.01, hi=0.3, bounds="pooled", policy="uniform")
FIELDS = ("scores", "ids", "counts", "picks", "pick_scores", "lo", "hi", "anchor_scores")
LISTED = 4096
"""Items that fit a list of candidates whole: then bounds have no limit to reach, and may leave more than there is room for."""
# (batch, items, tokens, width, dtype of the items, k, zones)
REQUESTS: list[tuple[int, int, int, int, type, int, ZoneSpec | None]] = [
    (1, 4097, 1, 256, np.float16, 10, None),
    (1, 4097, 1, 256, np.float16, 10, ABSOLUTE),
    (17, 4097, 1, 64, np.float16, 10, RANKS),
    (64, 4097, 1, 256, np.float16, 100, EVERYTHING),
    (65, 3001, 2, 72, np.float16, 7, RANKS),
    (16, 501, 32, 256, np.float16, 10, ABSOLUTE),
    (5, 150, 129, 257, np.float16, 10, RANKS),
    (1, 4097, 1, 256, np.float32, 10, RANKS),
    (70, 1001, 2, 64, np.float32, 10, ABSOLUTE),
    (3, 5000, 1, 8, np.float16, 5000, EVERYTHING),
    (64, 0, 1, 8, np.float16, 10, ABSOLUTE),
    (300, 111, 1, 8, np.float16, 10, EVERYTHING),
    (33, 3001, 2, 64, np.float16, 10, POOLED),
    (33, 3001, 1, 64, np.float32, 10, POOLED),
    (300, 4097, 1, 256, np.float16, 100, None),
    (40, 3001, 2, 72, np.float16, 7, None),
    (64, 501, 32, 256, np.float16, 10, None),
    (65, 5001, 4, 72, np.float16, 10, None),
    (3, 4500, 32, 64, np.float16, 10, None),
    (17, 4500, 1, 136, np.float32, 10, None),
    (129, 4097, 1, 256, np.float16, 10, ABSOLUTE),
    (300, 4500, 1, 64, np.float16, 10, EVERYTHING),
]


def compare(memory: CudaMemory, number: int) -> list[str]:
    """Names of the fields in which the device differs from the reference; top-k without zones is also screened. Zones of every other
    request lie around given items.
    """
    batch, size, tokens, width, dtype, k, zones = REQUESTS[number]
    rng = np.random.default_rng(number)
    queries = rng.integers(-3, 4, (batch, width)).astype(np.float32)
    items: NDArray[Any] = rng.integers(-3, 4, (size, tokens, width)).astype(dtype)
    options: dict[str, Any] = {"k": k, "zones": zones, "picks": 5 if zones else 0, "counts": zones is not None}
    if zones is not None and number % 2 and size:
        options["anchor"] = rng.integers(0, size, batch)
    wanted = select_zones(queries, items, backend="reference", **options)
    on_device, wrong = memory.upload(items), []
    index = cuda.Index(on_device)
    ways = [(queries, index, "")]
    if zones is None or batch > 128:  # float16 ones in tiles of 256
        ways += [(queries.astype(np.float16), index, "")]
    if zones is None:
        ways += [(queries, cuda.Index(on_device, screen=True), ", screened")]
    for given, searched, screening in ways:
        uploaded = memory.upload(given)
        started = [searched.select(uploaded, **options, sync=False) for _ in range(2)]
        found = searched.select(uploaded, **options)
        asked: dict[str, Any] = {"zones": zones, "own_best": "anchor" not in options}
        how = searched.architecture(batch, k=k, half_queries=given.dtype == np.float16, **asked) + screening
        for name in FIELDS:
            ours, theirs = getattr(found, name), getattr(wanted, name)
            if ours is not None:
                ours = memory.download(ours)
            if ours is not None and any(not np.array_equal(memory.download(getattr(s, name)), ours, equal_nan=True) for s in started):
                wrong.append(f"{name} of searches that were under way together ({given.dtype} queries, {how})")
            if (ours is None) != (theirs is None) or (ours is not None and not np.array_equal(ours, theirs, equal_nan=True)):
                wrong.append(f"{name} ({given.dtype} queries, {how})")
        if screening and size > LISTED and found.rescored is None:
            wrong.append("rescored (bounds decided nothing)")
        if screening:  # products of codes are exact: on a Hopper, both sets of kernels have the same bounds
            portable = searched.select(memory.upload(given), portable=True, **options).rescored
            if found.rescored != portable:
                wrong.append(f"rescored ({found.rescored}, by the kernels for all devices {portable})")
    return wrong


def main() -> int:
    failures = 0
    with CudaMemory.open() as memory:
        for number, request in enumerate(REQUESTS):
            wrong = compare(memory, number)
            failures += bool(wrong)
            batch, size, tokens, width, dtype, k, zones = request
            verdict = f"DIFFERS in {', '.join(wrong)}" if wrong else "equal"
            shape = f"{batch} queries, {size} x {tokens} x {width} {dtype.__name__}"
            print(f"{shape}, k {k}, zones {zones and zones.bounds}: {verdict}", flush=True)
    print(f"{len(REQUESTS) - failures} of {len(REQUESTS)} equal")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
