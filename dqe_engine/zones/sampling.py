"""Some tokens of a gallery, by which it is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32


def sampled(shards: Sequence[NDArray[Any]], size: int, rng: np.random.Generator) -> F32:
    """About `size` of the tokens of (n, M, D) shards, drawn from each by its size, as (s, D) float32."""
    total = sum(shard.shape[0] * shard.shape[1] for shard in shards)
    parts = []
    for shard in shards:
        rows = shard.reshape(-1, shard.shape[2])
        own = min(len(rows), math.ceil(size * len(rows) / max(total, 1)))
        few = 8 * own < len(rows)  # then those that are drawn twice are no loss, and a permutation of all would be
        at = np.sort(rng.integers(len(rows), size=own) if few else rng.choice(len(rows), own, replace=False))
        at = at[np.diff(at, prepend=-1) > 0]
        parts.append(rows[at].astype(np.float32, copy=False))
    return np.concatenate(parts)


def units(tokens: F32) -> F32:
    """Those of (n, D) tokens that have a direction, as unit vectors."""
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", tokens, tokens))
        usable = np.isfinite(norms) & (norms > 0)
        values: F32 = tokens[usable] / norms[usable, None]
    kept: F32 = values[np.einsum("ij,ij->i", values, values) > 0.5]  # none of what underflows
    return kept
