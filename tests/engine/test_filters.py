from __future__ import annotations

from typing import Any

import pytest

from dqe_engine.errors import InputError
from dqe_engine.index.filters import compile_filter

ITEM = {"brand": "x", "price": 20, "sale": True, "note": None, "day": "2026-11-23", "weight": 1.5, "tags": ["a"]}


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
        ({"price": {"!=": 20}}, False),
        ({"price": {"!=": "20"}}, True),
        ({"price": {"in": [1, 20]}}, True),
        ({"price": {"in": []}}, False),
        ({"price": {"<": "30"}}, False),
        ({"day": {">=": "2026-11-01", "<": "2026-12-01"}}, True),
        ({"sale": True}, True),
        ({"sale": 1}, False),
        ({"sale": {">": 0}}, False),
        ({"price": True}, False),
        ({"note": None}, True),
        ({"brand": None}, False),
        ({"absent": None}, False),
        ({"absent": {"!=": 1}}, False),
        ({"tags": "a"}, False),
        ({"brand": {}}, True),
    ],
)
def test_conditions(condition: dict[str, Any], passes: bool) -> None:
    assert compile_filter(condition)(ITEM) is passes


def test_items_without_metadata_pass_only_the_empty_filter() -> None:
    assert compile_filter({})(None)
    assert not compile_filter({"brand": "x"})(None)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("brand=x", "maps metadata keys"),
        ({1: "x"}, "keys are strings"),
        ({"price": {"~": 1}}, "unknown operator '~'; use <, <=, >, >=, !=, in"),
        ({"price": {"<": None}}, "< needs a number or a string"),
        ({"price": {"<": True}}, "< needs a number or a string"),
        ({"price": {"<": float("nan")}}, "< needs a number or a string"),
        ({"price": {"in": "abc"}}, "in needs a list"),
        ({"price": [1]}, "compares with a string"),
        ({"price": float("nan")}, "compares with a string"),
        ({"price": {"in": [[1]]}}, "compares with a string"),
    ],
)
def test_filters_that_are_refused(condition: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compile_filter(condition)
