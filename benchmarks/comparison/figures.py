"""The figures of a result file, whatever the benchmark, each with the samples that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dqe_engine.errors import InputError
from dqe_engine.files import describe_os_error

from .. import report
from ..harness import Timing
from ..retrieval.figures import by_query, from_record
from ..statistics import Samples

Unit = str
_SKIPPED = frozenset(("machine", "sizes", "targets", "case", "distractors", "settings", "difference", "figures"))
_MACHINE = ("cpu", "cores")
_DETAILS = ("kind", "items", "tokens", "width", "callers", "batch")
"""What tells rows of one name apart where they have no label."""


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """`samples` (n,) whose median (times) or mean (shares and rates) is the figure; `blocks`: how many of them each block has.

    `paired`: sample i of another run's figure is of the same query or seed.
    """

    name: str
    samples: Samples
    unit: Unit = "s"
    lower_is_better: bool = True
    blocks: tuple[int, ...] = ()
    paired: bool = False

    @property
    def value(self) -> float:
        return float(np.median(self.samples) if self.unit == "s" else np.mean(self.samples))

    @property
    def by_block(self) -> list[Samples]:
        return Timing(tuple(self.samples), self.blocks).by_block


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """A result file. `machines`: of each section, what it ran on; `versions` of its libraries."""

    path: Path
    benchmark: str
    figures: dict[str, Figure]
    machines: dict[str, str]
    versions: dict[str, dict[str, str | None]]
    commits: dict[str, str]
    workloads: dict[str, dict[str, Any]]
    """Of each section, what its figures' names do not say: a quick run's are of other work."""


def read(path: Path) -> Results:
    """Raises InputError for what is no result file of ours."""
    try:
        found = report.read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{describe_os_error(error, path)}; expected a JSON that a benchmark wrote") from error
    sections: dict[str, dict[str, Any]] = found.sections
    figures: dict[str, Figure] = {}
    for figure in (figure for name, section in sections.items() for figure in _walk(section, (name,))):
        name = figure.name if figure.name not in figures else f"{figure.name} #{sum(key.startswith(figure.name) for key in figures) + 1}"
        figures[name] = figure
    return Results(
        path,
        found.benchmark,
        figures,
        {name: _machine(section) for name, section in sections.items()},
        {name: section.get("machine", {}).get("versions", {}) for name, section in sections.items()},
        {name: str(section.get("machine", {}).get("commit") or "unknown")[:10] for name, section in sections.items()},
        {name: _workload(section) for name, section in sections.items()},
    )


def _workload(section: Mapping[str, Any]) -> dict[str, Any]:
    sizes = section.get("sizes", {})
    return {"quick": bool(section.get("quick"))} | {key: sizes[key] for key in ("items", "pool", "queries") if key in sizes}


def _machine(section: Mapping[str, Any]) -> str:
    record = section.get("machine", {})
    threads = section.get("threads", record.get("cores"))
    return ", ".join([*(f"{name} {record.get(name)}" for name in _MACHINE), f"threads {threads}"])


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[Figure]:
    """Records of timings, of outcomes by query and of trainings, named by the labels on the way to them."""
    if isinstance(node, list):
        for entry in node:
            if isinstance(entry, dict):
                yield from _walk(entry, (*path, *_label(entry)))
    elif isinstance(node, dict):
        if "samples_s" in node:
            yield _timing(node, path)
            return
        if "counted" in node:  # two timings of one contender, of which the better counts
            if node["counted"] is not None:
                yield from _walk(node[node["counted"]], path)
            if "busy" in node:
                yield from _walk(node["busy"], (*path, "without pauses"))
            return
        if "trainings" in node:
            yield from _trainings(node["trainings"], path)
            return
        if "per_query" in node:
            for name, values in by_query(from_record(node["per_query"])).items():
                yield Figure(" / ".join((*path, name)), values, "share", lower_is_better=False, paired=True)
        yield from _milliseconds(node, path)
        if rates := node.get("blocks_queries_per_s"):
            name = " / ".join((*path, "queries per second"))
            yield Figure(name, np.array(rates, np.float64), "rate", lower_is_better=False, blocks=(1,) * len(rates))
        for key, value in node.items():
            if key not in _SKIPPED:
                yield from _walk(value, path if isinstance(value, list) else (*path, key))


def _label(entry: Mapping[str, Any]) -> tuple[str, ...]:
    if "label" in entry:
        return (str(entry["label"]),)
    names = [str(entry[key]) for key in ("name", "version") if key in entry]
    details = [f"{key} {entry[key]}" for key in _DETAILS if isinstance(entry.get(key), int | str)]
    return (", ".join(names + details),) if names else ()


def _milliseconds(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Figure]:
    """Times of a row in milliseconds: `samples_ms`, or several such as `search_ms` with the blocks that they share."""
    if "samples_ms" in node:
        samples, blocks = np.array(node["samples_ms"]) / 1e3, tuple(node.get("blocks", ()))
        yield Figure(" / ".join((*path, "request")), samples, blocks=blocks if sum(blocks) == len(samples) else ())
    for key, value in node.items():
        if key.endswith("_ms") and isinstance(value, dict) and "samples" in value:
            blocks = tuple(node.get("blocks", ()))
            samples = np.array(value["samples"]) / 1e3
            yield Figure(" / ".join((*path, key.removesuffix("_ms"))), samples, blocks=blocks if sum(blocks) == len(samples) else ())


def _timing(record: Mapping[str, Any], path: tuple[str, ...]) -> Figure:
    timing = Timing.of(dict(record))
    return Figure(" / ".join(path), np.array(timing.samples), blocks=timing.blocks)


def _trainings(trainings: Sequence[Mapping[str, Any]], path: tuple[str, ...]) -> Iterator[Figure]:
    for version in dict.fromkeys(t["version"] for t in trainings):
        mine = sorted((t for t in trainings if t["version"] == version), key=lambda t: int(t["seed"]))
        where = (*path, str(version))
        yield Figure(" / ".join((*where, "wall")), np.array([t["wall_s"] for t in mine]))
        rate = np.array([t["triplets"] / t["steps_s"] for t in mine])
        yield Figure(" / ".join((*where, "triplets per second")), rate, "rate", lower_is_better=False)
        recall = np.array([t["recall_at_10"] for t in mine])
        yield Figure(" / ".join((*where, "recall_at_10")), recall, "share", lower_is_better=False, paired=True)
