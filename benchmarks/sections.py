"""A benchmark's sections: measured one by one, each beside when it ran, how long, on what and how busy that was, and told in a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dqe_training.machine import BUSY, Company

from . import machine, report

_LOOK_SECONDS = 0.5


def busy() -> float | None:
    """The share of the processors' time that is taken while this process waits, where it is high enough to lengthen times, else None.

    Not the load average, which remembers minutes, the last benchmark among them. None too where the system does not say.
    """
    company = Company()
    with company:
        time.sleep(_LOOK_SECONDS)
    return company.share if company.share is not None and company.share > BUSY else None


def recorded(measure: Callable[[], dict[str, Any]], packages: tuple[str, ...], *, quick: bool, threads: int) -> dict[str, Any]:
    """What `measure` returns, after the record of the run: time, load and frequency before and after, machine and versions."""
    load, mhz, started, clock = machine.load_average(), machine.frequencies(), datetime.now(UTC), time.perf_counter()
    measured = measure()
    return {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 1),
        "quick": quick,
        "threads": threads,
        "niceness": os.nice(0),
        "load_before": load,
        "load_after": machine.load_average(),
        "mhz_before": mhz,
        "machine": machine.describe(packages),
        **measured,
    }


def measured(
    path: Path, benchmark: str, sections: Mapping[str, Callable[[], dict[str, Any]]], packages: tuple[str, ...], *, quick: bool
) -> dict[str, Any]:
    """The results in `path`, with these sections measured anew and each written as soon as it is done."""
    results = report.load(path, benchmark)
    for name, measure in sections.items():
        results["sections"][name] = recorded(measure, packages, quick=quick, threads=machine.cores())
        report.save_json(path, results)
    return results


def told(sections: Mapping[str, Any], writers: Mapping[str, Callable[[dict[str, Any]], Sequence[str]]], *, title: str | None) -> str:
    """The report in Markdown: the sections that were measured, in the order of their writers, below a title where there is one."""
    parts = [f"# {title}"] if title else []
    for name in (name for name in writers if name in sections):
        section = sections[name]
        quick = "\n**Small sizes (--quick): shows that it runs, measures nothing of worth.**" if section["quick"] else ""
        parts += [f"## {name}", provenance(section) + quick, *writers[name](section)]
    return "\n\n".join(parts) + "\n"


def provenance(section: dict[str, Any]) -> str:
    """Two lines for a report: the machine with its load, and the versions."""
    on = section["machine"]
    commit = (on["commit"] or "unknown")[:10] + (" with local changes" if on["dirty"] else "")
    load = f"load average {section['load_before'][0]:.2f} before, {section['load_after'][0]:.2f} after"
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items() if version)
    kernels = f"; kernels: {', '.join(section['instruction_sets'])}" if "instruction_sets" in section else ""
    return (
        f"{on['cpu']}, {section['threads']} threads, {load}; commit {commit}; {section['started']}, {section['seconds']:.0f} s.\n"
        f"{versions}{kernels}."
    )
