"""Contenders in processes of their own: times undisturbed by other libraries' thread pools, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .harness import SETTLE_SECONDS, Case, Contender, Memory, Rounds, Timing, check, timed
from .machine import limit_threads

T = TypeVar("T")


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    """Call in a fresh interpreter; its exceptions are raised here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def times_alone(cases: Sequence[Case], name: str, rounds: Rounds, threads: int, *, blocks: int = 1) -> list[Timing]:
    """The contender's times in each of the cases, in one process that runs nothing else; `blocks`: pass over the cases so often."""
    return in_own_process(_times, list(cases), name, rounds, threads, blocks)


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
    _return_freed()
    without = status_bytes("VmRSS")
    run = contender.prepare(inputs)
    gc.collect()
    _return_freed()
    kept, exact = status_bytes("VmRSS"), reset_peak()
    before = status_bytes("VmHWM")
    raw = run()
    peak = status_bytes("VmHWM")
    del raw
    return Memory(prepared=max(kept - without, 0), peak_extra=max(peak - before, 0), exact=exact)


def _return_freed() -> None:
    """Give freed heap back to the system (glibc), where it would hide what the call takes from it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        return True
    return False


def status_bytes(name: str) -> int:
    """A memory figure of this process. VmHWM and not `ru_maxrss`: the latter inherits the parent's peak through exec."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
