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
from contextlib import ExitStack
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from .harness import SETTLE_SECONDS, Case, Contender, Memory, Result, Rounds, Timing, check, timed
from .machine import limit_threads
from .resident import status_bytes

T = TypeVar("T")


class OwnProcess:
    """A fresh interpreter for calls one after the other: what the first one loads, the next ones find."""

    context: ClassVar[BaseContext] = multiprocessing.get_context("spawn")

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=self.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
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


def add_alone(
    cases: Sequence[Case],
    results: Sequence[Sequence[Result]],
    rounds: Rounds,
    threads: int,
    *,
    step: Callable[[str], None],
    blocks: int = 1,
    busy: bool = False,
) -> None:
    """Time each contender in a process of its own, over all cases that have it, and put that into its results.

    Processes take turns, block by block, so that all meet the same states of the machine. `busy`: also without the pause between calls.
    """
    names = dict.fromkeys(result.name for row in results for result in row if result.status == "ok")
    mine = {
        name: [(c, r) for c, row in zip(cases, results, strict=True) for r in row if r.name == name and r.status == "ok"] for name in names
    }
    pauses = (SETTLE_SECONDS, 0.0) if busy else (SETTLE_SECONDS,)
    taken: dict[str, list[list[list[list[float]]]]] = {name: [] for name in names}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(OwnProcess()) for name in names}
        for block in range(blocks):
            for name, process in processes.items():
                step(f"{cases[0].label}: {name} in its own process" + (f", block {block + 1} of {blocks}" if blocks > 1 else ""))
                taken[name].append(process.call(_block, tuple(case for case, _ in mine[name]), name, rounds, threads, pauses))
                if block == blocks - 1:
                    process.close()  # and its memory
    for name, by_block in taken.items():
        for number, (_, result) in enumerate(mine[name]):
            timings = [Timing.of_blocks([block[number][way] for block in by_block]) for way in range(len(pauses))]
            result.alone, result.busy = timings[0], timings[1] if busy else None


def peak_memory(case: Case, name: str, threads: int) -> Memory:
    """What the contender's preparation keeps and its first call needs at its peak."""
    return in_own_process(_memory, case, name, threads)


def _contender(case: Case, name: str) -> Contender:
    return next(contender for contender in case.contenders() if contender.name == name)


@cache
def _ready(cases: tuple[Case, ...], name: str, threads: int) -> list[tuple[Contender, Callable[[], Any], float]]:
    """Prepared and checked, once a process, with the seconds of a call."""
    ready = []
    for case in cases:
        contender, inputs = _contender(case, name), case.inputs()
        run = contender.prepare(inputs)
        limit_threads(threads)
        ready.append((contender, run, check(case, contender, run, case.checker(inputs))[1]))
    return ready


def _block(cases: tuple[Case, ...], name: str, rounds: Rounds, threads: int, pauses: Sequence[float]) -> list[list[list[float]]]:
    """Seconds of each run, by case and pause; warm, for another process had the caches."""
    found = []
    for contender, run, seconds in _ready(cases, name, threads):
        if seconds < rounds.seconds:  # the check itself is warm-up enough for what takes long
            timed(contender, run)
        found.append([_rounds(contender, run, rounds, pause) for pause in pauses])
    return found


def _rounds(contender: Contender, run: Callable[[], Any], rounds: Rounds, pause: float) -> list[float]:
    samples: list[float] = []
    while rounds.wants(samples):
        if pause:
            time.sleep(pause)
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
