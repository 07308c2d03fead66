"""Metadata filters: `{"brand": "x", "price": {">=": 5, "<": 20}, "size": {"in": ["S", "M"]}}`, all of which must hold."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dqe_engine.errors import InputError

Filter = Mapping[str, Any]
Predicate = Callable[[Mapping[str, Any] | None], bool]

_RANGE: dict[str, Callable[[Any, Any], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_OPERATORS = (*_RANGE, "!=", "in")


def compile_filter(conditions: Filter) -> Predicate:
    """A function from an item's metadata to whether it passes.

    A plain value means equality; operators are < <= > >= != and in. An item that lacks the key does not pass, whatever the
    operator; ranges compare numbers with numbers and strings with strings (ISO dates sort so), and nothing else passes
    them. A bool equals only a bool. Raises InputError for a filter that is not of this form.
    """
    if not isinstance(conditions, Mapping):
        raise InputError(f"a filter maps metadata keys to values or operators, got {type(conditions).__name__}")
    tests: list[tuple[str, Callable[[Any], bool]]] = []
    for key, condition in conditions.items():
        if not isinstance(key, str):
            raise InputError(f"filter keys are strings, got {key!r}")
        for name, operand in condition.items() if isinstance(condition, Mapping) else (("==", condition),):
            tests.append((key, _compile(key, name, operand)))
    return lambda metadata: all(metadata is not None and key in metadata and test(metadata[key]) for key, test in tests)


def filter_key(conditions: Filter) -> str:
    """Two valid filters with the same key pass the same items."""

    def plain(operand: Any) -> Any:
        return list(operand) if isinstance(operand, Sequence) and not isinstance(operand, str) else operand

    return repr(
        [
            (key, [(name, plain(operand)) for name, operand in condition.items()] if isinstance(condition, Mapping) else condition)
            for key, condition in conditions.items()
        ]
    )


def _compile(key: str, name: str, operand: Any) -> Callable[[Any], bool]:
    if name in _RANGE:
        kind: Any = str if isinstance(operand, str) else (int, float)
        if not isinstance(operand, kind) or isinstance(operand, bool) or operand != operand:
            raise InputError(f"filter {key!r}: {name} needs a number or a string, got {operand!r}")
        compare = _RANGE[name]
        return lambda value: isinstance(value, kind) and not isinstance(value, bool) and compare(value, operand)
    if name == "in":
        if isinstance(operand, str) or not isinstance(operand, Sequence):
            raise InputError(f"filter {key!r}: in needs a list of values, got {operand!r}")
        wanted = tuple(_scalar(key, value) for value in operand)
        return lambda value: any(_equal(value, other) for other in wanted)
    if name not in ("==", "!="):
        raise InputError(f"filter {key!r}: unknown operator {name!r}; use {', '.join(_OPERATORS)}, or a plain value for equality")
    other = _scalar(key, operand)
    return lambda value: _equal(value, other) == (name == "==")


def _scalar(key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InputError(f"filter {key!r}: compares with a string, a finite number, a bool or null, got {value!r}")


def _equal(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
