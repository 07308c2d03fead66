"""Who gets the mass that the KL loss spreads, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.relevance import figures


def test_figures_of_a_batch_by_hand() -> None:
    others = ~np.eye(4, dtype=bool)
    others[3, 2] = False  # has row 3's own target image
    shared = np.array([[0, 0.5, 0.5, 0], [0.25, 0, 0.5, 0.25], [1 / 3, 1 / 3, 0, 1 / 3], [1, 0, 0, 0]])
    valid = np.eye(4, dtype=bool)
    valid[0, 1] = valid[1, 0] = valid[3, 2] = True
    found = figures(shared, valid, others)
    assert found["rows_with_another_answer"] == 0.5
    assert found["mass_on_answers"] == pytest.approx((0.5 + 0.25) / 4)
    assert found["mass_on_answers_if_even"] == pytest.approx(2 / 3 / 4)
    assert found["distance_from_even"] == pytest.approx((1 / 3 + 1 / 6 + 0 + 1 / 2) / 4)
    assert found["targets_that_share"] == pytest.approx((2 + 2**1.5 + 3 + 1) / 4)
