"""A pinned commit beside the present tree: both run the same small workload in turns, and the ratio within each round counts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dqe_engine.errors import InputError
from dqe_training.data.records import TripletRecord, read_jsonl

from .. import pinned
from .bands import Change, paired_change
from .files import Comparison
from .workload import BATCHES, ITEMS

SECTIONS = ("zones", "search")
PRESENT = "present tree"
_ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("workload.py")


def compare_versions(
    commit: str, sections: Sequence[str], *, rounds: int, work: Path, demo: Path, step: Callable[[str], None] = lambda text: None
) -> Comparison:
    """Raises InputError for a commit that is not there or cannot run a section, and where the demo is missing for `search`."""
    options = {section: workload_options(section, demo) for section in sections}
    step(f"building {commit}")
    versions = {commit: _installed(commit, work), PRESENT: pinned.present()}
    medians: dict[str, dict[str, list[float]]] = {}
    for number, version, commands in pinned.turns(versions, rounds):
        for section in sections:
            step(f"round {number + 1} of {rounds}: {section}, {version}")
            for name, seconds in run(version, commands, section, options[section]).items():
                medians.setdefault(f"{section} / {name}", {}).setdefault(version, []).append(_median(seconds))
    note = f"Old: {commit}, built in {work}. New: the present tree. {rounds} rounds in turns, a process each; ratios are within a round."
    return Comparison(tuple(_change(name, found, commit) for name, found in medians.items()), (note,))


def run(version: str, commands: Path, section: str, options: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of each call, by case, of one process of that version. Raises InputError where it cannot run the section."""
    command = [str(commands / "python"), "-P", str(_SCRIPT), section, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.path.abspath(os.sep))
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InputError(f"{version} cannot run {section} ({said[-1] if said else f'code {done.returncode}'}); leave it out with --only")
    found = json.loads(done.stdout)
    if version != PRESENT and Path(found["package"]).is_relative_to(_ROOT / "dqe_engine"):
        raise InputError(f"{version}: the process loaded the present tree's package; remove the folder of the build and run again")
    samples: dict[str, list[float]] = found["samples_s"]
    return samples


def workload_options(section: str, demo: Path) -> dict[str, Any]:
    """What the workload needs, as JSON. Raises InputError where the demo is missing."""
    if section == "zones":
        return {"items": ITEMS}
    for path in (demo / "bundle" / "manifest.json", demo / "index" / "manifest.json", demo / "garments" / "val.jsonl"):
        if not path.is_file():
            raise InputError(f"{path}: missing, and `search` needs it; run `make demo` (minutes), or take --only zones")
    records = read_jsonl(demo / "garments" / "val.jsonl", TripletRecord)[: max(BATCHES)]
    place = demo.resolve()
    return {
        "bundle": str(place / "bundle"),
        "index": str(place / "index"),
        "images": str(place / "garments" / "images"),
        "references": [record.reference for record in records],
        "texts": [record.text for record in records],
    }


def _installed(commit: str, work: Path) -> Path:
    try:
        return pinned.install(commit, work)
    except subprocess.CalledProcessError as error:
        if "rev-parse" in error.cmd:
            raise InputError(f"--pinned {commit}: no such commit here; pass a hash, tag or branch that git knows") from error
        raise InputError(f"--pinned {commit}: cannot be built; {error.cmd[0]} ended with code {error.returncode}, see above") from error


def _change(name: str, found: Mapping[str, Sequence[float]], commit: str) -> Change:
    return paired_change(name, found[commit], found[PRESENT])


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]
