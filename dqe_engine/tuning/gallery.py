"""All ways to search one gallery, measured one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from dqe_engine.processors import available_cpus
from dqe_engine.zones import Screen

from .contenders import F32, Contender, LeftOutError, early, exact
from .frontier import Measured, measure, ranked
from .token_indexes import contenders

MOST_GRAPHED = 1 << 20
"""Rows of the largest graph that is made without being asked for."""


@dataclass(slots=True)
class _Shared:
    """A screen with lists and prefixes that several ways search by: built once, and charged to each of them."""

    threads: int
    screen: Screen | None = None
    seconds: float = 0.0
    charged: float = 0.0
    """Seconds that ways after the first have not waited for, all together."""

    def __call__(self, items: F32) -> Screen:
        if self.screen is None:
            started = time.perf_counter()
            self.screen = Screen.build(items, threads=self.threads)
            self.seconds = time.perf_counter() - started
        else:
            self.charged += self.seconds
        return self.screen


def measure_all(
    items: F32, queries: F32, *, k: int, enough: float = 0.998, threads: int = 0, graphs: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> tuple[list[Measured], dict[str, str]]:  # fmt: skip
    """Every setting that was tried, and of each way that was not why. items: (N, M, D) float32; queries: (Q, D)."""
    threads = threads or available_cpus()
    shared = _Shared(threads)
    ways: list[Contender] = [
        exact("exact, every token read", "", screened=False, lists=False),
        exact("exact, 8-bit copy", "", screened=True, lists=False, prefix=False, threads=threads),
        exact("exact, 8-bit copy and lists", "", screened=True, lists=True, made=shared),
        early("lists that stop early", shared),
        *contenders(k=k, most_rows=None if graphs else MOST_GRAPHED),
    ]
    out: list[Measured] = []
    left_out: dict[str, str] = {}
    truth = None
    for way in ways:
        reason = "not installed" if way.package is not None and find_spec(way.package) is None else way.obstacle(items)
        if reason:
            left_out[way.name] = reason
            continue
        step(f"building: {way.name}")
        started, charged = time.perf_counter(), shared.charged
        try:
            built = way.build(items)
        except LeftOutError as error:
            left_out[way.name] = str(error)
            continue
        seconds = time.perf_counter() - started + shared.charged - charged
        if truth is None:
            setting = (built.ladders(threads) or [])[0][0]
            truth = ranked(setting, queries, k)
        out += measure(way, built, seconds, queries, truth, threads=threads, enough=enough, step=step)
    return out, left_out
