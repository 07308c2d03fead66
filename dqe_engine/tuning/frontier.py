"""Recall and time of every setting, and which are worth having: no other is both faster and finds more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .contenders import F32, Built, Contender, Found, Setting

TIE = 5e-6
"""Scores this close are equal but for the order in which products were added, so either item is a right answer."""
_BATCH, _LOOKS, _TIMED = 64, 5, 32
_OF_THREADS = ("threads", "split")
"""Settings that say who does the work, and change no answer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting: `seconds` of one query alone (median), and the share of the exact k best that it finds."""

    name: str
    setting: Setting
    recall: float
    seconds: float
    size: int
    build_s: float


def recall(found: Found, truth: Found) -> float:
    """Share of the exact k best that were found; an item that scores as much as the k-th counts as one of them."""
    scores, ids = truth[0], truth[1]
    lowest = np.where(ids >= 0, scores, np.inf).min(axis=1)
    among = (found[1][:, :, None] == ids[:, None]).any(axis=2) | (found[0] >= lowest[:, None] - TIE)
    right = (among & (found[1] >= 0)).sum(axis=1)
    return float(np.minimum(right, (ids >= 0).sum(axis=1)).sum() / max(1, (ids >= 0).sum()))


def ranked(setting: Setting, queries: F32, k: int) -> Found:
    """In batches."""
    parts = [setting.search(some, np.full(len(some), -1, np.int64), k) for some in _parts(queries)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def seconds(setting: Setting, queries: F32, k: int, *, calls: int = _TIMED) -> float:
    """Median of single queries, after one that warms."""
    nobody, taken = np.full(1, -1, np.int64), []
    setting.search(queries[:1], nobody, k)
    for at in range(calls):
        query = queries[at % len(queries)][None]
        started = time.perf_counter()
        setting.search(query, nobody, k)
        taken.append(time.perf_counter() - started)
        if sum(taken) > 1.0 and len(taken) >= _LOOKS:
            break
    return float(np.median(taken))


def measure(
    contender: Contender, built: Built, build_s: float, queries: F32, truth: Found, *, threads: int, enough: float,
    known: dict[Any, float] | None = None, step: Callable[[str], None] = lambda text: None,
) -> list[Measured]:  # fmt: skip
    """Every setting of an index, each ladder up to the first that finds `enough`. `known`: recalls of this index and these queries, kept
    from one number of threads to the next, for they do not depend on it."""
    k, out, known = truth[1].shape[1], [], {} if known is None else known
    for ladder in built.ladders(threads) or ():
        for setting in ladder:
            step(f"{contender.name}: {described(setting.values)}")
            key = tuple(value for value in setting.values.items() if value[0] not in _OF_THREADS)
            found = known[key] if key in known else known.setdefault(key, recall(ranked(setting, queries, k), truth))
            out.append(Measured(contender.name, setting, found, seconds(setting, queries, k), built.size, build_s))
            if found >= enough:
                break
    return out


def best(measured: Iterable[Measured], enough: float) -> Measured:
    """The fastest that finds `enough`; the one that finds most where none does."""
    rows = list(measured)
    return min(rows, key=lambda row: (0.0, row.seconds) if row.recall >= enough else (1.0 - row.recall, row.seconds))


def frontier(measured: Iterable[Measured]) -> list[Measured]:
    """Those that no other beats in both, fastest first."""
    out: list[Measured] = []
    for row in sorted(measured, key=lambda row: (row.seconds, -row.recall)):
        if not out or row.recall > out[-1].recall:
            out.append(row)
    return out


def described(values: Mapping[str, int]) -> str:
    """A setting's, in words."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _parts(queries: F32) -> list[Any]:
    return [queries[start : start + _BATCH] for start in range(0, len(queries), _BATCH)]
