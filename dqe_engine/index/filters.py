"""Metadata filters: `{"brand": "x", "price": {">=": 5, "<": 20}, "or": [{"size": {"in": ["S", "M"]}}, {"tags": {"contains": "sale"}}]}`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from dqe_engine.errors import InputError

Filter = Mapping[str, Any]
Scalar: TypeAlias = str | bool | int | float | None

MOST_LEVELS = 32
"""Of filters within filters."""
MOST_VALUES = 1 << 22
"""Conditions, listed values and characters of strings of one filter, all together."""

RANGES = ("<", "<=", ">", ">=")
_OPERATORS = (*RANGES, "!=", "in", "contains", "exists")
_COMBINATIONS = ("and", "or", "not")


@dataclass(frozen=True)
class Condition:
    """One test of one metadata key."""

    key: str
    operator: Literal["in", "!=", "<", "<=", ">", ">=", "contains", "exists"]  # equality is "in" with one value
    operand: Any  # in: a tuple of scalars; exists: a bool; the others: a scalar


@dataclass(frozen=True)
class Combination:
    """All, any or none of some tests hold."""

    operator: Literal["and", "or", "not"]
    parts: tuple[Test, ...]

    @cached_property
    def digest(self) -> bytes:
        """Combinations with the same digest pass the same items."""
        return hashlib.blake2b(_canonical(self).encode("utf-8", "surrogatepass"), digest_size=32).digest()


Test: TypeAlias = Condition | Combination


def compiled_filter(filter: Filter | Combination | None) -> Combination | None:
    """`compile_filter` of what may be compiled already, or no filter at all."""
    return filter if filter is None or isinstance(filter, Combination) else compile_filter(filter)


def compile_filter(filter: Filter) -> Combination:
    """The tests of a filter, all of which must hold; an empty filter passes everything.

    `{key: value}` means equality; `{key: {operator: operand, ...}}` that all of these hold:
    `<` `<=` `>` `>=`: numbers compare with numbers and strings with strings (ISO dates sort so); nothing else passes.
    `!=`, `in`: compares with a string, a number, a bool or null (`in`: a list of such). A bool equals only a bool.
    `contains`: the value is a list that has an element equal to the operand.
    `exists`: true or false; whether the item has the key at all, null included.
    An item that lacks the key does not pass, whatever the operator, but for `{"exists": false}`.

    `{"and": [filter, ...]}`, `{"or": [...]}` and `{"not": [...]}` pass what all, any and none of the filters pass; an item that lacks
    a key thus passes the `not` of a test of it. With anything but a list, the three words are metadata keys like others.

    Raises InputError for a filter that is not of this form, or is larger or deeper than `MOST_VALUES` and `MOST_LEVELS`.
    """
    return _Compiler().combination("and", [filter], level=0)


def is_small(filter: object, most: int) -> bool:
    """Whether a filter is of built-in types and has at most that many keys, values and characters: told in no more steps."""
    left, rest = most, [filter]
    while rest:
        part = rest.pop()
        if isinstance(part, str | dict | list | tuple):
            left -= len(part)
        elif part is None or isinstance(part, int | float):
            left -= 1
        else:
            return False  # another mapping or sequence, or a mistake
        if left < 0:
            return False
        if isinstance(part, dict):
            rest.extend(part)
            rest.extend(part.values())
        elif isinstance(part, list | tuple):
            rest.extend(part)
    return True


class _Compiler:
    def __init__(self) -> None:
        self._values = 0

    def combination(self, operator: Literal["and", "or", "not"], filters: Sequence[Any], level: int) -> Combination:
        if level > MOST_LEVELS:
            raise InputError(f"a filter of more than {MOST_LEVELS} levels of and, or and not; write it flatter")
        parts: list[Test] = []
        for filter in filters:
            tests = self._tests(filter, level)
            if not tests and level:
                raise InputError(f"filter {operator!r}: an empty filter in its list passes everything; leave it out")
            for test in tests if operator == "and" or len(tests) == 1 else [Combination("and", tuple(tests))]:
                same = isinstance(test, Combination) and test.operator == operator != "not"
                parts += test.parts if isinstance(test, Combination) and same else [test]
        return Combination(operator, tuple(parts))

    def _tests(self, filter: Any, level: int) -> list[Test]:
        if not isinstance(filter, Mapping):
            raise InputError(f"a filter maps metadata keys to values or operators, got {described(filter)}")
        tests: list[Test] = []
        for key, condition in filter.items():
            if not isinstance(key, str):
                raise InputError(f"filter keys are strings, got {described(key)}")
            self._count(key)
            if key in _COMBINATIONS and isinstance(condition, list | tuple):
                if not condition:
                    raise InputError(f"filter {key!r}: needs a list of at least one filter")
                tests.append(self.combination(key, condition, level + 1))  # type: ignore[arg-type]  # one of the three
            elif isinstance(condition, Mapping):
                if not condition:
                    raise InputError(f"filter {described(key)}: {{}} holds no operator; use {', '.join(_OPERATORS)}, or leave the key out")
                tests += [self._condition(key, name, operand) for name, operand in condition.items()]
            else:
                tests.append(self._condition(key, "==", condition))
        return tests

    def _condition(self, key: str, name: Any, operand: Any) -> Condition:
        where = f"filter {described(key)}"
        if name in RANGES:
            if isinstance(operand, bool) or not isinstance(operand, str | int | float) or operand != operand:
                raise InputError(f"{where}: {name} needs a number or a string, got {described(operand)}")
            if isinstance(operand, int) and not _representable(operand):
                operand = math.inf if operand > 0 else -math.inf
            return Condition(key, name, self._count(operand))
        if name == "in":
            if isinstance(operand, str | bytes) or not isinstance(operand, Sequence):
                raise InputError(f"{where}: in needs a list of values, got {described(operand)}")
            return Condition(key, "in", tuple(self._scalar(where, value) for value in operand))
        if name == "exists":
            if not isinstance(operand, bool):
                raise InputError(f"{where}: exists needs true or false, got {described(operand)}")
            return Condition(key, "exists", operand)
        if name in ("==", "!=", "contains"):
            value = self._scalar(where, operand)
            return Condition(key, "in", (value,)) if name == "==" else Condition(key, name, value)
        remedy = f"; {key!r} of filters takes a list of them" if key in _COMBINATIONS else ""
        known = f"use {', '.join(_OPERATORS)}, or a plain value for equality"
        raise InputError(f"{where}: unknown operator {described(name)}; {known}{remedy}")

    def _scalar(self, where: str, value: Any) -> Any:
        finite = math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or _representable(value)
        if (value is None or isinstance(value, str | bool | int | float)) and finite:
            return self._count(value)
        raise InputError(f"{where}: compares with a string, a finite number, a bool or null, got {described(value)}")

    def _count(self, value: Any) -> Any:
        """`value`; raises where the filter has grown too large with it."""
        self._values += 1 + (len(value) if isinstance(value, str) else 0)
        if self._values > MOST_VALUES:
            raise InputError(f"a filter of more than {MOST_VALUES:,} values and characters; split it into several searches")
        return value


def described(value: object) -> str:
    """A value in a message: short, on one line, and of any size and depth."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 80 else f"{value[:80]!r}… of {len(value):,} characters"
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= 256):
        return repr(value)
    return f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _representable(value: int) -> bool:
    """Whether a float could be as large."""
    return value.bit_length() <= 1023


def _canonical(test: Test) -> str:
    """The same for filters whose conditions or listed values differ in their order only."""
    if isinstance(test, Combination):
        return f"{test.operator}({','.join(sorted(set(map(_canonical, test.parts))))})"
    operand = sorted(set(map(repr, test.operand))) if isinstance(test.operand, tuple) else test.operand
    return repr((test.key, test.operator, operand))
