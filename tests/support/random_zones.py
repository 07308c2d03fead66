"""Random requests to the compiled kernels of zones, each compared with the reference, and how many there were of which kind.

From `tests/`: `OMP_NUM_THREADS=1 python -m support.random_zones --cases 10000 --seed 1`. Ends with 1 if an answer differed. Seed and
number of a case say all of it: a failure prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections import Counter
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from support.zone_cases import Allowed, Anchor, Case, Vectors, Way, assert_equals_reference, assert_same, met_bounds, unit_vectors

from dqe_engine import _kernels
from dqe_engine.contracts.zones import Bounds, Policy, ZoneSpec
from dqe_engine.zones import ZoneSelection
from dqe_engine.zones.bitmaps import unpacked
from dqe_engine.zones.reference import max_sim
from dqe_engine.zones.request import ZoneRequest, validated

_WIDTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 511, 512, 767, 768)
_BATCHES = (1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64)
_FRACTIONS, _DELTAS = (0.0, 0.02, 0.1, 0.5, 1.0), (-math.inf, -50.0, -1.0, 0.0, 2.0, 7.0, 100.0, 1e6, math.inf)
_NUMBERS = 120_000
"""Of a gallery, at most: a case takes some hundredths of a second."""


def drawn(seed: int, number: int) -> tuple[Case, Way, bool]:
    """A case, how to go about it, and whether its vectors are real ones, for which answers agree within rounding alone."""
    rng = np.random.default_rng((seed, number))

    def one(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    width = one(_WIDTHS) if rng.random() < 0.6 else int(rng.integers(1, 769))
    tokens = one((1, 1, 2, 4, 8, 32)) if rng.random() < 0.6 else int(rng.integers(1, 33))
    size = min(one((0, 1, 19, 111, 640, 1031, 4097, 4097)), max(1, _NUMBERS // (tokens * width)))
    zones = None
    if rng.random() < 0.7:
        bounds: Bounds = one(get_args(Bounds))
        policy: Policy = one(get_args(Policy))
        lo, hi = sorted(one(_DELTAS if bounds == "absolute" else _FRACTIONS) for _ in range(2))
        zones = ZoneSpec(lo=lo, hi=hi, bounds=bounds, policy=policy, seed=int(rng.integers(2**63)), temperature=0.7)
    anchor: Anchor = one(get_args(Anchor))
    kinds = get_args(Allowed)
    vectors: Vectors = one(("integers", *get_args(Vectors)))
    case = Case(
        seed=int(rng.integers(2**40)),
        batch=one(_BATCHES) if rng.random() < 0.7 else int(rng.integers(1, 65)),
        size=size,
        tokens=tokens,
        k=one((0, 1, 10, 10, size, size + 3)),
        picks=one((0, 1, 10, size + 3)),
        anchor=anchor,
        zones=zones,
        special=one(((), (), (math.nan,), (math.inf,), (-math.inf,), (math.nan, math.inf, -math.inf))),
        half=bool(rng.random() < 0.3),
        excluded=one((0, 0, 2, 30)),
        duplicates=bool(rng.random() < 0.1),
        width=width,
        shards=one((1, 1, 3)),
        allowed=one(((), (), (one(kinds),), (one(kinds), one(kinds), one(kinds)))),
        vectors=vectors,
    )
    way = Way(
        threads=one((1, 2, 3, 4)),
        block_queries=one((1, 7, 1024, 1024)),
        least_field=one((1, 50, 1024)),
        sample=one((0, 60, 500, 4096)),
        rescore_cost=one((0, 0, 10_000)),
        instruction_set=one(_kernels.instruction_sets()),
        screened=bool(rng.random() < 0.75),
        listed=one((0.0, 0.5, 1.0)),
        list_limit=one((1, 50, 10**9, 10**9)),
        prefixed=one((0.0, 0.5, 1.0)),
    )
    return case, way, bool(rng.random() < 0.15)


def real_request(case: Case) -> ZoneRequest:
    """Unit vectors around some directions, or none, with what else the case asks for; zones by distances from a score."""
    rng, like = np.random.default_rng(case.seed), case.request()
    centres = unit_vectors(rng, 7, case.width) * np.float32(rng.choice((0, 1, 3)))
    items = unit_vectors(rng, case.size, case.tokens, case.width) + centres[rng.integers(7, size=(case.size, case.tokens))]
    queries = unit_vectors(rng, case.batch, case.width) + centres[rng.integers(7, size=case.batch)]
    for vectors in (items, queries):
        vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-6))  # D = 1: minus its centre
    if case.duplicates:
        items[: case.size // 2] = items[:1]
    items[9::10] = 0
    zones = case.zones and ZoneSpec(lo=0.03, hi=0.3, policy=case.zones.policy, seed=case.zones.seed, temperature=0.1)
    return validated(
        queries,
        np.array_split(items.astype(np.float16 if case.half else np.float32), case.shards),
        k=case.k,
        anchor=rng.uniform(-0.2, 1, case.batch).astype(np.float32) if zones and case.anchor == "score" else None,
        zones=zones,
        picks=like.picks,
        counts=like.counts,
        exclude=[like.excluded[a:b] for a, b in zip(like.offsets[:-1], like.offsets[1:], strict=True)],
        allowed=None if like.allowed is None else like.allowed[0] if len(case.allowed) == 1 else like.allowed,
    )


def assert_agrees_within_rounding(request: ZoneRequest, way: Way) -> ZoneRequest:
    """With scores in float64; and, of few queries, to the bit with what the same kernels find without a screen."""
    request = dataclasses.replace(request, screen=way.screen(request))
    found = way.select(request)
    if request.batch <= _kernels.MAX_ROW_QUERIES:
        assert_same(found, way.select(dataclasses.replace(request, screen=None)))
    scores = max_sim(request.queries.astype(np.float64), np.concatenate(request.shards).astype(np.float64))  # type: ignore[arg-type]
    scores[np.repeat(np.arange(request.batch), np.diff(request.offsets)), request.excluded] = -np.inf
    if request.allowed is not None:
        scores[np.broadcast_to(~unpacked(request.allowed, request.size), scores.shape)] = -np.inf
    for b in range(request.batch):
        _assert_row_agrees(request, found, b, scores[b])
    return request


def _assert_row_agrees(request: ZoneRequest, found: ZoneSelection, b: int, scores: NDArray[np.float32], *, slack: float = 2e-5) -> None:
    count = int(np.isfinite(scores).sum())
    kept, best = min(count, request.k), np.sort(scores)[::-1]
    _assert_taken(found.ids[b], found.scores[b], scores, kept, slack)
    np.testing.assert_allclose(found.scores[b, :kept], best[:kept], rtol=0, atol=slack)
    if request.zones is None or count == 0:
        return
    assert found.counts is not None
    anchor, zones = float(best[0]) if request.anchor_scores is None else float(request.anchor_scores[b]), request.zones
    delta = anchor - scores[np.isfinite(scores)]
    lower, upper = (
        [np.sum(delta < zones.lo - s), np.sum((delta >= zones.lo + s) & (delta <= zones.hi - s)), np.sum(delta > zones.hi + s)]
        for s in (slack, -slack)
    )
    assert np.all(lower <= found.counts[b]), (lower, found.counts[b])
    assert np.all(found.counts[b] <= upper), (found.counts[b], upper)
    if found.picks is None or found.pick_scores is None:
        return
    picked = min(int(found.counts[b, 1]), request.picks)
    _assert_taken(found.picks[b], found.pick_scores[b], scores, picked, slack)
    distances = anchor - found.pick_scores[b, :picked]
    assert np.all((distances >= zones.lo - slack) & (distances <= zones.hi + slack)), distances
    surely = delta[(delta >= zones.lo + slack) & (delta <= zones.hi - slack)]
    if zones.policy == "hardest" and picked and len(surely):
        assert distances[0] <= surely.min() + slack


def _assert_taken(ids: NDArray[np.int64], given: NDArray[np.float32], scores: NDArray[np.float32], count: int, slack: float) -> None:
    """`count` items, each once and with its score, and padding."""
    assert len(set(ids[:count].tolist())) == count
    assert np.all(ids[:count] >= 0)
    assert np.all(ids[count:] == -1)
    np.testing.assert_allclose(given[:count], scores[ids[:count]], rtol=0, atol=slack)


def kinds_of(case: Case, way: Way, real: bool, request: ZoneRequest) -> list[str]:
    """What the case is one of, as the table counts it."""
    screen, zones = request.screen, case.zones
    kinds = [f"instruction set {way.instruction_set}", "several threads" if way.threads > 1 else "one thread"]
    kinds.append("batch 1" if case.batch == 1 else "batches 2 to 4" if case.batch <= 4 else "batches 5 to 64")
    kinds.append("D 1 to 15" if case.width < 16 else "D 16 to 255" if case.width < 256 else "D 256 to 768")
    kinds.append("M 1" if case.tokens == 1 else "M 2 to 8" if case.tokens <= 8 else "M 9 to 32")
    kinds.append("float16 items" if case.half else "float32 items")
    met = not real and case.vectors != "integers" and met_bounds(case.vectors, np.random.default_rng(0), case.width) is not None
    kinds.append("real vectors, within rounding" if real else f"items on the bound of {case.vectors}" if met else "whole numbers, ties")
    for holds, name in (
        (not real and case.duplicates, "all items equal"),
        (not real and case.batch >= 3, "zero queries"),
        (real and case.size > 9, "zero items"),
        (real and case.duplicates, "duplicate items"),
        (any(map(math.isnan, case.special)) and case.size > 0, "NaN in items"),
        (any(map(math.isinf, case.special)) and case.size > 0, "infinity in items"),
        (case.excluded > 0, "exclusions"),
        (bool(case.allowed), "bitmaps"),
        (case.shards > 1, "several shards"),
        (case.k > 0, "top k"),
        (case.k >= case.size, "k at least N"),
        (screen is not None, "screened"),
        (screen is not None and screen.lists is not None, "lists"),
        (screen is not None and (screen.prefix or (screen.lists and screen.lists.prefix)) is not None, "prefixes"),
    ):
        if holds:
            kinds.append(name)
    if zones is not None:
        kinds += ["zones and counts", f"zones {zones.bounds}", f"picks {zones.policy}" if case.picks else "no picks"]
    return kinds


def compare(seed: int, number: int) -> list[str]:
    """The kinds of this case; raises AssertionError if its answer is not the reference's."""
    case, way, real = drawn(seed, number)
    if real:
        request = assert_agrees_within_rounding(real_request(case), way)
    else:
        request, _ = assert_equals_reference(case.request(), way)
    return kinds_of(case, way, real, request)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    kinds, failed, done, begun, said = Counter[str](), list[int](), 0, time.monotonic(), 0.0
    try:
        for number in range(arguments.first, arguments.first + arguments.cases):
            try:
                kinds.update(compare(arguments.seed, number))
            except Exception:
                failed.append(number)
                print(f"case {number} FAILED: {drawn(arguments.seed, number)}\n{traceback.format_exc()}", flush=True)
                print(f"again: python -m support.random_zones --seed {arguments.seed} --first {number} --cases 1", flush=True)
            done += 1
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{done} of {arguments.cases} cases after {said - begun:.0f} s, {len(failed)} failed", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    for kind, count in sorted(kinds.items()):
        print(f"{count:7,}  {kind}")
    print(
        f"seed {arguments.seed}: {done:,} comparisons with the reference, {len(failed)} failed; {time.process_time():.0f} s of processors"
    )
    return 1 if failed or done < arguments.cases else 0


if __name__ == "__main__":
    sys.exit(main())
