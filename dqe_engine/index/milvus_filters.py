"""Metadata filters as Milvus expressions. An expression passes whatever the filter passes, and perhaps more: the filter itself is applied
to what comes back. So a condition that Milvus cannot express as we mean it costs time and never an answer.

Left to the filter itself: `!=`, `exists`, `not`, null, numbers from 2^53 on, keys and strings with quotes, backslashes or control
characters, and values of several kinds (string, number, bool) for one key: servers put such values into one list, and then refuse it or
lose items (2.6.20). Numbers are written as floats, since `json_contains` of a server does not find 38.0 when it is asked for 38.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .filters import RANGES, Combination, Condition, Test

_EXACT = 2**53
"""Below this every whole number is a float, and is told from those beyond."""
_MOST_LISTED = 1000
_Kinds = frozenset[tuple[str, str]]
"""Keys, and the kinds of the values that they are held against."""
NOTHING = 'id == ""'
"""Passed by no item."""


def one_of(ids: Sequence[str]) -> str:
    """The expression for items of these ids. The client's own `get` and `delete(ids=…)` write an id as it is between quotes (pymilvus 2.6),
    so that one with a quote or a backslash is refused, or taken for another."""
    return f"id in [{', '.join(map(_quoted, ids))}]"


def _quoted(text: str) -> str:
    """In double quotes. Only what the grammar does not take as it is has an escape: Milvus Lite knows no other."""
    for written, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(written, escaped)
    return f'"{text}"'


def searchable(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of an item's metadata expressions may look at: strings, bools, numbers and lists of these. Numbers beyond 64 bits become the
    nearest float, which compares alike with all that expressions hold."""
    found: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        if isinstance(value, list):
            found[key] = [_number(element) for element in value if isinstance(element, str | int | float)]
        elif isinstance(value, str | int | float):
            found[key] = _number(value)
    return found


def expression_of(filter: Combination | None) -> tuple[str, bool]:
    """The expression, "" for one that passes everything, and whether the whole filter is in it."""
    if filter is None:
        return "", True
    text, whole, _ = _expression(filter)
    return text or "", whole


def _expression(test: Test) -> tuple[str | None, bool, _Kinds]:
    """None: all pass. With the kinds of the values that are in the text."""
    if isinstance(test, Condition):
        text = _condition(test)
        return text, text is not None, _kinds(test) if text else _Kinds()
    if test.operator == "not":
        return None, False, _Kinds()
    texts, whole, kinds = list[str](), True, _Kinds()
    for part in test.parts:
        text, complete, own = _expression(part)
        if mixed := _are_mixed(kinds | own):
            text = None
        if text is None and test.operator == "or":
            return None, False, _Kinds()
        whole = whole and complete and not mixed
        if text is not None:
            texts.append(text)
            kinds |= own
    joined = f" {test.operator} ".join(f"({text})" for text in texts)
    return joined or None, whole, kinds


def _condition(test: Condition) -> str | None:
    if not _is_plain(test.key):
        return None
    field = f'metadata["{test.key}"]'
    if test.operator == "in":
        values = [_literal(value) for value in test.operand]
        if len(values) > _MOST_LISTED or None in values or _are_mixed(_kinds(test)):
            return None
        return " or ".join(f"{field} == {value}" for value in values) or NOTHING
    if test.operator in RANGES:
        literal = _literal(test.operand)
        return None if literal is None else f"{field} {test.operator} {literal}"
    if test.operator == "contains":
        literal = _literal(test.operand)
        return None if literal is None else f"json_contains({field}, {literal})"
    return None


def _literal(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if _is_plain(value) else None
    if isinstance(value, int | float):
        return repr(float(value)) if abs(value) < _EXACT else None
    return None


def _kinds(test: Condition) -> _Kinds:
    """Of the values that the key is held against."""
    values = test.operand if test.operator == "in" else [test.operand]
    return _Kinds((test.key, "bool" if isinstance(one, bool) else "string" if isinstance(one, str) else "number") for one in values)


def _are_mixed(kinds: _Kinds) -> bool:
    return len({key for key, _ in kinds}) < len(kinds)


def _is_plain(text: str) -> bool:
    return bool(text) and text.isprintable() and not set(text) & set("\"'\\")


def _number(value: str | float) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        try:
            return float(value)
        except OverflowError:
            return math.copysign(1.7e308, value)
    return value
