"""The output folder's three files, each whole or absent, written anew whenever a cell is finished."""

from __future__ import annotations

from pathlib import Path

from dqe_engine.contracts.parsing import to_json
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write, describe_write_error

from .comparison import Comparison
from .plot import plot
from .table import table

RESULTS, TABLE, PLOT = "results.json", "table.md", "plot.png"


def write_report(out: Path, comparison: Comparison) -> None:
    """results.json, table.md and, where two arms can be compared, plot.png. Raises InputError when the disk takes none."""
    try:
        with atomic_write(out / RESULTS) as stream:
            stream.write(to_json(comparison))
        with atomic_write(out / TABLE, "w") as stream:
            stream.write(table(comparison))
        if not plot(comparison, out / PLOT):
            (out / PLOT).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(describe_write_error(error, out)) from error
