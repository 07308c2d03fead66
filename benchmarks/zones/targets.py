"""What was asked of the kernels, beside what was measured: ratios within one run, printed and never asserted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..harness import Timing, ratio
from ..targets import Target
from .refresh import OURS, PEER

EXACT = ("NumPy matmul + argpartition", "PyTorch matmul + topk", "USearch exact")
FAISS = ("FAISS flat, BLAS forced", "FAISS flat, BLAS from 20", "FAISS flat, default")


class _Case:
    """A recorded case, by contender; of two timings of a contender the better one counts."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record: dict[str, Any] = record
        self.batch = record["case"].get("batch")
        self.label = f"{record['case']['kind']}, B = {self.batch}"
        self.by_name = {c["name"]: c for c in record["contenders"] if c["status"] == "ok"}

    def timing(self, name: str) -> Timing | None:
        entry = self.by_name.get(name)
        return Timing.of(entry[entry["counted"]]) if entry else None

    def best(self, names: tuple[str, ...]) -> tuple[str, Timing] | None:
        found = [(name, timing) for name in names if (timing := self.timing(name))]
        return min(found, key=lambda pair: pair[1].median, default=None)

    def memory(self, name: str) -> int | None:
        entry = self.by_name.get(name, {}).get("memory")
        return entry["peak_extra_bytes"] if entry else None


def targets(sections: dict[str, Any]) -> list[Target]:
    """All targets that the recorded sections allow to judge."""
    return [
        *(target for record in sections.get("top-k", {}).get("cases", ()) for target in _top_k(_Case(record))),
        *(target for record in sections.get("maxsim", {}).get("cases", ()) for target in _max_sim(_Case(record))),
        *_refresh(sections.get("refresh", {})),
    ]


def _faster(section: str, case: _Case, ours: str, names: tuple[str, ...], what: str, least: float, sign: str = "≥") -> Target:
    best, own = case.best(names), case.timing(ours)
    asked = f"{sign} {least:g} ×" if least != 1 else "faster"
    if best is None or own is None:
        return Target(section, f"{what} ({case.label})", asked, "not measured", None)
    times, low, high = ratio(best[1], own)
    against = f" of {best[0]}" if len(names) > 1 else ""
    met = times > least if least == 1 else times >= least
    return Target(section, f"{what} ({case.label})", asked, f"{times:.2f} × [{low:.2f}, {high:.2f}]{against}", met)


def _top_k(case: _Case) -> Iterator[Target]:
    pytorch, product = ("PyTorch matmul + topk",), ("PyTorch matmul alone",)
    if case.batch == 1:
        yield _faster("top-k", case, "ours screened", EXACT + FAISS, "screened, against the best exact contender", 4)
    if case.batch in (16, 64, 256):
        yield from _faster_both_ways("top-k", case, FAISS, "against the best FAISS setting", 1.5 if case.batch == 16 else 1.2)
        yield from _faster_both_ways("top-k", case, pytorch, "against PyTorch", 2)
    if case.batch in (64, 256):
        yield from _faster_both_ways("top-k", case, product, "against PyTorch's matmul alone", 1)
        if own := case.timing("ours"):
            share = case.record["flops"] / own.median / case.record["fma_flops_per_s"]
            yield Target("top-k", f"share of the multiply-add peak ({case.label})", "≥ 80 %", f"{100 * share:.0f} %", share >= 0.8)
    with_zones, without = case.timing("ours + zones"), case.timing("ours")
    if with_zones and without:
        times, low, high = (100 * (value - 1) for value in ratio(with_zones, without))
        measured = f"{times:+.0f} % [{low:+.0f}, {high:+.0f}]"
        yield Target("top-k", f"zones and picks, beside top-k alone ({case.label})", "≤ 15 %", measured, times <= 15)


def _faster_both_ways(section: str, case: _Case, names: tuple[str, ...], what: str, least: float) -> Iterator[Target]:
    """The plain kernel and, where it was measured, the screened one; both are exact."""
    yield _faster(section, case, "ours", names, what, least)
    if case.timing("ours screened"):
        yield _faster(section, case, "ours screened", names, f"screened, {what}", least)


def _max_sim(case: _Case) -> Iterator[Target]:
    peer = "PyTorch einsum + amax + topk"
    yield from _faster_both_ways("maxsim", case, (peer,), f"against {peer}", 2.5)
    for name in ("ours", "ours screened"):
        own, other = case.memory(name), case.memory(peer)
        if own is not None and other:
            share, what = 100 * own / other, f"{name}: peak extra memory, of {peer}'s ({case.label})"
            yield Target("maxsim", what, "< 5 %", f"{share:.1f} %", share < 5)


def _refresh(section: dict[str, Any]) -> Iterator[Target]:
    if not section:
        return
    peers, ours = (_Case(record) for record in section["cases"])
    own, other, queries = ours.timing(OURS), peers.timing(PEER), section["queries"]
    what = f"{queries:,} queries, against {PEER} (extrapolated from {peers.record['case']['queries']:,} queries)"
    if own and other:
        per_query = [Timing(tuple(s / case.record["case"]["queries"] for s in t.samples)) for case, t in ((peers, other), (ours, own))]
        times, low, high = ratio(*per_query)
        yield Target("refresh", what, "≥ 20 ×", f"{times:.1f} × [{low:.1f}, {high:.1f}]", times >= 20)
    if (memory := ours.memory(OURS)) is not None:
        text = f"{memory / 2**20:.0f} MiB over {ours.record['case']['queries']:,} queries"
        yield Target("refresh", "peak extra memory of ours", "< 1 GiB", text, memory < 2**30)
