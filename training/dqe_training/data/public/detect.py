"""From a folder to the dataset that it holds."""

from __future__ import annotations

from pathlib import Path

from dqe_engine.errors import InputError

from .base import Benchmark
from .circo import CIRCO
from .cirr import CIRR
from .fashioniq import FashionIQ
from .hp_fashioniq import HPFashionIQ
from .names import titles
from .pinpoint import PinPoint

FINDERS = {
    "fashioniq": FashionIQ.found_in,
    "cirr": CIRR.found_in,
    "circo": CIRCO.found_in,
    "hp-fashioniq": HPFashionIQ.found_in,
    "pinpoint": PinPoint.found_in,
}
JSONL = "jsonl"
"""The name of a folder as `dqe-data garments` writes it: train.jsonl, val.jsonl, images.jsonl, images/."""

NAMES = (*FINDERS, JSONL)


def _here(directory: Path) -> list[Benchmark]:
    found: list[Benchmark | None] = [find(directory) for find in FINDERS.values()]
    return [benchmark for benchmark in found if benchmark is not None]


def open_benchmark(directory: Path, name: str = "auto") -> Benchmark | None:
    """The public dataset in `directory`; None for a folder of JSON lines, and with "auto" for any other folder.

    Raises InputError where a named dataset is not there, and where several are.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such dataset folder")
    if name == JSONL:
        return None
    if name == "auto":
        found = _here(directory)
        if len(found) > 1:
            raise InputError(f"{directory}: holds {' and '.join(b.name for b in found)}; say which with --dataset")
        return found[0] if found else None
    if name not in FINDERS:
        raise InputError(f"--dataset {name}: expected auto, {', '.join(NAMES)}")
    benchmark: Benchmark | None = FINDERS[name](directory)
    if benchmark is None:
        raise InputError(f"{directory}: no annotations of {name} here; docs/datasets.md shows the folders")
    return benchmark


def find_benchmarks(directory: Path, name: str = "auto") -> list[Benchmark]:
    """Those of `directory`, or else of the folders in it. Raises InputError where there is none."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such dataset folder")
    for folders in ([directory], sorted(path for path in directory.iterdir() if path.is_dir())):
        found = [b for folder in folders for b in _here(folder) if name in ("auto", b.name)]
        if found:
            return found
    wanted = titles() if name == "auto" else name
    raise InputError(f"{directory}: no annotations of {wanted} here or one folder below; docs/datasets.md shows the folders")
