"""The zones that a bundle serves with: bounds on Δ to a query's own best hit, read off the training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqe_engine.contracts.zones import ZoneSpec
from dqe_engine.zones import select_zones

_MID_RANK = 0.02  # the mid zone ends where the best 2 % of a gallery end
_LEAST_NEAR = 0.01  # the best hit itself, at Δ = 0, is always near


def calibrate_zones(
    queries: NDArray[np.float32], target_tokens: NDArray[np.float32], target_ids: NDArray[np.int64], reference_ids: NDArray[np.int64]
) -> ZoneSpec:
    """Absolute bounds, for the engine's `zones=True`, where the anchor is the query's best candidate (docs/method.md).

    lo: median Δ of the labelled target to the best hit, so that an image as good as a typical right answer is near.
    hi: median Δ at which the best 2 % of the gallery end, at least lo. `target_tokens` are the gallery's; both ids are positions in it.
    """
    exclude = [[r] for r in reference_ids.tolist()]
    probe = ZoneSpec(lo=0.0, hi=_MID_RANK, bounds="rank")
    found = select_zones(queries, target_tokens, k=1, zones=probe, counts=True, exclude=exclude)
    targets = target_tokens[target_ids]  # (T, M, D)
    scores = np.einsum("td,tmd->tm", queries, targets).max(axis=1)
    assert found.hi is not None
    lo = max(_LEAST_NEAR, float(np.median(found.scores[:, 0] - scores)))
    return ZoneSpec(lo=round(lo, 4), hi=round(max(lo, float(np.median(found.hi))), 4), policy="hardest")
