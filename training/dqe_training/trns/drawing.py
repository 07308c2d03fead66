"""Target relative negative sampling: one negative a step from what a refresh mined (`dqe_engine.zones.mining`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_negative(mined: NDArray[np.int64], rows: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """One negative (B,) per row from its mined set (T, P), -1 where the set is empty.

    The draw depends on (seed, epoch, row) alone, so that a resumed run draws the same.
    """
    sets = mined[rows]  # (B, P)
    sizes = (sets >= 0).sum(axis=1)
    column = _draw(sizes, rows, seed=seed, epoch=epoch)
    return np.where(sizes > 0, sets[np.arange(len(rows)), column], -1)


def draw_random(images: int, barred: NDArray[np.int64], rows: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """One of `images` positions (B,) per row, each that is not barred as likely, -1 where all are.

    `barred`: (B, E), positions that are no candidates of a row (its target, its reference), padded with -1; a position may be there
    twice. The draw depends on (seed, epoch, row) alone.
    """
    ordered = np.sort(np.where(barred < 0, images, barred), axis=1)  # padding last
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = images
    ordered = np.sort(ordered, axis=1)  # (B, E) without repetitions
    left = images - (ordered < images).sum(axis=1)
    found = _draw(left, rows, seed=seed, epoch=epoch)  # the how-manieth of those that are not barred
    for position in ordered.T:
        found += found >= position
    return np.where(left > 0, found, -1)


def _draw(sizes: NDArray[np.int64], rows: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """A number (B,) below each of `sizes`, by (seed, epoch, row); 0 where the size is 0."""
    mixed = (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(mix_seeds(seed, epoch))
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(33)) % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64)


def mix_seeds(*seeds: int) -> int:
    """One seed of 64 bits from several numbers, each of which matters: what a training, and an epoch of it, draws with."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
