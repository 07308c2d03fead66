"""What is refused, with which words; and that the kernels themselves refuse what does not fit."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from dqe_engine import _kernels
from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.errors import BackendError, InputError
from dqe_engine.zones import select as select_module
from dqe_engine.zones import select_zones

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
        ({"anchor": np.zeros(3, np.int64), "zones": ZONES}, r"anchor: 3 entries for 2 queries"),
        ({"anchor": np.array([0, 5]), "zones": ZONES}, r"anchor: id 5 is not a position in items \(0 to 4\)"),
        ({"anchor": np.zeros(2, np.int32), "zones": ZONES}, r"anchor: dtype int32, expected int64 or float32"),
        ({"exclude": [[0]]}, r"exclude: 1 entries for 2 queries"),
        ({"exclude": [[0], [-1]]}, r"exclude: id -1 is not a position"),
        ({"exclude": [[0], [0.5]]}, r"exclude\[1\]: expected a sequence of integer ids"),
        ({"exclude": [0, 1]}, r"exclude\[0\]: expected a sequence of integer ids"),
        ({"backend": "gpu"}, r"backend='gpu': expected 'auto', 'cpu', 'reference' or 'cuda'"),
    ],
)
def test_refused_with_the_reason(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"queries": QUERIES, "items": ITEMS, "k": 1} | changed
    with pytest.raises(InputError, match=message):
        select_zones(arguments.pop("queries"), arguments.pop("items"), **arguments)


def test_cuda_is_refused_and_auto_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no CUDA kernels"):
        select_zones(QUERIES, ITEMS, backend="cuda")
    assert select_zones(QUERIES, ITEMS).backend == "cpu"
    monkeypatch.setattr(select_module, "find_spec", lambda name: None)  # as where the kernels are not built
    assert select_zones(QUERIES, ITEMS).backend == "reference"
    with pytest.raises(BackendError, match="not built"):
        select_zones(QUERIES, ITEMS, backend="cpu")


def kernel_arguments() -> dict[str, Any]:
    return {
        "tile": np.zeros((2, 5), np.float32),
        "first_item": 0,
        "scores": np.full((2, 3), -np.inf, np.float32),
        "ids": np.full((2, 3), -1, np.int64),
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("tile", np.zeros((2, 5)), TypeError),
        ("tile", np.zeros((2, 10), np.float32)[:, ::2], TypeError),
        ("tile", np.zeros((3, 5), np.float32), ValueError),
        ("scores", np.zeros((2, 3), np.float64), TypeError),
        ("ids", np.zeros((2, 4), np.int64), ValueError),
        ("ids", np.zeros((2, 3), np.int32), TypeError),
        ("ids", np.broadcast_to(np.int64(-1), (2, 3)), TypeError),
    ],
)
def test_kernels_never_copy_what_does_not_fit(name: str, value: Any, error: type[builtins.Exception]) -> None:
    _kernels.update_top_k(**kernel_arguments())
    with pytest.raises(error):
        _kernels.update_top_k(**(kernel_arguments() | {name: value}))


def test_kernels_refuse_a_read_only_output() -> None:
    arguments = kernel_arguments()
    arguments["scores"].flags.writeable = False
    with pytest.raises(TypeError):
        _kernels.update_top_k(**arguments)


def test_a_rank_that_the_buffer_does_not_hold_is_refused() -> None:
    ranking = (np.zeros((1, 4), np.float32), np.zeros(1, np.int64), np.full(1, -np.inf, np.float32), np.zeros(1, np.int64))
    _kernels.update_ranking(np.arange(10, dtype=np.float32)[None], *ranking)
    out = np.zeros(1, np.float32)
    _kernels.score_at_rank(*ranking, 1 / 9, out)
    assert out.tolist() == [8.0]
    with pytest.raises(ValueError, match="no score at quantile"):
        _kernels.score_at_rank(*ranking, 0.5, out)
