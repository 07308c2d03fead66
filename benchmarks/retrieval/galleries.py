"""Galleries to search: a dataset's own embeddings, and the same hidden among distractors that resemble them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dqe_engine.zones.arrays import F32

MIXED = 0.5
"""A distractor lies up to so far on the way from one real item to another."""
NOISE = 0.3
"""Norm of the random vector that is added to each of its tokens, of unit norm before."""
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Gallery:
    """`items`: (N, M, D) float32 or float16, unit tokens; the first ones are a dataset's."""

    items: NDArray[Any]

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def tokens(self) -> int:
        return int(self.items.shape[1])

    @property
    def width(self) -> int:
        return int(self.items.shape[2])

    @cached_property
    def float32(self) -> F32:
        return self.items.astype(np.float32, copy=False)

    @cached_property
    def rows(self) -> F32:
        """(N M, D): every token as a vector of its own; row // M is its item."""
        return self.float32.reshape(-1, self.width)

    @cached_property
    def pooled(self) -> F32:
        """(N, D): the mean of an item's tokens, unit norm."""
        return unit(self.float32.mean(axis=1))


def among_distractors(real: F32, count: int, *, seed: int = 0) -> Gallery:
    """`real` (n, M, D), then distractors up to `count` items in all, as float16.

    A distractor is a point between two real items, drawn anew each: token m is unit((1 - λ) a_m + λ b_m + ε), with λ uniform in
    [0, `MIXED`] and ε Gaussian of norm `NOISE`. So distractors crowd where the real items are; uniform vectors would be far from
    every query, and any approximation would look exact.
    """
    tokens, width = real.shape[1:]
    items = np.empty((max(count, len(real)), tokens, width), np.float16)
    items[: len(real)] = real
    for start in range(len(real), len(items), _CHUNK):
        rng = np.random.default_rng((seed, start))
        size = min(_CHUNK, len(items) - start)
        first, second = rng.integers(0, len(real), (2, size))
        share = rng.uniform(0, MIXED, (size, 1, 1)).astype(np.float32)
        noise = rng.standard_normal((size, tokens, width), np.float32) * np.float32(NOISE / width**0.5)
        items[start : start + size] = unit((1 - share) * real[first] + share * real[second] + noise)
    return Gallery(items)


def unit(rows: F32) -> F32:
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows
