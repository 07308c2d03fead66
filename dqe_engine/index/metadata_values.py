"""The values of one kind that items have under one metadata key: what is kept of each, which pass a condition, and how often each comes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .filters import RANGES, Condition, Scalar

Flags = NDArray[np.bool_]
Kind: TypeAlias = Literal["text", "number", "boolean"]
Entries: TypeAlias = slice | Flags
"""Which entries of a part, the first of them: up to the slice's stop, or those whose flag is set."""

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_EXACT = 2**53
"""Whole numbers up to here are the same as float64."""
_LISTED: tuple[Kind, ...] = ("text", "number", "boolean")


class Tally(NamedTuple):
    """The values of one kind that some items have under a key, alone or (`listed`) in lists. counts: of the items that have `values[i]`,
    (n,); there may be more values."""

    kind: Kind
    listed: bool
    values: Sequence[Any] | NDArray[Any]
    counts: NDArray[np.int64]


class Growing:
    """A growing array of numbers; what it gave out never changes."""

    def __init__(self, dtype: Any) -> None:
        self._buffer = np.empty(0, dtype)
        self._size = 0

    def append(self, values: Sequence[Any] | NDArray[Any]) -> None:
        size = self._size + len(values)
        if size > len(self._buffer):
            grown = np.empty(size + size // 2, self._buffer.dtype)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : size] = values
        self._size = size  # last: a reader takes the size first

    @property
    def values(self) -> NDArray[Any]:
        size = self._size
        return self._buffer[:size]


class Values:
    """The items of a column that have a value of one kind, ascending; subclasses say what is kept of each value."""

    def __init__(self) -> None:
        self._rows = Growing(np.uint32)

    def append(self, rows: Sequence[int], values: Sequence[Any]) -> None:
        self._store(values)
        self._rows.append(rows)  # last: there is a value for every row that a reader sees

    def mark(self, flags: Flags, start: int, stop: int, test: Condition | None) -> None:
        """Set the flags of the items between `start` and `stop` that pass `test`, or that are here at all."""
        rows = self._rows.values
        first, last = np.searchsorted(rows, np.array((start, stop), rows.dtype)).tolist()  # of another type, all rows would be converted
        if first == last:
            return
        found = None if test is None else self._test(test, first, last)
        if last - first == stop - start:
            flags |= True if found is None else found
        else:
            flags[rows[first:last] - start if found is None else rows[first:last][found] - start] = True

    def entries(self, size: int, chosen: Flags | None) -> Entries:
        """Of the items below `size` that are chosen."""
        rows = self._rows.values
        last = int(np.searchsorted(rows, np.array(size, rows.dtype)))  # of the same type, as in `mark`
        if chosen is None:
            return slice(last)
        return chosen[:last] if last == size else chosen[rows[:last]]  # all of them, as mostly

    def tally(self, entries: Entries) -> list[Tally]:
        """The values of these entries; of most kinds there is nothing to say."""
        return []

    def __len__(self) -> int:
        return len(self._rows.values)

    def _store(self, values: Sequence[Any]) -> None:
        """Append the values of further items."""

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        """Which of the entries from `first` to `last` pass; `!=` as its opposite."""
        return np.zeros(last - first, np.bool_)


class Strings(Values):
    """Strings as codes into a table; the first 16 bytes of each, as two numbers, decide most comparisons of their order."""

    def __init__(self) -> None:
        super().__init__()
        self._codes = Growing(np.int32)
        self._table: list[str] = []
        self._code_of: dict[str, int] = {}
        self._heads, self._seconds = Growing(np.uint64), Growing(np.uint64)

    def _store(self, values: Sequence[Any]) -> None:
        new = [value for value in dict.fromkeys(values) if value not in self._code_of]
        heads, seconds = _beginnings(new)
        self._table += new
        self._heads.append(heads)
        self._seconds.append(seconds)
        self._code_of.update(zip(new, range(len(self._table) - len(new), len(self._table)), strict=True))
        self._codes.append([self._code_of[value] for value in values])  # last: what a reader finds for them is there

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        codes = self._codes.values[first:last]
        size = len(self._seconds.values)  # after the codes: all of them are below
        if test.operator in RANGES:
            if not isinstance(test.operand, str):
                return np.zeros(len(codes), np.bool_)
            distinct, at = (np.arange(size), codes) if len(codes) >= size else np.unique(codes, return_inverse=True)
            found: Flags = self._compare(distinct, test.operator, test.operand)[at]
            return found
        wanted = [code for value in _operands(test) if isinstance(value, str) and (code := self._code_of.get(value, size)) < size]
        if len(wanted) > 1:
            passing = np.zeros(size, np.bool_)
            passing[wanted] = True
            found = passing[codes]
        else:
            found = codes == (wanted[0] if wanted else -1)
        return found

    def tally(self, entries: Entries) -> list[Tally]:
        codes = _taken(self._codes.values, entries)
        return [Tally("text", False, self._table, np.bincount(codes))] if len(codes) else []

    def _compare(self, codes: NDArray[Any], name: str, other: str) -> Flags:
        """Whether the strings of these codes are `name` (<, say) `other`."""
        heads, seconds = self._heads.values[codes], self._seconds.values[codes]
        (head,), (second,) = _beginnings([other])
        tied = (heads == head) & (seconds == second)
        below = (heads < head) | ((heads == head) & (seconds < second))
        passes: Flags = below if name in ("<", "<=") else ~below
        at = np.flatnonzero(tied)
        passes[at] = [_COMPARE[name](self._table[code], other) for code in codes[at].tolist()]
        return passes


class Numbers(Values):
    def __init__(self) -> None:
        super().__init__()
        self._floats = Growing(np.float64)

    def _store(self, values: Sequence[Any]) -> None:
        self._floats.append(values)

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        values = self._floats.values[first:last]
        if test.operator in RANGES:
            if isinstance(test.operand, str):
                return np.zeros(len(values), np.bool_)
            other = float(test.operand)
            # Where a whole number has no float64 of its own, what is below it is what is below, or at, its neighbour.
            between = (other > test.operand) - (other < test.operand)
            below, at_most = values < other, values <= other
            if test.operator in ("<", "<="):
                return at_most if between < 0 or (between == 0 and test.operator == "<=") else below
            return ~at_most if between < 0 or (between == 0 and test.operator == ">") else ~below
        wanted = np.sort([other for value in _operands(test) if _is_number(value) and (other := float(value)) == value])
        if len(wanted) <= 1:
            found: Flags = values == (wanted[0] if len(wanted) else np.nan)
        else:  # np.isin would sort the values
            found = wanted[np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)] == values
        return found

    def tally(self, entries: Entries) -> list[Tally]:
        values, counts = np.unique(_taken(self._floats.values, entries), return_counts=True)
        return [Tally("number", False, values, counts)] if len(values) else []


class LargeNumbers(Values):
    """Whole numbers that float64 would round."""

    def __init__(self) -> None:
        super().__init__()
        self._integers: list[int] = []

    def _store(self, values: Sequence[Any]) -> None:
        self._integers.extend(values)

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        values = self._integers[first:last]
        if test.operator in RANGES:
            compare, other = _COMPARE[test.operator], test.operand
            return np.array([not isinstance(other, str) and compare(value, other) for value in values], np.bool_)
        wanted = {value for value in _operands(test) if _is_number(value)}
        return np.array([value in wanted for value in values], np.bool_)

    def tally(self, entries: Entries) -> list[Tally]:
        integers = self._integers
        chosen = integers[entries] if isinstance(entries, slice) else compress(integers, entries.tolist())
        counts = Counter(chosen)
        return [Tally("number", False, list(counts), np.array(list(counts.values())))] if counts else []


class Bools(Values):
    def __init__(self) -> None:
        super().__init__()
        self._bools = Growing(np.bool_)

    def _store(self, values: Sequence[Any]) -> None:
        self._bools.append(values)

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        values = self._bools.values[first:last]
        wanted = () if test.operator in RANGES else [value for value in _operands(test) if isinstance(value, bool)]
        return (values & (True in wanted)) | (~values & (False in wanted))

    def tally(self, entries: Entries) -> list[Tally]:
        values = _taken(self._bools.values, entries)
        return [Tally("boolean", False, (False, True), np.bincount(values, minlength=2))] if len(values) else []


class Nulls(Values):
    def _test(self, test: Condition, first: int, last: int) -> Flags:
        return np.full(last - first, test.operator not in RANGES and any(value is None for value in _operands(test)))


class Lists(Values):
    """Lists as codes of their elements; an element that is itself a list or an object equals nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._ends = Growing(np.int64)  # where the elements of each list end
        self._elements = Growing(np.int32)
        self._table: list[Scalar] = []
        self._kinds = Growing(np.int8)  # of the elements in the table, as in `_LISTED`
        self._code_of: dict[tuple[bool, Scalar], int] = {}

    def _store(self, values: Sequence[Any]) -> None:
        ends: list[int] = []
        codes: list[int] = []
        before, known = len(self._elements.values), len(self._table)
        for value in values:
            codes += dict.fromkeys(map(self._code, value))  # an element that comes twice counts once
            ends.append(before + len(codes))
        self._kinds.append([_listed_kind(element) for element in self._table[known:]])
        self._elements.append(codes)
        self._ends.append(ends)

    def _code(self, element: Any) -> int:
        if isinstance(element, list | dict):
            return -1
        key = _element(element)
        if (code := self._code_of.get(key)) is None:
            code = len(self._table)
            self._table.append(element)
            self._code_of[key] = code  # last: what a reader finds for it is there
        return code

    def _test(self, test: Condition, first: int, last: int) -> Flags:
        found = np.zeros(last - first, np.bool_)
        if test.operator != "contains":
            return found
        ends = self._ends.values
        begin, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        hits = np.flatnonzero(self._elements.values[begin:end] == self._code_of.get(_element(test.operand), -2)) + begin
        found[np.searchsorted(ends[first:last], hits, side="right")] = True
        return found

    def tally(self, entries: Entries) -> list[Tally]:
        if isinstance(entries, slice):
            stop = int(self._ends.values[entries.stop - 1]) if entries.stop else 0
            elements = self._elements.values[:stop]
        else:
            lengths = np.diff(self._ends.values[: len(entries)], prepend=0)
            lists = np.repeat(entries, lengths)
            elements = self._elements.values[: len(lists)][lists]
        counts = np.bincount(elements + 1, minlength=1)[1:]
        kinds = self._kinds.values[: len(counts)]
        found = []
        for number, kind in enumerate(_LISTED):
            of_kind = np.where(kinds == number, counts, 0)
            if of_kind.any():
                found.append(Tally(kind, True, self._table, of_kind))
        return found


def _beginnings(strings: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first and the second 8 bytes, in UTF-8, whose order is that of the strings; equal ones do not tell."""
    octets = b"".join([string[:16].encode("utf-8", "surrogatepass")[:16].ljust(16, b"\0") for string in strings])
    pairs = np.frombuffer(octets, ">u8").astype(np.uint64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _taken(values: NDArray[Any], entries: Entries) -> NDArray[Any]:
    found: NDArray[Any] = values[entries] if isinstance(entries, slice) else values[: len(entries)][entries]
    return found


def _listed_kind(element: Scalar) -> int:
    """Index in `_LISTED`, -1 for null."""
    if isinstance(element, str):
        return 0
    return -1 if element is None else 2 if isinstance(element, bool) else 1


def _element(value: Scalar) -> tuple[bool, Scalar]:
    """1 and 1.0 are one element, and True is another."""
    return isinstance(value, bool), value


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _operands(test: Condition) -> tuple[Scalar, ...]:
    """What a value is compared with for equality; nothing where the operator asks something else."""
    if test.operator == "in":
        operands: tuple[Scalar, ...] = test.operand
        return operands
    return (test.operand,) if test.operator == "!=" else ()


def kind_of(value: Any) -> type[Values]:
    if isinstance(value, str):
        return Strings
    if isinstance(value, bool):
        return Bools
    if isinstance(value, float) or (isinstance(value, int) and -_EXACT <= value <= _EXACT):
        return Numbers
    if isinstance(value, int):
        return LargeNumbers
    if isinstance(value, list):
        return Lists
    return Nulls if value is None else Values
