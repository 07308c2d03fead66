"""What a search puts on its stream: how many kernels, fills and waits; and kernels that start early wait before they touch anything."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from support.emulated_cuda import Counts, emulate
from support.zone_cases import assert_same

from dqe_engine.zones import reference
from dqe_engine.zones.request import ZoneRequest, validated

PLAIN = ("queries and lists", "sample", "its limit", "pass over the items", "results")
SCREENED = (
    "queries, their codes and lists", "sample", "its limit", "pass over the codes", "their limit", "tokens laid out", "their scores",
    "results",
)  # fmt: skip
"""The kernels of a search of more items than a list holds; all but the first start early on a Hopper. Items of several tokens take one more
after "their scores", which makes items' scores of tokens'."""


def request(batch: int, size: int, tokens: int = 1) -> ZoneRequest:
    rng = np.random.default_rng(batch)
    queries = rng.integers(-3, 4, (batch, 72)).astype(np.float32)
    items = rng.integers(-3, 4, (size, tokens, 72)).astype(np.float16)
    return validated(queries, items, k=10, anchor=None, zones=None, picks=0, counts=False, exclude=None)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("batch", "tokens", "screened"), [(1, 1, False), (70, 1, False), (3, 1, True), (66, 1, True), (2, 2, True)])
def test_a_search_has_a_budget(library: ctypes.CDLL, batch: int, tokens: int, screened: bool, capability: int) -> None:
    asked = request(batch, 4200, tokens)
    before = Counts.of(library)
    result, _ = emulate(library, asked, screened=screened, half_queries=True, capability=capability)
    after = Counts.of(library)
    assert_same(result, reference.select(asked))
    kernels = len(SCREENED) + (tokens > 1) if screened else len(PLAIN)
    assert after.launches - before.launches == kernels + screened  # and the codes of the items, once for an index
    assert after.fills == before.fills
    assert after.waits - before.waits == 1
    assert after.early == (kernels - 1 if capability == 90 else 0)


def test_few_items_need_no_limit(library: ctypes.CDLL) -> None:
    """All fit the list: the queries, one pass, the results."""
    before = Counts.of(library)
    emulate(library, request(3, 500), capability=90)
    assert Counts.of(library).launches - before.launches == 3


@pytest.mark.parametrize(
    ("screened", "early", "who"),
    [
        *((False, n, PLAIN[n]) for n in range(1, len(PLAIN))),
        *((False, -n, f"queries of the {PLAIN[n]}") for n in (1, 3)),
        *((True, n, SCREENED[n]) for n in range(1, len(SCREENED))),
        (True, -3, "queries of the pass over the codes"),
    ],
)
def test_a_kernel_that_does_not_await_the_one_ahead_is_noticed(library: ctypes.CDLL, screened: bool, early: int, who: str) -> None:
    with pytest.raises(RuntimeError, match="the kernel ahead"):
        emulate(library, request(2, 4200), screened=screened, half_queries=True, capability=90, unawaited=early)
    assert Counts.of(library).early == abs(early), who
