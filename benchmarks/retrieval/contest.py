"""Exact search beside other libraries' exact and approximate search: each at its fastest setting that finds enough of the exact answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from dqe_engine.tuning import Contender as Library
from dqe_engine.tuning import LeftOutError, early, exact
from dqe_engine.tuning.contenders import Found, Setting
from dqe_engine.tuning.frontier import Measured, best, measure, ranked
from dqe_engine.tuning.token_indexes import contenders as approximate

from .. import machine
from ..harness import AnswerMismatchError, Contender, Rounds, Timing, check, timed
from . import rivals
from .cases import GalleryCase
from .galleries import Gallery
from .methods import Point
from .tokens import Tokens

K = 10
ENOUGH = 0.998
LISTS, SCREEN, EARLY = "ours, screen and lists", "ours, screen alone", "ours, lists that stop early"
CELLS = (2, 8)
"""FAISS's cells for each root of the number of tokens. Its guidelines name 4 to 16; about 2 balance reading centroids and reading cells."""
_ROOM = 1.7
"""Of the items' bytes, that any index must find free."""
_EXACT_ASKED = 16
"""Queries by which a library's exact search is compared with ours, since some take a second each; approximate ones answer all."""


@dataclass(frozen=True)
class Contest:
    """How it is measured: rounds of single queries in blocks, by each number of threads."""

    rounds: Rounds = field(default_factory=lambda: Rounds(minimum=3, maximum=150, seconds=0.25))
    blocks: int = 3
    asked: int = 256
    threads: tuple[int, ...] = field(default_factory=lambda: tuple(dict.fromkeys((machine.cores(), 1))))
    step: Callable[[str], None] = lambda text: None


def exact_contenders() -> list[Library]:
    how = "the 8-bit copy rules out tokens; what is left is scored in float32. Exact."
    return [
        exact(
            LISTS,
            f"lists rule out clusters of tokens and, where they do not and it pays, prefixes most tokens; then {how}",
            screened=True,
            lists=True,
        ),
        exact(SCREEN, how, screened=True, lists=False, prefix=False),
        rivals.flat(K),
        rivals.panorama(K),
    ]


def all_contenders(**graphs: Any) -> list[Library]:
    scoring_all = (rivals.numkong_dots(), rivals.numkong_maxsim(), rivals.maxsim_cpu())
    return [*exact_contenders(), early(EARLY), *scoring_all, *approximate(cells=CELLS, **graphs)]


def compare(label: str, tokens: Tokens, wanted: Sequence[Library], contest: Contest) -> list[dict[str, Any]]:
    """A row for each contender and number of threads. Raises AnswerMismatchError where an exact answer is another than ours."""
    items, queries = tokens.items, tokens.queries[: contest.asked]
    rows: list[dict[str, Any]] = []
    chosen: dict[int, list[tuple[dict[str, Any], Measured]]] = {threads: [] for threads in contest.threads}
    truth: Found | None = None
    for contender in wanted:
        if reason := _obstacle(contender, tokens):
            rows.append({"name": contender.name, "status": reason})
            continue
        contest.step(f"{label}: building {contender.name}")
        started = time.perf_counter()
        try:
            built = contender.build(items)
        except LeftOutError as error:
            rows.append({"name": contender.name, "status": str(error)})
            continue
        build_s = time.perf_counter() - started
        if truth is None:  # ours comes first
            truth = ranked(_first(built.ladders(machine.cores())), queries, K)
        known: dict[Any, float] = {}
        for threads in contest.threads:
            ladders = built.ladders(threads)
            if ladders is None:
                continue
            asked = len(queries) if not _first(ladders).exact or contender.name in (LISTS, SCREEN) else min(_EXACT_ASKED, len(queries))
            few = (truth[0][:asked], truth[1][:asked])
            contest.step(f"{label}: {contender.name}, settings")
            tried = measure(contender, built, build_s, queries[:asked], few, threads=threads, enough=ENOUGH, known=known)
            found = best(tried, ENOUGH)
            if found.setting.exact:
                _check_exact(label, contender.name, found, queries[:asked], few)
            row = {
                "name": contender.name, "status": "ok", "threads": threads, "exact": found.setting.exact, "recall": found.recall,
                "asked": asked, "settings": found.setting.values, "bytes": found.size, "build_s": round(build_s, 2),
            }  # fmt: skip
            rows.append(row)
            chosen[threads].append((row, found))
    _time(label, tokens, chosen, contest)
    return rows


def _obstacle(contender: Library, tokens: Tokens) -> str | None:
    if contender.package is not None and find_spec(contender.package) is None:
        return "not installed"
    if reason := contender.obstacle(tokens.items):
        return reason
    return "skipped: memory" if machine.available_bytes() < _ROOM * tokens.items.nbytes else None


def _first(ladders: Any) -> Setting:
    setting: Setting = ladders[0][0]
    return setting


def _check_exact(label: str, name: str, found: Measured, queries: Any, truth: Found) -> None:
    """Ours to the bit, whatever rules out; other libraries add in another order."""
    if found.recall < 1.0:
        raise AnswerMismatchError(f"{label}: {name} finds {found.recall:.2%} of the exact {K}, and is said to be exact")
    if name in (LISTS, SCREEN):
        scores, ids = ranked(found.setting, queries, K)
        if not (np.array_equal(ids, truth[1]) and np.array_equal(scores, truth[0])):
            raise AnswerMismatchError(f"{label}: {name}: other ids or scores than with lists")


def _time(label: str, tokens: Tokens, chosen: dict[int, list[tuple[dict[str, Any], Measured]]], contest: Contest) -> None:
    """Single queries, each at once after the last, in blocks that take turns; answers held against float64 first. Into the rows."""
    gallery, references, truths = Gallery(tokens.items), np.full(len(tokens.queries), -1, np.int64), {}  # type: ignore[var-annotated]
    ready: list[tuple[dict[str, Any], Contender, Callable[[], Any], list[list[float]]]] = []
    for threads, found in chosen.items():
        points = {}
        for row, measured in found:
            setting = measured.setting
            known = setting.exact or row["name"] == EARLY or "re-scored" in row["name"]
            points[row["name"]] = Point(setting.values, setting.search, setting.exact, "exact" if known else "own")
        case = GalleryCase(f"{label}, {threads} threads", gallery, tokens.queries[: contest.asked], references, points, 1, K, truths)
        checker = case.checker(case.inputs())
        for (row, _), contender in zip(found, case.contenders(), strict=True):
            contest.step(f"{case.label}: checking {contender.name}")
            run = contender.prepare(case.inputs())
            check(case, contender, run, checker)
            ready.append((row, contender, run, []))
    for block in range(contest.blocks):
        for row, contender, run, blocks in ready:
            contest.step(f"{label}: {row['name']}, block {block + 1}")
            timed(contender, run)
            samples: list[float] = []
            while contest.rounds.wants(samples):
                samples.append(timed(contender, run)[0])
            blocks.append(samples)
    for row, _, _, blocks in ready:
        row |= Timing.of_blocks(blocks).record()
