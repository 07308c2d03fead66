"""Some tokens of a gallery, by which it is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I64
from .compiled import kernels


def sampled(shards: Sequence[NDArray[Any]], size: int, rng: np.random.Generator) -> F32:
    """About `size` of the tokens of (n, M, D) shards, drawn from each by its size, as (s, D) float32."""
    drawn = zip(shards, _drawn(shards, size, rng), strict=True)
    return np.concatenate([shard.reshape(-1, shard.shape[2])[at].astype(np.float32, copy=False) for shard, at in drawn])


def sampled_directions(shards: Sequence[NDArray[Any]], size: int, rng: np.random.Generator, *, threads: int) -> F32:
    """`units` of what `sampled` draws, in an order of chance; made by the kernels, in threads."""
    begins = np.cumsum([0, *(shard.shape[0] * shard.shape[1] for shard in shards[:-1])])
    rows = np.concatenate([at + begin for at, begin in zip(_drawn(shards, size, rng), begins, strict=True)])
    rows = rng.permutation(rows)
    directions, known = np.empty((len(rows), shards[0].shape[2]), np.float32), np.empty(len(rows), np.uint8)
    kernels().gather_directions(list(shards), rows, directions, known, threads)
    return directions if known.all() else directions[known > 0]


def _drawn(shards: Sequence[NDArray[Any]], size: int, rng: np.random.Generator) -> list[I64]:
    """Tokens of each shard, ascending and distinct."""
    counts = [shard.shape[0] * shard.shape[1] for shard in shards]
    parts = []
    for count in counts:
        own = min(count, math.ceil(size * count / max(sum(counts), 1)))
        few = 8 * own < count  # then those that are drawn twice are no loss, and a permutation of all would be
        at = np.sort(rng.integers(count, size=own) if few else rng.choice(count, own, replace=False))
        parts.append(at[np.diff(at, prepend=-1) > 0])
    return parts


def units(tokens: F32) -> F32:
    """Those of (n, D) tokens that have a direction, as unit vectors."""
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", tokens, tokens))
        usable = np.isfinite(norms) & (norms > 0)
        values: F32 = tokens[usable] / norms[usable, None]
    kept: F32 = values[np.einsum("ij,ij->i", values, values) > 0.5]  # none of what underflows
    return kept
