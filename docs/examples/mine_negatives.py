"""Hard negatives for another project's training loop: the zone kernels know neither our models nor PyTorch.

Between two epochs, embed queries and gallery with the model as it is, mine, and let the data loader take one pick of its row per step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dqe_engine import ZoneSpec
from dqe_engine.zones import mine_negatives

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def refresh(queries: F32, gallery: F32, targets: I64, references: I64, *, epoch: int, picks: int = 8) -> I64:
    """(T, picks) positions in the gallery for each query, -1 where fewer were found.

    queries: (T, D) float32, unit norm. gallery: (N, D), or (N, M, D) for the best of several tokens. targets, references: (T,) positions
    in the gallery, neither of which is ever a negative. Candidates score a little below the target: nearer ones may be unlabelled
    positives, and farther ones teach nothing.
    """
    zones = ZoneSpec(lo=0.002, hi=0.02, bounds="pooled", policy="softmax", seed=epoch)  # fractions of all Δ >= 0
    mined = mine_negatives(queries, gallery, targets, zones=zones, picks=picks, exclude=references[:, None])
    near, mid, _ = mined.counts.mean(axis=0)
    print(f"epoch {epoch}: {near:.0f} near and {mid:.0f} mid candidates for each query")
    return mined.picks


def one_each(picks: I64, rng: np.random.Generator) -> I64:
    """(T,) a random pick of each row, -1 for rows without any; leave those out of the loss."""
    found = (picks >= 0).sum(axis=1)  # picks come first in a row
    column = (rng.random(len(picks)) * found).astype(np.int64)
    return picks[np.arange(len(picks)), column]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((5000, 64), dtype=np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    targets, references = rng.integers(0, 5000, 200), rng.integers(0, 5000, 200)
    queries = gallery[targets] + 0.1 * rng.standard_normal((200, 64), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    picks = refresh(queries, gallery, targets, references, epoch=0)
    print(one_each(picks, rng)[:10])
