"""What a run leaves beside its table: `results.json`, the rows behind every figure, and what each query was answered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.parsing import Contract, to_json
from dqe_engine.contracts.provenance import Provenance
from dqe_engine.contracts.versioned import Versioned, read_document
from dqe_engine.errors import InputError
from dqe_engine.files import atomic_write
from dqe_training.data.queries import QuerySet
from dqe_training.evaluation.benchmarks import AspectFigure

from .figures import Figure, Rows
from .keys import key_of
from .work import Seen, View

RESULTS, ROWS_FILE, TABLE = "results.json", "rows.npz", "table.md"


class RowResult(Contract, frozen=True):
    """`label`: "runtime int8". `device`: what it was encoded on. `figures`: by measure; none where answers are secret. `same_first_10`:
    the share of queries whose first ten are, in their order, those of the table's first row."""

    label: str
    device: str
    figures: dict[str, Figure]
    same_first_10: float | None = None
    aspects: dict[str, AspectFigure] = msgspec.field(default_factory=dict)


class Paired(Contract, frozen=True):
    """A row minus another one, query by query: `of` and `against` are their labels."""

    of: str
    against: str
    figures: dict[str, Figure]


class ViewResult(Contract, frozen=True):
    """`queries` and `gallery`: how many, by query set. `asked`: changes with queries, answers and galleries, not with texts' wording;
    rows of two are not paired."""

    view: View
    queries: dict[str, int]
    gallery: dict[str, int]
    asked: str
    rows: dict[str, RowResult]
    differences: tuple[Paired, ...] = ()


class PublishedRow(Contract, frozen=True):
    """In per cent, in the order of the measures. `of`: what split the figures are of."""

    name: str
    title: str
    source: str
    of: str
    figures: tuple[float, ...]


class Results(Versioned, frozen=True, kw_only=True):
    """`measures`: title by name, in the order of the columns. `published`: None where no row is of these weights' layout. `texts`: how the
    dataset's texts were read."""

    kind: Literal["reproduction"] = "reproduction"
    schema_version: int = 1
    dataset: str
    weights: str
    imported: Provenance | None
    texts: str = "as annotated"
    command: str
    date: str
    versions: dict[str, str]
    measures: dict[str, str]
    views: tuple[ViewResult, ...]
    published: PublishedRow | None
    notes: tuple[str, ...]


def asked_of(seen: Seen) -> str:
    """Identity of what a view asks, see `ViewResult`. Texts have no part in it: the same question may be read in several wordings, which
    can then be compared query by query."""
    sets = [(queries.name, queries.gallery, [repr(replace(query, text="")) for query in queries.queries]) for queries in seen.sets]
    return key_of(msgspec.to_builtins(seen.view), sets)


def save_rows(path: Path, rows: Mapping[tuple[str, str], Rows]) -> None:
    """`rows`: by identity of the view and row. Values are few and repeat, so they pack well."""
    arrays = {f"{asked}|{row}|{name}": values for (asked, row), by_set in rows.items() for name, values in by_set.items()}
    with atomic_write(path) as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


class Earlier:
    """Another run's results, to be compared with. Raises InputError where there are none of this dataset."""

    def __init__(self, directory: Path, dataset: str) -> None:
        self.directory, path = directory, directory / RESULTS
        try:
            self.results = read_document(Results, path, remedy="run dqe-reproduce again", error=InputError)
            with np.load(directory / ROWS_FILE) as stored:
                self._rows = {name: stored[name] for name in stored.files}
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{directory}: no {RESULTS} with its {ROWS_FILE} here; give the folder that a run of dqe-reproduce named"
            ) from error
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{directory}: cannot be read ({' '.join(str(error).split())[:160]}); run dqe-reproduce again") from error
        if self.results.dataset != dataset:
            raise InputError(f"{directory}: these are results of {self.results.dataset}, this run is of {dataset}")

    def check_asks(self, asked: Collection[str]) -> None:
        """Raises InputError where it asked none of these, as results of an earlier version did."""
        if not any(name.partition("|")[0] in asked for name in self._rows):
            raise InputError(
                f"{self.directory}: no view of it asks what this run asks; run it again with this version, or leave --against out"
            )

    def rows(self, asked: str, row: str) -> Rows | None:
        """None where it did not ask the same, or has no such row."""
        prefix = f"{asked}|{row}|"
        return {name.removeprefix(prefix): values for name, values in self._rows.items() if name.startswith(prefix)} or None


def write_answers(path: Path, sets: Sequence[QuerySet], rankings: Sequence[NDArray[np.int64]]) -> None:
    """A line for each query: what was asked, what came first, and at which place the labelled target was (None beyond the ranking, or
    where it is secret)."""
    with atomic_write(path) as stream:
        for queries, ranked in zip(sets, rankings, strict=True):
            for row, query in enumerate(queries.queries):
                target = queries.target[row]
                places = np.flatnonzero((ranked[row] == target) & (target >= 0))
                line = {
                    "set": queries.name, "query": query.id, "reference": query.reference, "text": query.text, "targets": query.targets,
                    "place": int(places[0]) + 1 if len(places) else None,
                    "first": [queries.gallery[at] for at in ranked[row, :10].tolist() if at >= 0],
                }  # fmt: skip
                stream.write(msgspec.json.encode(line) + b"\n")


def write_text(path: Path, content: str | bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def write_results(directory: Path, results: Results, rows: Mapping[tuple[str, str], Rows], table: str) -> None:
    """The table last: where it is, all of it is."""
    write_text(directory / RESULTS, to_json(results))
    save_rows(directory / ROWS_FILE, rows)
    write_text(directory / TABLE, table)
