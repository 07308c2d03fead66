"""Metadata by id, as people write it: JSON lines, or a table with commas (CSV)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dqe_engine.contracts.parsing import without_mark
from dqe_engine.errors import InputError

from .validation import check_ids, checked_metadata

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<fraction>\.[0-9]+)?(?P<exponent>[eE][-+]?[0-9]+)?")
_BOOLEANS = {"true": True, "false": False}
_WHOLE = range(-(2**63), 2**63)


def read_metadata(path: Path) -> dict[str, dict[str, Any] | None]:
    """Metadata by id, None for an id without any.

    JSON lines, objects with a string `id`, or a table with a column `id`. An empty cell is no value. A column of which every value is a
    number as JSON writes it (so not 007; whole ones of 64 bits at most) holds numbers, one of only `true` and `false` booleans, and all
    others strings.

    UTF-8, with or without a byte order mark, any line ends. Raises InputError, which names the first line that cannot be used, and
    OSError.
    """
    raw = without_mark(path.read_bytes())
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from error
    found: dict[str, dict[str, Any] | None] = {}
    lines: dict[str, int] = {}
    first = text.lstrip()[:1]
    if first == "[":
        raise InputError(f"{path}, line 1: a JSON array; write one object a line, without brackets and commas around them")
    for line, id, entry in _json_lines(text, path) if first == "{" else _table(text, path):
        try:
            check_ids([id])
            found[id] = checked_metadata(id, entry) or None
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        if id in lines:
            raise InputError(f"{path}, line {line}: {id!r} again, after line {lines[id]}; keep one of them")
        lines[id] = line
    return found


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise InputError(f'{path}, line {number}: expected an object with a string "id"')
        yield number, entry.pop("id"), entry


def _table(text: str, path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    rows = _rows(text, path)
    _, names = next(rows, (1, list[str]()))
    if "id" not in names or "" in names or len(set(names)) != len(names):
        said = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
        raise InputError(
            f"{path}, line 1: expected a JSON object, or column names of a CSV file: no name empty or repeated, one of them id; got {said}"
        )
    lines, cells = [], []
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {line}: {len(row)} cells, expected {len(names)}; quote cells that hold commas")
        lines.append(line)
        cells.append(row)
    columns = {name: _typed([row[at] for row in cells]) for at, name in enumerate(names) if name != "id"}
    ids = [row[names.index("id")] for row in cells]
    return [
        (line, id, {name: values[at] for name, values in columns.items() if values[at] is not None})
        for at, (line, id) in enumerate(zip(lines, ids, strict=True))
    ]


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with the lines that they begin in."""
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not CSV ({error})") from error


def _typed(cells: list[str]) -> list[Any]:
    """The values of a column, None for empty cells."""
    given = {cell for cell in cells if cell}
    values: dict[str, Any] = {cell: cell for cell in given}
    if given <= _BOOLEANS.keys():
        values = dict(_BOOLEANS)
    elif None not in (numbers := {cell: _number(cell) for cell in given}).values():
        values = numbers
    return [values[cell] if cell else None for cell in cells]


def _number(cell: str) -> int | float | None:
    """None for what is no number, or none that can be kept."""
    if not (found := _NUMBER.fullmatch(cell)):
        return None
    if found["fraction"] or found["exponent"]:
        return number if math.isfinite(number := float(cell)) else None
    return whole if len(cell) <= 20 and (whole := int(cell)) in _WHOLE else None
