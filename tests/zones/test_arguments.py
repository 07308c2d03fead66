"""What is refused, with which words; and that the kernels themselves refuse what does not fit."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from dqe_engine import _kernels
from dqe_engine.contracts.parsing import parse_json
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import BackendError, InputError
from dqe_engine.zones import Screen, compiled, cpu, cuda, select_zones

QUERIES = np.ones((2, 4), np.float32)
ITEMS = np.ones((5, 3, 4), np.float32)
ZONES = ZoneSpec(lo=0, hi=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": QUERIES.astype(np.float64)}, r"queries: dtype float64, expected float32"),
        ({"queries": QUERIES.tolist()}, r"queries: expected a NumPy array, got list"),
        ({"queries": QUERIES[0]}, r"queries: shape \(4,\), expected 2 dimensions"),
        ({"queries": np.ones((2, 8), np.float32)[:, ::2]}, r"queries: not C-contiguous .* np.ascontiguousarray\(queries\)"),
        ({"items": ITEMS.astype(np.int8)}, r"items: dtype int8, expected float32 or float16"),
        ({"items": ITEMS[:, ::2]}, r"items: not C-contiguous"),
        ({"items": np.ones((5, 3), np.float32)}, r"queries have D=4 and items D=3"),
        ({"items": np.ones((5, 0, 4), np.float32)}, r"no tokens"),
        ({"queries": np.ones((2, 0), np.float32), "items": np.ones((5, 0), np.float32)}, r"at least 1"),
        ({"k": -1}, r"k=-1: expected 0 or more"),
        ({"picks": -1, "zones": ZONES}, r"picks=-1: expected 0 or more"),
        ({"picks": 1}, r"need zones"),
        ({"counts": True}, r"need zones"),
        ({"anchor": np.zeros(2, np.int64)}, r"need zones"),
        ({"anchor": np.zeros(3, np.int64), "zones": ZONES}, r"anchor: 3 entries, expected 2"),
        ({"anchor": np.array([0, 5]), "zones": ZONES}, r"anchor: id 5 is not a position in items \(0 to 4\)"),
        ({"anchor": np.zeros(2, np.int32), "zones": ZONES}, r"anchor: dtype int32, expected int64 or float32"),
        ({"exclude": [[0]]}, r"exclude: 1 entries, expected 2"),
        ({"exclude": [[0], [-1]]}, r"exclude: id -1 is not a position"),
        ({"exclude": [[0], [0.5]]}, r"exclude\[1\]: expected a sequence of integer ids"),
        ({"exclude": [0, 1]}, r"exclude\[0\]: expected a sequence of integer ids"),
        ({"exclude": np.array([[0], [7]])}, r"exclude: id 7 is not a position"),
        ({"allowed": np.zeros(1, np.int64)}, r"allowed: dtype int64, expected uint64"),
        (
            {"allowed": np.zeros(2, np.uint64)},
            r"allowed: shape \(2,\), expected \(1,\) or \(2, 1\): a bit for each of 5 items, 64 to a word",
        ),
        ({"allowed": np.zeros((1, 1), np.uint64)}, r"allowed: shape \(1, 1\), expected \(1,\) or \(2, 1\)"),
        ({"allowed": np.zeros((2, 2), np.uint64)[:, ::2]}, r"allowed: not C-contiguous"),
        ({"exclude": np.zeros((2, 1))}, r"exclude\[0\]: expected a sequence of integer ids, got float64"),
        ({"items": []}, r"items: an empty sequence"),
        ({"items": [ITEMS, ITEMS[:, :2].copy()]}, r"items\[1\]: float32 of shape \(5, 2, 4\), but items\[0\] .* must agree"),
        ({"items": [ITEMS, ITEMS.astype(np.float16)]}, r"items\[1\]: float16 .* must agree"),
        ({"items": [ITEMS, ITEMS[:, ::2]]}, r"items\[1\]: not C-contiguous"),
        ({"screen": Screen.build(ITEMS[:4])}, r"screen: its shards have shapes \[\(4, 3, 64\)\], those of items need \[\(5, 3, 64\)\]"),
        ({"threads": -1}, r"threads=-1: expected 0 or more"),
        ({"backend": "gpu"}, r"backend='gpu': expected 'auto', 'cpu', 'reference' or 'cuda'"),
    ],
)
def test_refused_with_the_reason(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": QUERIES, "items": ITEMS, "k": 1} | changed
    with pytest.raises(InputError, match=message):
        select_zones(arguments.pop("queries"), arguments.pop("items"), **arguments)


def test_tokens_that_are_too_wide_for_a_screen() -> None:
    with pytest.raises(InputError, match="D=65537, at most 65536 can be screened"):
        Screen.build(np.ones((1, 65537), np.float32))


def test_auto_says_what_ran_and_what_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_zones(QUERIES, ITEMS).backend == "cpu"
    monkeypatch.setattr(compiled, "built", lambda: False)  # as where the kernels are not built
    assert select_zones(QUERIES, ITEMS).backend == "reference"
    with pytest.raises(BackendError, match="not built"):
        select_zones(QUERIES, ITEMS, backend="cpu")


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_arrays_on_a_device_never_fall_back_to_the_processor(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="the CUDA kernels are not built"):
        select_zones(OnDevice(), OnDevice(), k=1, backend=backend)
    with pytest.raises(InputError, match=r"queries: expected a NumPy array, got .*OnDevice"):
        select_zones(OnDevice(), ITEMS, k=1, backend="cpu")
    with pytest.raises(InputError, match="stream and workspace are for arrays on a CUDA device; the queries are ndarray"):
        select_zones(QUERIES, ITEMS, k=1, stream=7)
    with pytest.raises(InputError, match="screen: only for arrays on the CPU"):
        select_zones(OnDevice(), OnDevice(), k=1, screen=Screen.build(ITEMS), backend=backend)


def kernel_arguments() -> dict[str, Any]:
    rows = cpu._Rows.empty(2, 3, 1)
    return {
        "queries": QUERIES,
        "shards": [ITEMS],
        "coded": None,
        "offsets": np.array([0, 1, 1]),
        "excluded": np.array([4]),
        "allowed": np.array([[0b11111]], np.uint64),
        "query_rows": np.arange(2),
        "zoning": 1,
        "anchor_is_best": False,
        "anchor_ids": None,
        "lo_of_all": 0.0,
        "hi_of_all": 1.0,
        "policy": 0,
        "temperature": 1.0,
        "seed": 0,
        "sample": 0,
        "field": 0,
        "by_rows": True,
        "threads": 1,
        "instruction_set": "",
    } | rows.arrays()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("queries", QUERIES.astype(np.float64), TypeError),
        ("queries", np.ones((2, 8), np.float32)[:, ::2], TypeError),
        ("queries", np.ones((2, 5), np.float32), ValueError),
        ("shards", [], ValueError),
        ("shards", [ITEMS.astype(np.float64)], TypeError),
        ("shards", [ITEMS[:, ::2]], TypeError),
        ("shards", [ITEMS, ITEMS.astype(np.float16)], TypeError),
        ("shards", [ITEMS, ITEMS[:, :2].copy()], ValueError),
        ("coded", [Screen.build(ITEMS).shards[0]] * 2, ValueError),
        ("coded", list(Screen.build(ITEMS[:4]).shards), ValueError),
        ("coded", [tuple(array.astype(np.float64) for array in Screen.build(ITEMS).shards[0])], TypeError),
        ("coded", [Screen.build(ITEMS).shards[0][:3]], TypeError),
        ("offsets", np.array([0, 2, 1]), ValueError),
        ("offsets", np.array([0, 1]), ValueError),
        ("excluded", np.array([5]), ValueError),
        ("excluded", np.array([4], np.int32), TypeError),
        ("allowed", np.array([[31]], np.int64), TypeError),
        ("allowed", np.array([[31, 0]], np.uint64), ValueError),
        ("allowed", np.full((3, 1), 31, np.uint64), ValueError),
        ("query_rows", np.arange(3), ValueError),
        ("anchor_ids", np.array([0, 5]), ValueError),
        ("anchor_ids", np.array([0]), ValueError),
        ("zoning", 4, ValueError),
        ("policy", 3, ValueError),
        ("instruction_set", "sse9", ValueError),
        ("scores", np.zeros((2, 3), np.float64), TypeError),
        ("scores", np.broadcast_to(np.float32(0), (2, 3)), TypeError),
        ("ids", np.zeros((2, 4), np.int64), ValueError),
        ("ids", np.zeros((2, 3), np.int32), TypeError),
        ("counts", np.zeros((2, 2), np.int64), ValueError),
        ("picks", np.zeros((3, 1), np.int64), ValueError),
        ("status", np.zeros(1, np.int8), ValueError),
    ],
)
def test_kernels_never_copy_what_does_not_fit(name: str, value: Any, error: type[builtins.Exception]) -> None:
    _kernels.sweep(**kernel_arguments())
    with pytest.raises(error):
        _kernels.sweep(**(kernel_arguments() | {name: _kernels.Codes(value) if name == "coded" else value}))


def test_kernels_refuse_a_read_only_output() -> None:
    arguments = kernel_arguments()
    arguments["scores"].flags.writeable = False
    with pytest.raises(TypeError):
        _kernels.sweep(**arguments)


def test_kernels_refuse_more_queries_by_rows_than_there_are_kernels_for() -> None:
    batch = _kernels.MAX_ROW_QUERIES + 1
    arguments = kernel_arguments() | cpu._Rows.empty(batch, 3, 1).arrays()
    arguments |= {"queries": np.ones((batch, 4), np.float32), "offsets": np.zeros(batch + 1, np.int64), "query_rows": np.arange(batch)}
    with pytest.raises(ValueError, match="by_rows"):
        _kernels.sweep(**arguments)


def test_kernels_refuse_a_field_that_cannot_hold_the_rank() -> None:
    arguments = kernel_arguments() | {"zoning": 3, "field": 4}
    with pytest.raises(ValueError, match="field: too small for the rank of hi"):
        _kernels.sweep(**arguments)
    _kernels.sweep(**(arguments | {"allowed": np.array([[0b10101], [0b111]], np.uint64)}))  # three candidates at most


def test_bits_behind_the_last_item_mean_nothing() -> None:
    queries, items = QUERIES, ITEMS + np.arange(5, dtype=np.float32)[:, None, None]
    rest = np.uint64(~np.uint64(31))
    for allowed in (np.array([0b1010], np.uint64), np.array([[0b1010], [0b100]], np.uint64)):
        clean, full = (select_zones(queries, items, k=5, zones=ZONES, counts=True, allowed=words) for words in (allowed, allowed | rest))
        assert clean.counts is not None
        assert clean.counts.sum(axis=1).tolist() == [2, 2 if allowed.ndim == 1 else 1]
        np.testing.assert_array_equal(full.counts, clean.counts)
        np.testing.assert_array_equal(full.ids, clean.ids)
        outcomes = []
        for words in (allowed, allowed | rest):
            out = cpu._Rows.empty(2, 3, 1)
            _kernels.sweep(**(kernel_arguments() | out.arrays() | {"allowed": np.atleast_2d(words), "shards": [items]}))
            outcomes.append((out.ids.tolist(), out.counts.tolist()))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("zones", "message"),
    [
        ({"bounds": "quantile"}, r"zone bounds 'quantile': expected absolute, pooled or rank; it is called 'rank' now .*take 'pooled'"),
        ({"bounds": "pool"}, r"zone bounds 'pool': expected absolute, pooled or rank$"),
        ({"policy": "hard"}, r"zone policy 'hard': expected hardest, uniform or softmax$"),
        ({"bounds": "pooled", "hi": 1.5}, r"pooled bounds must lie in \[0, 1\], got lo=0, hi=1.5"),
        ({"bounds": "rank", "lo": -0.1}, r"rank bounds must lie in \[0, 1\]"),
    ],
)
def test_zones_that_mean_nothing(zones: dict[str, Any], message: str) -> None:
    """Made in Python, where msgspec does not look at a Literal."""
    with pytest.raises(ValueError, match=message):
        ZoneSpec(**{"lo": 0, "hi": 1} | zones)


def test_an_old_name_in_a_file_says_what_to_take() -> None:
    with pytest.raises(InputError) as refusal:
        parse_json(ZoneSpec, b'{"lo": 0, "hi": 1, "bounds": "quantile"}', where="mine.json")
    assert str(refusal.value) == (
        "mine.json: Invalid enum value 'quantile' - at `$.bounds`; valid values: absolute, pooled, rank; "
        "it is called 'rank' now and does not depend on the target; take 'pooled' for zones that do"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 10**9}, r"k=1000000000 and picks=0 for 4 queries: results of 44.7 GiB, at most 1 GiB at a time; ask for fewer"),
        ({"k": 1, "picks": 10**9, "zones": ZoneSpec(lo=0, hi=1)}, r"k=1 and picks=1000000000 for 4 queries: results of 74.5 GiB"),
        ({"k": 2**63}, "k=9223372036854775808: expected 0 to"),
        ({"k": 1, "first_query": 10**30}, "first_query=1000000000000000000000000000000: expected 0 to"),
        ({"k": 1.5}, "k: expected a whole number, got float"),
        ({"k": True}, "k: expected a whole number, got bool"),
        ({"k": "3"}, "k: expected a whole number, got str"),
        ({"k": -1}, "k=-1: expected 0 or more"),
    ],
)
def test_results_beyond_any_memory_and_what_is_no_count(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        select_zones(np.ones((4, 8), np.float32), np.ones((10, 8), np.float32), **options)
    assert "\n" not in str(caught.value)


def test_counts_may_be_numpys_and_more_than_there_are_items() -> None:
    assert select_zones(np.ones((1, 8), np.float32), np.ones((3, 8), np.float32), k=np.int64(5)).ids.tolist() == [[0, 1, 2, -1, -1]]
