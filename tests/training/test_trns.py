"""Target relative negative sampling: draws that depend on epoch and row alone. Mining itself: tests/zones/test_mining.py."""

from __future__ import annotations

import numpy as np

from dqe_training.trns.drawing import draw_negative


def mined_sets(rows: int = 4000, picks: int = 8) -> np.ndarray:
    return np.arange(rows * picks).reshape(rows, picks)


def test_a_draw_depends_on_seed_epoch_and_row_alone() -> None:
    mined, rows = mined_sets(), np.random.default_rng(0).permutation(4000)
    whole = draw_negative(mined, np.arange(4000), seed=0, epoch=3)
    np.testing.assert_array_equal(draw_negative(mined, rows, seed=0, epoch=3), whole[rows])
    np.testing.assert_array_equal(draw_negative(mined, rows[:17], seed=0, epoch=3), whole[rows[:17]])
    assert draw_negative(mined, np.array([42]), seed=0, epoch=3) == whole[42]
    for seed, epoch in ((0, 4), (1, 3), (3, 0)):  # 1 in 8 picks is the same by chance
        assert (draw_negative(mined, np.arange(4000), seed=seed, epoch=epoch) != whole).mean() > 0.8


def test_draws_are_spread_over_the_picks() -> None:
    mined = mined_sets()
    for epoch in (0, 1, 50):
        columns = draw_negative(mined, np.arange(4000), seed=0, epoch=epoch) % 8
        counts = np.bincount(columns, minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square, 7 degrees of freedom: 1 in 10,000
    over_epochs = np.stack([draw_negative(mined, np.arange(50), seed=0, epoch=epoch) % 8 for epoch in range(64)])
    assert min(len(set(column)) for column in over_epochs.T.tolist()) >= 6


def test_draws_come_from_what_was_found() -> None:
    rng = np.random.default_rng(0)
    mined = mined_sets(200)
    sizes = rng.integers(0, 9, 200)
    mined[np.arange(8)[None, :] >= sizes[:, None]] = -1
    for epoch in range(5):
        drawn = draw_negative(mined, np.arange(200), seed=0, epoch=epoch)
        assert (drawn[sizes == 0] == -1).all()
        for row in np.nonzero(sizes)[0]:
            assert drawn[row] in mined[row, : sizes[row]]
