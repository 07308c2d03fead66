"""Finished cells on disk: one file each, whole or absent, named by what the cell trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import msgspec
import numpy as np
import torch

from dqe_engine.contracts.parsing import Contract
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.doctor.machine import processor_name
from dqe_engine.errors import CheckpointError, InputError
from dqe_engine.files import atomic_write, describe_write_error, read_regular

from ..config import TrainConfig
from ..evaluation.metrics import PerQuery
from .plan import SCHEMA_VERSION, Cell
from .scores import Scores
from .source_hash import source_hash


class Ratio(Contract, frozen=True):
    """A figure by query (`PerQuery`) as JSON has it, rounded to six decimals; query i of one cell is query i of every other."""

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]

    @classmethod
    def of(cls, figure: PerQuery) -> Ratio:
        return cls(*(tuple(np.round(part, 6).tolist()) for part in (figure.numerator, figure.denominator)))

    @property
    def figure(self) -> PerQuery:
        return PerQuery(np.asarray(self.numerator, np.float64), np.asarray(self.denominator, np.float64))


def stored(scores: Scores) -> dict[str, Ratio]:
    return {name: Ratio.of(figure) for name, figure in scores.items()}


class CellResult(Versioned, frozen=True, kw_only=True):
    """One trained and evaluated cell. `seconds` of training, without loading, encoding and evaluation. `code`: `source_hash` of what did
    it."""

    OLDEST_SCHEMA: ClassVar[int] = SCHEMA_VERSION

    kind: Literal["ablation-cell"] = "ablation-cell"
    schema_version: int = SCHEMA_VERSION
    key: str
    seed: int
    config: TrainConfig
    steps: int
    seconds: float
    refreshes: int
    machine: str
    code: str
    scores: dict[str, Ratio]


def machine() -> str:
    """`AMD EPYC 7B13, 2 cores, torch 2.13.0`, or the GPU where there is one."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor_name()}, {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}"


def cell_path(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.key}.json"


def write_cell(out: Path, cell: Cell, result: CellResult) -> None:
    """Raises InputError when the disk does not take it."""
    path = cell_path(out, cell)
    try:
        with atomic_write(path) as stream:
            stream.write(msgspec.json.encode(result))  # on one line: it is mostly numbers
    except OSError as error:
        raise InputError(describe_write_error(error, path)) from error


def read_cell(out: Path, cell: Cell) -> CellResult | None:
    """None where the cell is not finished. Raises CheckpointError for a file that is damaged."""
    path = cell_path(out, cell)
    try:
        result = read_document(CellResult, path, remedy="remove it, and the cell runs again", error=CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (result.key, result.config) != (cell.key, cell.config):
        raise CheckpointError(f"{path}: holds the result of another cell than its name says; remove it, and the cell runs again")
    return result


def finished(out: Path, cells: Sequence[Cell]) -> dict[str, CellResult]:
    """The finished cells by key."""
    found = {cell.key: read_cell(out, cell) for cell in cells}
    return {key: result for key, result in found.items() if result is not None}


class _Code(msgspec.Struct):
    """What `others_code` reads of a cell: no more, so that cells of any version can be read."""

    code: str


def others_code(out: Path, cells: Sequence[Cell]) -> int:
    """How many cells were finished in `out` by other code than this process's, and are none of `cells`."""
    known = {cell.key for cell in cells}
    count = 0
    for path in (out / "cells").glob("*.json"):
        if path.stem in known:
            continue
        try:
            count += msgspec.json.decode(read_regular(path), type=_Code).code != source_hash()
        except (msgspec.DecodeError, OSError):  # of a version that did not say, or damaged: not of this code either
            count += 1
    return count
