"""One answer out of the answers of shards: pure functions, equal to what one index over all the items would say."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .snapshot import IndexMatches, Match


def merged(parts: Iterable[Sequence[Match]], most: int) -> tuple[Match, ...]:
    """The best `most` of some rankings, each by score descending and then by age, in the order of the shards.

    Ties go to the earlier shard, whose items are older, and within a shard to the older item: the rule of one index. Scores are never NaN,
    for no index returns an item with such a score.
    """
    return tuple(islice(heapq.merge(*parts, key=lambda match: -match.score), most))


def best_scores(parts: Mapping[int, Sequence[IndexMatches]], queries: int) -> NDArray[np.float32]:
    """(B,), the best score of each query over all shards, from which Δ starts; NaN, in no zone, where no shard has a candidate."""
    best = np.full(queries, np.nan, np.float32)
    for found in parts.values():
        for b, one in enumerate(found):
            if one.matches and not best[b] >= one.matches[0].score:
                best[b] = one.matches[0].score  # a float32, as the kernel gave it
    return best


def merge_answers(
    found: Mapping[int, Sequence[IndexMatches]],
    zoned: Mapping[int, Sequence[IndexMatches]] | None,
    *,
    queries: int,
    k: int,
    picks: int,
    lost: tuple[str, ...] = (),
) -> tuple[IndexMatches, ...]:
    """One result per query. found: by shard, the `k` best of each query; zoned: by shard, zone counts by Δ to the best over all shards, and
    picks of policy "hardest"; None where no zones are asked for. lost: the shards that both lack."""
    answers = []
    for b in range(queries):
        one = IndexMatches(merged([found[shard][b].matches for shard in sorted(found)], k), exact=not lost, lost=lost)
        if zoned is not None:
            counts = np.array([zoned[shard][b].zone_counts or (0, 0, 0) for shard in sorted(zoned)], np.int64).reshape(-1, 3).sum(axis=0)
            near, mid, easy = counts.tolist()
            one = replace(one, zone_counts=(near, mid, easy), picks=merged([zoned[shard][b].picks for shard in sorted(zoned)], picks))
        answers.append(one)
    return tuple(answers)
