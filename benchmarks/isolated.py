"""Contenders in processes of their own: times undisturbed by other libraries' thread pools, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from .harness import SETTLE_SECONDS, Case, Contender, Memory, Result, Rounds, Timing, check, timed
from .machine import limit_threads
from .resident import status_bytes

T = TypeVar("T")


class OwnProcess:
    """A fresh interpreter for calls one after the other: what the first one loads, the next ones find."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """The function's exceptions are raised by the future."""
        return self._pool.submit(function, *args)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """`begin`, and wait."""
        return self.begin(function, *args).result()


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """One call in an `OwnProcess`."""
    with OwnProcess() as process:
        return process.call(function, *args)


def times_alone(cases: Sequence[Case], name: str, rounds: Rounds, threads: int, *, blocks: int = 1) -> list[Timing]:
    """The contender's times in each of the cases, in one process that runs nothing else; `blocks`: pass over the cases so often."""
    return in_own_process(_times, list(cases), name, rounds, threads, blocks)


def add_alone(
    cases: Sequence[Case],
    results: Sequence[Sequence[Result]],
    rounds: Rounds,
    threads: int,
    *,
    step: Callable[[str], None],
    blocks: int = 1,
) -> None:
    """Time each contender in a process of its own, over all cases that have it, and put that into its results."""
    for name in dict.fromkeys(result.name for row in results for result in row if result.status == "ok"):
        mine = [(case, r) for case, row in zip(cases, results, strict=True) for r in row if r.name == name and r.status == "ok"]
        step(f"{cases[0].label}: {name} in its own process")
        timings = times_alone([case for case, _ in mine], name, rounds, threads, blocks=blocks)
        for (_, result), timing in zip(mine, timings, strict=True):
            result.alone = timing


def peak_memory(case: Case, name: str, threads: int) -> Memory:
    """What the contender's preparation keeps and its first call needs at its peak."""
    return in_own_process(_memory, case, name, threads)


def _contender(case: Case, name: str) -> Contender:
    return next(contender for contender in case.contenders() if contender.name == name)


def _times(cases: Sequence[Case], name: str, rounds: Rounds, threads: int, blocks: int) -> list[Timing]:
    ready = []
    for case in cases:
        contender, inputs = _contender(case, name), case.inputs()
        run = contender.prepare(inputs)
        limit_threads(threads)
        _, cold = check(case, contender, run, case.checker(inputs))
        if cold < rounds.seconds:
            timed(contender, run)
        ready.append((contender, run, list[list[float]]()))
    for _ in range(blocks):
        for contender, run, taken in ready:
            taken.append(_block(contender, run, rounds))
    return [Timing.of_blocks(taken) if blocks > 1 else Timing(tuple(taken[0])) for _, _, taken in ready]


def _block(contender: Contender, run: Callable[[], Any], rounds: Rounds) -> list[float]:
    samples: list[float] = []
    while rounds.wants(samples):
        time.sleep(SETTLE_SECONDS)
        samples.append(timed(contender, run)[0])
    return samples


def _memory(case: Case, name: str, threads: int) -> Memory:
    contender = _contender(case, name)
    if contender.package:
        importlib.import_module(contender.package)  # the library itself is not what the work needs
    limit_threads(threads)
    small = case.small()
    _contender(small, name).prepare(small.inputs())()
    inputs = case.inputs()
    gc.collect()
    return_freed()
    without = status_bytes("VmRSS")
    run = contender.prepare(inputs)
    gc.collect()
    return_freed()
    kept, exact = status_bytes("VmRSS"), _reset_peak()
    before = status_bytes("VmHWM")
    raw = run()
    peak = status_bytes("VmHWM")
    del raw
    return Memory(prepared=max(kept - without, 0), peak_extra=max(peak - before, 0), exact=exact)


def return_freed() -> None:
    """Give freed heap back to the system (glibc), where it would hide what the call takes from it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        return True
    return False
