"""Filters: what they mean, held against a plain evaluation item by item; what is refused; and what is kept between questions."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqe_engine.errors import InputError
from dqe_engine.index import metadata
from dqe_engine.index.filters import MOST_LEVELS, MOST_VALUES, Combination, compile_filter
from dqe_engine.index.metadata import MetadataColumns
from dqe_engine.zones.bitmaps import unpacked

ITEM = {
    "brand": "x", "price": 20, "sale": True, "note": None, "day": "2026-11-23", "weight": 1.5, "tags": ["a", 1, None, ["b"]],
    "serial": 2**53 + 1, "size": {"eu": 40}, "not": 3,
}  # fmt: skip


def passing(items: list[dict[str, Any] | None], conditions: Mapping[str, Any]) -> list[bool]:
    columns = MetadataColumns()
    columns.append(items)
    return unpacked(columns.mask(compile_filter(conditions), len(items)), len(items)).tolist()


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ({}, True),
        ({"brand": "x"}, True),
        ({"brand": "y"}, False),
        ({"brand": "x", "price": 21}, False),
        ({"price": 20.0}, True),
        ({"price": {"<": 20}}, False),
        ({"price": {"<=": 20}}, True),
        ({"price": {">": 19.5, "<": 20.5}}, True),
        ({"price": {">": 19.5, "<": 20}}, False),
        ({"price": {">=": 20}}, True),
        ({"price": {"<": 10**400}}, True),
        ({"price": {"<": -(10**400)}}, False),
        ({"price": {"!=": 20}}, False),
        ({"price": {"!=": "20"}}, True),
        ({"price": {"in": [1, 20]}}, True),
        ({"price": {"in": []}}, False),
        ({"price": {"<": "30"}}, False),
        ({"day": {">=": "2026-11-01", "<": "2026-12-01"}}, True),
        ({"sale": True}, True),
        ({"sale": 1}, False),
        ({"sale": {">": 0}}, False),
        ({"sale": {"!=": False}}, True),
        ({"price": True}, False),
        ({"note": None}, True),
        ({"note": {"!=": None}}, False),
        ({"note": {"exists": True}}, True),
        ({"brand": None}, False),
        ({"absent": None}, False),
        ({"absent": {"!=": 1}}, False),
        ({"absent": {"exists": True}}, False),
        ({"absent": {"exists": False}}, True),
        ({"brand": {"exists": False}}, False),
        ({"tags": "a"}, False),
        ({"tags": {"!=": "a"}}, True),
        ({"tags": {"contains": "a"}}, True),
        ({"tags": {"contains": 1.0}}, True),
        ({"tags": {"contains": True}}, False),
        ({"tags": {"contains": None}}, True),
        ({"tags": {"contains": "b"}}, False),
        ({"brand": {"contains": "x"}}, False),
        ({"size": {"!=": 40}}, True),
        ({"size": {"exists": True}}, True),
        ({"serial": 2**53 + 1}, True),
        ({"serial": 2**53}, False),
        ({"serial": float(2**53)}, False),
        ({"serial": {">": 2**53}}, True),
        ({"serial": {"<": 2**53 + 2}}, True),
        ({"or": [{"brand": "y"}, {"price": 20}]}, True),
        ({"or": [{"brand": "y"}, {"price": 21}]}, False),
        ({"and": [{"brand": "x"}, {"price": {">": 1}}]}, True),
        ({"not": [{"brand": "x"}]}, False),
        ({"not": [{"brand": "x", "price": 21}]}, True),
        ({"not": [{"brand": "y"}, {"price": 20}]}, False),
        ({"not": [{"absent": 1}]}, True),
        ({"not": 3}, True),
        ({"not": {">": 3}}, False),
        ({"or": [{"not": [{"brand": "x"}]}, {"and": [{"sale": True}, {"or": [{"price": 20}]}]}]}, True),
    ],
)
def test_conditions(condition: dict[str, Any], passes: bool) -> None:
    assert passing([ITEM], condition) == [passes]


def test_items_without_metadata() -> None:
    assert passing([None, ITEM], {}) == [True, True]
    assert passing([None, ITEM], {"brand": "x"}) == [False, True]
    assert passing([None, ITEM], {"brand": {"exists": False}}) == [True, False]
    assert passing([None, ITEM], {"not": [{"brand": "x"}]}) == [True, False]


@pytest.mark.parametrize("large", [2**53 + 1, 2**60 + 1, -(2**53) - 1])
def test_whole_numbers_without_a_float_of_their_own(large: int) -> None:
    items = [{"n": value} for value in (large - 1, float(large), large, large + 1)]
    for name, compare in COMPARE.items():
        assert passing(items, {"n": {name: large}}) == [compare(item["n"], large) for item in items], name


DEEP: Any = 1
for _ in range(100_000):
    DEEP = [DEEP]


def nested(levels: int) -> dict[str, Any]:
    conditions: dict[str, Any] = {"a": 1}
    for _ in range(levels):
        conditions = {"not": [conditions]}
    return conditions


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("brand=x", "maps metadata keys"),
        ({1: "x"}, "keys are strings"),
        ({"price": {"~": 1}}, "unknown operator '~'; use <, <=, >, >=, !=, in, contains, exists"),
        ({"price": {"<": None}}, "< needs a number or a string"),
        ({"price": {"<": True}}, "< needs a number or a string"),
        ({"price": {"<": float("nan")}}, "< needs a number or a string"),
        ({"price": {"in": "abc"}}, "in needs a list"),
        ({"price": [1]}, "compares with a string"),
        ({"price": float("nan")}, "compares with a string"),
        ({"price": {"in": [[1]]}}, "compares with a string"),
        ({"price": {"contains": [1]}}, "compares with a string"),
        ({"price": {"exists": 1}}, "exists needs true or false, got 1"),
        ({"brand": {}}, "filter 'brand': {} holds no operator"),
        ({"or": []}, "needs a list of at least one filter"),
        ({"not": [{}]}, "an empty filter in its list passes everything"),
        ({"not": {"brand": "x"}}, "unknown operator 'brand'.*'not' of filters takes a list of them"),
        ({"or": ["brand"]}, "a filter maps metadata keys to values or operators, got 'brand'"),
        (nested(MOST_LEVELS + 1), f"more than {MOST_LEVELS} levels"),
        (nested(900), f"more than {MOST_LEVELS} levels"),
        ({"a": DEEP}, "compares with a string, a finite number, a bool or null, got a list"),
        ({"a": {"<": DEEP}}, "needs a number or a string, got a list"),
        ({"a": {"in": DEEP}}, "compares with a string, .* got a list"),
        ({"a": 10**5000}, "got an integer of 16,610 bits"),
        ({"a": "x" * MOST_VALUES}, "a filter of more than 4,194,304 values and characters"),
        ({"a": {"in": ["x" * (MOST_VALUES // 2)] * 2}}, "a filter of more than"),
        ({"k" * 1000: {"~": 1}}, "filter 'k{80}'… of 1,000 characters: unknown operator '~'"),
    ],
)
def test_filters_that_are_refused(condition: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        compile_filter(condition)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
SCALARS = st.sampled_from([None, True, False, "", "a", "b", 0, 1, 1.0, -0.5, 2**53, 2**53 + 1, float(2**53), 10**18, 1e300])
VALUES = SCALARS | st.lists(SCALARS | st.just([1]), max_size=3) | st.just({"a": 1})
KEYS = st.sampled_from(["a", "b", "not"])
ITEMS = st.lists(st.none() | st.dictionaries(KEYS, VALUES, max_size=3), max_size=150)
CONDITIONS = (
    SCALARS
    | st.dictionaries(st.sampled_from(["!=", "contains"]), SCALARS, min_size=1)
    | st.dictionaries(st.sampled_from(["in"]), st.lists(SCALARS, max_size=4), min_size=1)
    | st.dictionaries(st.sampled_from(list(COMPARE)), SCALARS.filter(lambda v: v is not None and not isinstance(v, bool)), min_size=1)
    | st.dictionaries(st.just("exists"), st.booleans(), min_size=1)
)
LEAVES = st.dictionaries(KEYS, CONDITIONS, min_size=1, max_size=2)
FILTERS = st.recursive(
    LEAVES, lambda inner: st.dictionaries(st.sampled_from(["and", "or", "not"]), st.lists(inner, min_size=1, max_size=3), min_size=1)
)


def equal(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def holds(value: Any, name: str, operand: Any) -> bool:
    if name in COMPARE:
        kind: Any = str if isinstance(operand, str) else (int, float)
        return isinstance(value, kind) and not isinstance(value, bool) and bool(COMPARE[name](value, operand))
    if name == "contains":
        return isinstance(value, list) and any(equal(element, operand) for element in value)
    if name == "in":
        return any(equal(value, other) for other in operand)
    return equal(value, operand) == (name == "==")


def by_definition(item: dict[str, Any] | None, conditions: Mapping[str, Any]) -> bool:
    own = item or {}
    for key, condition in conditions.items():
        if key in ("and", "or", "not") and isinstance(condition, list):
            each = [by_definition(item, one) for one in condition]
            if not {"and": all(each), "or": any(each), "not": not any(each)}[key]:
                return False
            continue
        for name, operand in condition.items() if isinstance(condition, dict) else [("==", condition)]:
            if not ((key in own) == operand if name == "exists" else key in own and holds(own[key], name, operand)):
                return False
    return True


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ITEMS, FILTERS, st.lists(st.integers(0, 150), max_size=3))
def test_columns_pass_what_the_definition_says(items: list[dict[str, Any] | None], conditions: dict[str, Any], cuts: list[int]) -> None:
    """However the items were appended, and however often the question was asked before."""
    columns, compiled, start = MetadataColumns(), compile_filter(conditions), 0
    expected = [by_definition(item, conditions) for item in items]
    for end in [*sorted(cuts), len(items)]:
        columns.append(items[start:end])
        start = max(start, min(end, len(items)))
        found = columns.mask(compiled, start)
        assert unpacked(found, start).tolist() == expected[:start]
        assert unpacked(found, 64 * len(found)).sum() == sum(expected[:start]), "bits behind the last item"
    for size in (0, len(items) // 2, len(items)):  # as a search that began earlier asks
        assert unpacked(columns.mask(compiled, size), size).tolist() == expected[:size]


def test_only_new_items_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, compiled = MetadataColumns(), compile_filter({"n": {">=": 10}})
    ranges: list[tuple[int, int]] = []
    evaluate = MetadataColumns._evaluate

    def noted(self: MetadataColumns, test: Any, start: int, stop: int) -> Any:
        if isinstance(test, Combination):
            ranges.append((start, stop))
        return evaluate(self, test, start, stop)

    monkeypatch.setattr(MetadataColumns, "_evaluate", noted)
    columns.append([{"n": n} for n in range(1000)])
    before = columns.mask(compiled, 1000)
    copy = before.copy()
    columns.append([{"n": n} for n in range(20)])
    after = columns.mask(compiled, 1020)
    assert unpacked(after, 1020).tolist() == [n >= 10 for n in (*range(1000), *range(20))]
    columns.mask(compiled, 1000)
    assert ranges == [(0, 1000), (960, 1020)]
    np.testing.assert_array_equal(before, copy)
    with pytest.raises(ValueError, match="read-only"):
        after[0] = 0


def test_the_latest_filters_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "FILTER_BYTES", 5 * 8)
    columns = MetadataColumns()
    columns.append([{"n": n} for n in range(60)])
    for n in (1, 2, 3, 4, 5, 1, 6, 7):
        columns.mask(compile_filter({"n": n}), 60)
    kept = [compile_filter({"n": n}).digest for n in (4, 5, 1, 6, 7)]
    assert list(columns._kept) == kept
    assert columns._kept_bytes == 5 * 8


def test_filters_are_told_apart() -> None:
    filters: list[dict[str, Any]] = [
        {"a": 1}, {"a": True}, {"a": "1"}, {"a": None}, {"a": {"!=": 1}}, {"a": {"in": [1, 2]}}, {"a": {"in": [1, "1"]}}, {"b": 1},
        {"a": 1, "b": 1}, {"a": {">": 1}}, {"a": {">": 1, "<": 2}}, {}, {"a": {"contains": 1}}, {"a": {"exists": True}},
        {"or": [{"a": 1}, {"b": 1}]}, {"not": [{"a": 1}, {"b": 1}]}, {"not": [{"a": 1, "b": 1}]}, {"a": "', 'in', ('b"},
        {"or": [{"a": 1, "b": 2}, {"c": 3}]}, {"or": [{"a": 1}, {"b": 2, "c": 3}]},
    ]  # fmt: skip
    assert len({compile_filter(one).digest for one in filters}) == len(filters)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": {"in": (1, 2)}}, {"a": {"in": [2, 1, 1]}}),
        (MappingProxyType({"a": MappingProxyType({">": 1})}), {"a": {">": 1}}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1, "b": 2}, {"and": [{"b": 2}, {"a": 1}]}),
        ({"or": [{"a": 1}, {"b": 2}]}, {"or": [{"b": 2}, {"a": 1}, {"b": 2}]}),
        ({"a": 1}, {"a": {"in": [1]}}),
    ],
)
def test_order_and_spelling_do_not_matter(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert compile_filter(one).digest == compile_filter(other).digest


def test_questions_while_items_are_appended() -> None:
    """A reader sees the first n items as they are, whatever a writer appends meanwhile."""
    columns = MetadataColumns()
    asked: list[dict[str, Any]] = [{"s": "s3"}, {"n": {"<": 50}}, {"t": {"contains": 1}}, {"s": {">=": "s5"}}, {"n": {"!=": 7}}]
    filters = [compile_filter(one) for one in asked]
    wrong: list[str] = []

    def item(i: int) -> dict[str, Any]:
        return {"s": f"s{i % 9}", "n": i % 100, "t": [i % 3, i % 5], f"key {i % 40}": i} if i % 11 else {}

    checks = [lambda m: m.get("s") == "s3", lambda m: "n" in m and m["n"] < 50, lambda m: 1 in m.get("t", []),
              lambda m: "s" in m and m["s"] >= "s5", lambda m: "n" in m and m["n"] != 7]  # fmt: skip
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            size = len(columns)
            for filter, check in zip(filters, checks, strict=True):
                flags = unpacked(columns.mask(filter, size), size)
                if flags.tolist() != [check(item(i)) for i in range(size)]:
                    wrong.append(f"{filter} at {size}")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for start in range(0, 2000, 7):
        columns.append([item(i) for i in range(start, start + 7)])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
