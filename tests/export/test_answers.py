"""What a bundle's answers show about the recall that it keeps: the interval of the change, and what `--precision auto` asks of it."""

from __future__ import annotations

import numpy as np
import pytest

from dqe_engine.errors import ParityError
from dqe_export.answers import change_interval, require_shown


def test_auto_takes_int8_only_where_the_queries_show_that_it_keeps_the_recall() -> None:
    """`require_shown` at the sizes where a gate on the mean alone lets losses pass."""
    for lost, gained, queries, needed in (
        (0, 0, 20, "some 1,588 queries or fewer"),
        (3, 3, 200, "some 1,319 queries or fewer"),
        (30, 20, 1000, "more would not"),
    ):
        with pytest.raises(ParityError, match=r"do not show that it falls by at most 1\.0; ") as caught:
            require_shown(lost=lost, gained=gained, queries=queries, allowed=1.0, data="garments")
        assert needed in str(caught.value)
        assert "\n" not in str(caught.value)
    require_shown(lost=0, gained=0, queries=200, allowed=1.0, data="garments")
    require_shown(lost=6, gained=6, queries=1000, allowed=1.0, data="garments")


def test_a_true_loss_seldom_passes_as_kept() -> None:
    """2 points lost in truth: 3 % of the queries lose their target, 1 % gain theirs."""
    rng = np.random.default_rng(0)
    for queries in (100, 200, 1000):
        counts = rng.multinomial(queries, (0.03, 0.01, 0.96), size=2000)
        passed = [change_interval(lost=lost, gained=gained, queries=queries)[0] >= -1 for lost, gained, _ in counts]
        assert np.mean(passed) <= 0.025
        if queries == 100:  # what a gate on the mean alone lets pass
            assert np.mean([gained - lost >= -1 for lost, gained, _ in counts]) > 0.3


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    for queries, lost, gained in ((50, 0.05, 0.02), (300, 0.03, 0.03), (1000, 0.004, 0.001)):
        counts = rng.multinomial(queries, (lost, gained, 1 - lost - gained), size=4000)
        found = [change_interval(lost=a, gained=b, queries=queries) for a, b, _ in counts]
        assert np.mean([low <= 100 * (gained - lost) <= high for low, high in found]) >= 0.94
