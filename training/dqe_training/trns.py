"""Target relative negative sampling: zones of Δ = s(q, t) - s(q, i) over the training gallery, mined once per refresh."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import select_zones

QUERY_BLOCK = 1024


def mine_negatives(
    queries: NDArray[np.float32],
    target_tokens: NDArray[np.float32],
    target_ids: NDArray[np.int64],
    reference_ids: NDArray[np.int64],
    zones: ZoneSpec,
    *,
    picks: int,
    advance: Callable[[int], None] = lambda n: None,
) -> NDArray[np.int64]:
    """Mid-zone picks (T, picks) per query, padded with -1.

    `queries` (T, D), `target_tokens` (I, M, D) of the whole gallery. The target and the reference are excluded. A pick
    depends on the seed of `zones` and the query's row, not on the block.
    """
    found = np.full((len(queries), picks), -1, np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        exclude = np.stack([target_ids[rows], reference_ids[rows]], axis=1)
        result = select_zones(
            queries[rows],
            target_tokens,
            anchor=target_ids[rows],
            zones=zones,
            picks=picks,
            exclude=list(exclude),
            first_query=start,
        )
        assert result.picks is not None
        found[rows] = result.picks
        advance(len(exclude))
    return found


def draw_negative(mined: NDArray[np.int64], rows: NDArray[np.int64], epoch_seed: int) -> NDArray[np.int64]:
    """One negative (B,) per row from its mined set (T, P), -1 where the set is empty.

    The draw depends on (epoch_seed, row) alone, so that a resumed run draws the same.
    """
    sets = mined[rows]  # (B, P)
    sizes = (sets >= 0).sum(axis=1)
    mixed = (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch_seed * 0xD1B54A32D192ED03 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    column = ((mixed >> np.uint64(33)) % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64)
    return np.where(sizes > 0, sets[np.arange(len(rows)), column], -1)
