"""Timing of contenders: answers compared first, rounds interleaved, the better of shared and own process counted.

A benchmark describes its work as cases (`Case`), each with its inputs, its contenders and a check of their answers. Nothing
here knows what is being measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from .statistics import Samples, band, block_medians

SETTLE_SECONDS = 0.01
"""Pause between two contenders, in which the idle threads of the last one's pool stop spinning."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do a case's work.

    `prepare` turns the case's inputs into the call to be timed (building an index, converting, uploading: not timed) and is
    where the library is imported. `answer` turns what that call returned into what the case's check takes (not timed).
    """

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    answer: Callable[[Any], Any] = lambda raw: raw
    package: str | None = None
    """The module that must be importable; None where nothing but this project is needed."""
    unavailable: Callable[[], str | None] = lambda: None
    """Why it cannot run on this machine, such as "not run: no GPU"; that becomes its status."""
    checked_calls: int = 1
    """So many calls make the answer that is checked, where one call does a part of the case's work; `answer` gets all of them."""
    synchronize: Callable[[], None] = lambda: None
    """Wait until a device is idle; called before the clock is read."""

    @property
    def installed(self) -> bool:
        return self.package is None or find_spec(self.package) is not None

    def obstacle(self) -> str | None:
        """Why it cannot run here; None where it can."""
        return self.unavailable() if self.installed else "not installed"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an answer compares with the truth of its case."""

    ok: bool
    max_error: float
    """Largest absolute error of a score."""
    same_ids: float
    """Share of the true ids that were returned; below 1 where rounding swaps neighbours at the end of the list."""
    detail: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    """Figures that the answer itself reports."""


class Case(Protocol):
    """Picklable, so that a process of its own can build the same inputs again."""

    @property
    def label(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...
    def small(self) -> Case:
        """The same work on next to nothing: run before memory is measured, so that thread pools and lazy imports do not count."""
        ...

    def inputs(self) -> Any: ...
    def contenders(self) -> Sequence[Contender]: ...
    def checker(self, inputs: Any) -> Callable[[Any], Agreement]: ...


class AnswerMismatchError(Exception):
    """A contender's answer is wrong, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Each contender runs `minimum` times, and on until it has spent `seconds` or run `maximum` times."""

    minimum: int = 5
    maximum: int = 60
    seconds: float = 2.0

    def wants(self, samples: Sequence[float]) -> bool:
        return len(samples) < self.minimum or (len(samples) < self.maximum and sum(samples) < self.seconds)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each run."""

    samples: tuple[float, ...]
    blocks: tuple[int, ...] = ()
    """How many of the samples each block of the run has, in order; empty: one block."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Timing:
        """What `record` wrote."""
        return cls(tuple(record["samples_s"]), tuple(record.get("blocks", ())))

    @classmethod
    def of_blocks(cls, blocks: Sequence[Sequence[float]]) -> Timing:
        return cls(tuple(sample for block in blocks for sample in block), tuple(map(len, blocks)) if len(blocks) > 1 else ())

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def by_block(self) -> list[Samples]:
        """The samples of each block."""
        return np.split(np.array(self.samples), np.cumsum(self.blocks, dtype=np.int64)[:-1])

    @property
    def band(self) -> tuple[float, float] | None:
        """Where the median of another run on this machine is expected (`statistics.band`); None for fewer than three blocks."""
        return band([float(np.median(block)) for block in self.by_block], around=self.median)

    def record(self) -> dict[str, Any]:
        blocks = {"blocks": list(self.blocks), "band_s": self.band} if self.blocks else {}
        return {
            "median_s": self.median,
            "p95_s": float(np.percentile(self.samples, 95)),
            "min_s": min(self.samples),
            "rounds": len(self.samples),
            "samples_s": [round(sample, 7) for sample in self.samples],
            **blocks,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of resident memory, measured in a process of the contender's own."""

    prepared: int
    """Kept by what `prepare` built, beyond the inputs."""
    peak_extra: int
    """Peak of the first call, beyond what was resident before it."""
    exact: bool
    """False: the peak counter could not be reset, so an earlier, higher peak may hide this one."""


@dataclass(slots=True)
class Result:
    """What was measured of one contender in one case."""

    name: str
    status: str = "ok"
    agreement: Agreement | None = None
    interleaved: Timing | None = None
    alone: Timing | None = None
    busy: Timing | None = None
    """As `alone`, but each call at once after the last one."""
    memory: Memory | None = None

    @property
    def best(self) -> Timing | None:
        """The timing that counts: the one with the smaller median."""
        return min((t for t in (self.interleaved, self.alone) if t), key=lambda t: t.median, default=None)

    def record(self) -> dict[str, Any]:
        out: dict[str, Any] = {"name": self.name, "status": self.status}
        for name, timing in (("interleaved", self.interleaved), ("alone", self.alone)):
            out[name] = timing.record() if timing else None
        if self.busy:
            out["busy"] = self.busy.record()
        best = self.best
        out["median_s"] = best.median if best else None
        out["counted"] = None if best is None else "interleaved" if best is self.interleaved else "alone"
        if self.agreement:
            a = self.agreement
            out["answer"] = {"max_score_error": a.max_error, "same_ids": a.same_ids, "detail": a.detail} | a.notes
        if self.memory:
            m = self.memory
            out["memory"] = {"prepared_bytes": m.prepared, "peak_extra_bytes": m.peak_extra, "exact": m.exact}
        return out


def timed(contender: Contender, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned."""
    contender.synchronize()
    started = time.perf_counter()
    raw = run()
    contender.synchronize()
    return time.perf_counter() - started, raw


def check(case: Case, contender: Contender, run: Callable[[], Any], checker: Callable[[Any], Agreement]) -> tuple[Agreement, float]:
    """Run and hold the answer against the truth; also the seconds a call took. Raises AnswerMismatchError."""
    calls = [timed(contender, run) for _ in range(contender.checked_calls)]
    raw = [found for _, found in calls] if contender.checked_calls > 1 else calls[0][1]
    agreement = checker(contender.answer(raw))
    if not agreement.ok:
        raise AnswerMismatchError(f"{case.label}: {contender.name}: {agreement.detail}")
    return agreement, sum(seconds for seconds, _ in calls) / len(calls)


class Turns:
    """A case whose contenders are prepared, checked and warm, to be timed in turns: in one block, or in several spread over a run.

    `wanted` chooses contenders, `skip` gives a reason not to run one (memory), which becomes its status; `prepared` is called once
    every library is loaded. Raises AnswerMismatchError.
    """

    def __init__(
        self,
        case: Case,
        rounds: Rounds,
        *,
        wanted: Callable[[str], bool] = lambda name: True,
        skip: Callable[[str], str | None] = lambda name: None,
        on_step: Callable[[str], None] = lambda text: None,
        prepared: Callable[[], None] = lambda: None,
    ) -> None:
        self.case, self.rounds = case, rounds
        self._on_step = on_step
        self._results: list[Result] = []
        self._ready: list[tuple[Contender, Callable[[], Any], list[list[float]], Result]] = []
        cold: dict[str, float] = {}
        inputs = case.inputs()
        checker = case.checker(inputs)
        for contender in case.contenders():
            if not wanted(contender.name):
                continue
            reason = contender.obstacle() or skip(contender.name)
            result = Result(contender.name, status=reason or "ok")
            self._results.append(result)
            if reason:
                continue
            on_step(f"{case.label}: checking {contender.name}")
            run = contender.prepare(inputs)
            result.agreement, cold[contender.name] = check(case, contender, run, checker)
            self._ready.append((contender, run, [], result))
        prepared()
        for contender, run, _, _ in self._ready:  # warm caches and pools, now that every library has been loaded
            if cold[contender.name] < rounds.seconds:  # the check itself is warm-up enough for what takes long
                timed(contender, run)

    def block(self, *, between: Callable[[], None] = lambda: None) -> None:
        """Rounds until each contender has its own; `between` is called once a round."""
        turns: list[tuple[Contender, Callable[[], Any], list[float]]] = [(contender, run, []) for contender, run, _, _ in self._ready]
        while any(self.rounds.wants(samples) for _, _, samples in turns):
            self._on_step(f"{self.case.label}: round {1 + max(len(samples) for _, _, samples in turns)}")
            between()
            for contender, run, samples in turns:
                if self.rounds.wants(samples):
                    time.sleep(SETTLE_SECONDS)
                    samples.append(timed(contender, run)[0])
        for (_, _, blocks, _), (_, _, samples) in zip(self._ready, turns, strict=True):
            blocks.append(samples)

    def results(self) -> list[Result]:
        """Of the blocks so far, in the order of the case's contenders."""
        for _, _, blocks, result in self._ready:
            result.interleaved = Timing.of_blocks(blocks)
        return self._results


def interleave(case: Case, rounds: Rounds, *, between: Callable[[], None] = lambda: None, **options: Any) -> list[Result]:
    """Measure all contenders of a case in this process, taking turns in one block. `options` are those of `Turns`."""
    turns = Turns(case, rounds, **options)
    turns.block(between=between)
    return turns.results()


def ratio(slow: Timing, fast: Timing, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """How many times faster: the ratio of medians, and the ends of its percentile bootstrap interval.

    Where both were timed in the same number of blocks, blocks are drawn first (the same of both) and runs within them.
    """
    rng = np.random.default_rng(0)
    if len(slow.blocks) == len(fast.blocks) > 1:
        medians = block_medians(rng, (slow.by_block, fast.by_block), _RESAMPLES)
    else:
        medians = [np.median(rng.choice(t.samples, (_RESAMPLES, len(t.samples))), axis=1) for t in (slow, fast)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians[0] / medians[1], (tail, 1 - tail))
    return slow.median / fast.median, float(low), float(high)
