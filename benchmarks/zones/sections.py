"""The sections of the benchmark: which cases each runs, and what it records of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..harness import Case, Result, Rounds, interleave
from ..isolated import add_alone, peak_memory
from ..machine import available_bytes, limit_threads
from . import peaks
from .cases import MaxSimCase, ScalingCase, SearchCase, TopKCase
from .refresh import OURS, RefreshCase
from .vectors import Kind, VectorSpec

KINDS: tuple[Kind, ...] = ("random", "clustered")
WIDTH = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is; `quick` is for seeing that it runs."""

    items: int = 200_000
    batches: tuple[int, ...] = (1, 16, 64, 256)
    max_sim_items: int = 20_000
    tokens: int = 32
    refresh: int = 18_000
    peer_queries: int = 256
    our_queries: int = 1024
    scaling_items: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000, 2_000_000, 5_000_000)
    scaling_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    copied_bytes: int = 1 << 29
    rounds: Rounds = dataclasses.field(default_factory=Rounds)
    slow_rounds: Rounds = dataclasses.field(default_factory=lambda: Rounds(minimum=3, maximum=20, seconds=1.0))

    kinds: tuple[Kind, ...] = KINDS

    @classmethod
    def short(cls) -> Sizes:
        """Full sizes, few rounds, random vectors only."""
        rounds = Rounds(minimum=3, maximum=10, seconds=0.3)
        return cls(
            rounds=rounds,
            slow_rounds=dataclasses.replace(rounds, minimum=2),
            peer_queries=64,
            scaling_items=(10_000, 30_000, 100_000, 300_000, 1_000_000),
            scaling_batches=(1, 4, 16, 64, 256, 1024),
            kinds=("random",),
        )

    @classmethod
    def quick(cls) -> Sizes:
        return cls(
            items=10_000,
            batches=(1, 16, 64),
            max_sim_items=1_000,
            refresh=1_000,
            peer_queries=16,
            our_queries=64,
            scaling_items=(1_000, 5_000, 20_000),
            scaling_batches=(1, 16, 128),
            copied_bytes=1 << 25,
            rounds=Rounds(minimum=3, maximum=20, seconds=0.1),
            slow_rounds=Rounds(minimum=3, maximum=5, seconds=0.05),
        )


@dataclass(slots=True)
class Bench:
    """What all sections share. `step` shows what is being done, `reached` the share of the section, `wanted` chooses contenders."""

    sizes: Sizes
    threads: int
    alone: bool
    full: bool
    wanted: Callable[[str], bool]
    step: Callable[[str], None]
    reached: Callable[[float], None]

    def case(self, case: Case, results: Sequence[Result], **more: Any) -> dict[str, Any]:
        return {"label": case.label, "case": case.describe(), "contenders": [result.record() for result in results]} | more

    def interleave(self, case: Case, rounds: Rounds, **options: Any) -> list[Result]:
        return interleave(case, rounds, wanted=self.wanted, on_step=self.step, prepared=lambda: limit_threads(self.threads), **options)

    def run_alone(self, cases: Sequence[Case], results: Sequence[list[Result]], rounds: Rounds) -> None:
        """Time each contender in a process of its own, over all cases that have it."""
        if self.alone:
            add_alone(cases, results, rounds, self.threads, step=self.step)

    def measure_memory(self, case: Case, results: Sequence[Result]) -> None:
        for result in results:
            if result.status == "ok":
                self.step(f"{case.label}: memory of {result.name}")
                result.memory = peak_memory(case, result.name, self.threads)


def top_k(bench: Bench) -> dict[str, Any]:
    """Exact top-k of single vectors, with and without zones, over random and clustered vectors."""
    sizes, out = bench.sizes, []
    for half, kind in enumerate(sizes.kinds):
        spec = VectorSpec(kind, sizes.items, max(sizes.batches), WIDTH)
        cases = [TopKCase(spec, batch, bench.threads, with_zones=True) for batch in sizes.batches]
        results, ceilings = [], []
        for case in cases:
            ceiling: list[float] = []
            results.append(bench.interleave(case, sizes.rounds, between=lambda c=ceiling: c.append(peaks.fma_flops(bench.threads))))
            ceilings.append(max(ceiling))
            bench.reached((half + len(results) / (2 * len(cases))) / len(sizes.kinds))
        bench.run_alone(cases, results, sizes.rounds)
        for case, row, ceiling_flops in zip(cases, results, ceilings, strict=True):
            if bench.alone and case.batch == 64 and kind == sizes.kinds[0]:
                bench.measure_memory(case, row)
            out.append(bench.case(case, row, flops=flops(case), fma_flops_per_s=ceiling_flops))
    return {"cases": out}


def max_sim(bench: Bench) -> dict[str, Any]:
    """Items of many tokens, the best token counting."""
    sizes, out = bench.sizes, []
    for half, kind in enumerate(sizes.kinds):
        bench.reached(half / len(sizes.kinds))
        spec = VectorSpec(kind, sizes.max_sim_items, 16, WIDTH, sizes.tokens)
        case = MaxSimCase(spec, 16, bench.threads)
        results = bench.interleave(case, sizes.rounds)
        bench.run_alone([case], [results], sizes.rounds)
        bench.measure_memory(case, results)
        out.append(bench.case(case, results, flops=flops(case)))
    return {"cases": out}


def refresh(bench: Bench) -> dict[str, Any]:
    """Mining for as many queries as items: the peers on a slice, ours on a larger one or (`full`) on all, besides the slice."""
    sizes = bench.sizes
    spec = VectorSpec("clustered", sizes.refresh, sizes.peer_queries, WIDTH, sizes.tokens)
    peers = RefreshCase(spec, bench.threads)
    queries = sizes.refresh if bench.full else sizes.our_queries
    ours = RefreshCase(dataclasses.replace(spec, queries=queries), bench.threads, peers=False)
    # Ours first and by itself: nothing else is loaded yet.
    our_results = bench.interleave(ours, Rounds(minimum=1 if bench.full else 3, maximum=5, seconds=1.0))
    bench.reached(0.5)
    peer_results = bench.interleave(peers, sizes.slow_rounds)
    bench.run_alone([peers], [peer_results], sizes.slow_rounds)
    bench.measure_memory(peers, [result for result in peer_results if result.name != OURS])
    bench.measure_memory(ours, our_results)
    return {"cases": [bench.case(peers, peer_results), bench.case(ours, our_results)], "queries": sizes.refresh}


def scaling(bench: Bench) -> dict[str, Any]:
    """Cost against the number of items (16 queries) and of queries, over float16 vectors."""
    sizes, out = bench.sizes, []
    largest = max(*sizes.scaling_items, sizes.items)
    series = [(items, 16) for items in sizes.scaling_items] + [(sizes.items, batch) for batch in sizes.scaling_batches]
    for number, (items, batch) in enumerate(dict.fromkeys(series)):
        bench.reached(number / len(series))
        spec = VectorSpec("random", items, max(sizes.scaling_batches), WIDTH, storage="float16")
        case = ScalingCase(spec, batch, bench.threads, gallery=largest)
        results = bench.interleave(case, sizes.slow_rounds, skip=_within_memory(case))
        out.append(bench.case(case, results))
    return {"cases": out, "items": sizes.items}


def _within_memory(case: ScalingCase) -> Callable[[str], str | None]:
    """Contenders as they come, while what they hold fits four fifths of the free memory."""
    case.inputs()  # the gallery itself is made first
    left = 0.8 * available_bytes()

    def skip(name: str) -> str | None:
        nonlocal left
        needed = case.bytes_needed(name)
        if needed > left:
            return "skipped: memory"
        left -= needed
        return None

    return skip


def roofline(bench: Bench) -> dict[str, Any]:
    """Ours in its modes against the machine's peaks of the same run."""
    sizes = bench.sizes
    bench.step("peaks: multiply-add, matrix product, copy, read")
    ceilings, points = peaks.measure(bench.threads, copied_bytes=sizes.copied_bytes), []
    cases: list[SearchCase] = [
        TopKCase(VectorSpec("random", sizes.items, max(sizes.batches), WIDTH), batch, bench.threads) for batch in sizes.batches
    ]
    cases.append(MaxSimCase(VectorSpec("random", sizes.max_sim_items, 16, WIDTH, sizes.tokens), 16, bench.threads))
    for number, case in enumerate(cases):
        bench.reached(number / len(cases))
        results = interleave(case, sizes.rounds, wanted=lambda name: name in ("ours", "ours f16", "ours screened"), on_step=bench.step)
        for result in results:
            if result.best is None or result.agreement is None:
                continue
            rescored = result.agreement.notes.get("rescored_per_query")
            points.append(
                {
                    "name": result.name,
                    "case": case.label,
                    "batch": case.batch,
                    "tokens": case.spec.tokens,
                    "median_s": result.best.median,
                    "flops": flops(case),
                    "bytes": swept_bytes(case, result.name, rescored),
                }
            )
    return {"peaks": ceilings.record(), "points": points}


def flops(case: SearchCase) -> int:
    """Of the inner products alone, two per multiply-add; screening's 8-bit ones count as much."""
    return 2 * case.batch * case.spec.items * case.spec.tokens * case.spec.width


def swept_bytes(case: SearchCase, name: str, rescored: float | None) -> int:
    """Of the items, read once: what a single sweep must read at least."""
    values = case.spec.items * case.spec.tokens * case.spec.width
    if name == "ours screened":
        again = math.ceil(4 * case.spec.width * case.batch * (rescored or 0.0))
        return values + 12 * case.spec.items * case.spec.tokens + min(again, 4 * values)
    return values * (2 if name == "ours f16" else 4)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "top-k": top_k,
    "maxsim": max_sim,
    "refresh": refresh,
    "scaling": scaling,
    "roofline": roofline,
}
