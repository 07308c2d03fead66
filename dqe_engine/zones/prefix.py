"""The first level of a screen: a few numbers of each token in a rotated basis; cpp_ext/prefix.hpp has the certificate.

Where few directions hold most of what tokens are made of, these numbers and the length of the rest rule out nearly all tokens for a
fraction of the bytes of their codes. Where they do not, as with isotropic vectors, there is no such level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .compiled import Made, kernels
from .memory import empty_codes
from .sampling import sampled, units

LEAST_TOKENS = 1 << 16
"""Fewer tokens are swept in less time than a choice is worth."""
_BLOCK = 16  # kPrefixRows of cpp_ext/tiles.hpp
_HEADER = 64
"""Bytes of a block before its codes."""
_WIDTHS = (16, 32, 48, 64, 96, 128)
_SAMPLE, _QUERIES, _K = 32_768, 64, 10
"""Tokens and queries that the choice is made by, for searches for so many of the best."""
_GATHERED_COST = 20
"""Codes of a token that is left in the end cost so many that are swept: kGatheredCost of cpp_ext/prefix.hpp, and two thirds more for the
tokens that are left only while the threshold still rises. Measured, as the next, with 150,000 x 256 (AVX-512, spectrum i^-p)."""
_FIXED_COST = 0.1
"""What is swept before there is a threshold, and what a search does beside, as a share of the plain sweep."""
MOST_COST = 0.85
"""Share of the plain sweep's cost that is worth the memory: a tenth is to be saved, and costs are a twentieth off."""
_CODE_ERROR = 0.01
"""What rounding adds to a bound, of the product of the lengths."""


@dataclass(frozen=True, slots=True)
class PrefixCost:
    """What a search is expected to cost by the first `width` numbers of each token, as a share of what it costs without."""

    width: int
    left: float  # share of the tokens that these numbers leave
    cost: float


@dataclass(frozen=True, slots=True)
class NoPrefix:
    """Why a gallery has none, and what the widths that were weighed would have cost."""

    reason: str
    costs: tuple[PrefixCost, ...] = ()

    def describe(self) -> str:
        return f"no prefix: {self.reason}" + (f" ({_listed(self.costs)})" if self.costs else "")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Of the tokens of a gallery's first `covered` items."""

    covered: int
    axes: F32  # (P, D), orthonormal
    blocks: NDArray[np.uint8]  # (ceil(covered * M / 16), 16 * P + 64)
    costs: tuple[PrefixCost, ...] = ()
    """Of all widths that were weighed."""
    _made: Made = field(default_factory=Made, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        shards: Sequence[NDArray[Any]],
        *,
        queries: F32 | None = None,
        threads: int,
        least: int = LEAST_TOKENS,
        width: int | None = None,
    ) -> Prefix | None:
        """What `weighed` makes; None where it keeps none."""
        found = cls.weighed(shards, queries=queries, threads=threads, least=least, width=width)
        return found if isinstance(found, cls) else None

    @classmethod
    def weighed(
        cls,
        shards: Sequence[NDArray[Any]],
        *,
        queries: F32 | None = None,
        threads: int,
        least: int = LEAST_TOKENS,
        width: int | None = None,
        order: NDArray[np.uint32] | None = None,
    ) -> Prefix | NoPrefix:
        """Encode the tokens of (n, M, D) shards, unless there are fewer than `least`, too many for 32 bits, or little is gained.

        queries: (B, D), finite, like those that will be asked; some of the tokens, where None or none. A result never depends on them.
        width: instead of the one of least cost.
        """
        covered, tokens, whole = sum(map(len, shards)), *shards[0].shape[1:]
        size = covered * tokens
        if not max(least, 2) <= size < 2**32 - 1:
            return NoPrefix(f"{size:,} tokens, and it is made for {max(least, 2):,} to 4,294,967,294")
        if whole < _BLOCK:
            return NoPrefix(f"tokens of {whole} numbers, and it takes {_BLOCK} or more")
        rng = np.random.default_rng(0)
        rows = sampled(shards, min(size, _SAMPLE + _QUERIES), rng)
        rows = rows[np.isfinite(rows).all(1) & (np.abs(rows).max(1, initial=0) < 1e12)]
        if len(rows) < 2:
            return NoPrefix("next to no token is finite")
        known = None if queries is None or not len(queries) else queries
        axes = _axes(rows, known)
        if known is None:
            asked, rows = np.split(rng.permutation(rows), [min(_QUERIES, len(rows) // 2)])
        else:
            asked = (known[1::2] if len(known) > 1 else known)[:_QUERIES]  # the axes know the others
        costs = () if width else tuple(_costs(rows, asked, axes, rank=_K * len(rows) // size))
        if width is None:
            best = min((found for found in costs if found.cost <= MOST_COST), key=lambda found: found.cost, default=None)
            if best is None:  # a cost may be no number
                return NoPrefix(f"none is expected to save {1 - MOST_COST:.0%} of a search", costs)
            width = best.width
        blocks = empty_codes((-(-size // _BLOCK), _BLOCK * width + _HEADER))
        kernels().fill_prefix(list(shards), axes[:width], blocks, threads, order)
        return cls(covered, axes[:width], blocks, costs)

    @property
    def width(self) -> int:
        return len(self.axes)

    @property
    def cost(self) -> float:
        """Of a sweep by these prefixes, expected, beside one by codes alone."""
        return next((found.cost for found in self.costs if found.width == self.width), 1.0)

    @property
    def nbytes(self) -> int:
        return self.axes.nbytes + self.blocks.nbytes

    def for_kernels(self) -> Any:
        """What `_kernels.sweep` takes as `prefix`, made once."""
        if self._made.value is None:
            self._made.value = kernels().Prefixes(self.covered, self.axes, self.blocks)
        return self._made.value

    def describe(self) -> str:
        own = next((found for found in self.costs if found.width == self.width), None)
        text = f"first {self.width} of {self.axes.shape[1]} rotated numbers"
        return f"{text}, expected to leave {own.left:.2%} of the tokens ({_listed(self.costs)})" if own else text


def _listed(costs: Sequence[PrefixCost]) -> str:
    return "cost beside the plain sweep by width: " + ", ".join(f"{found.width}: {found.cost:.2f}" for found in costs)


def _axes(rows: F32, queries: F32 | None) -> F32:
    """(D, D) orthonormal rows, those of most weight in the directions of rows and of every other query first."""
    spread = _spread(rows)
    if queries is not None and len(queries):
        known = queries[::2]
        spread = spread + _spread(known) * len(known) / (len(known) + rows.shape[1])  # few say little of D directions
    return np.ascontiguousarray(np.linalg.eigh(spread).eigenvectors.T[::-1], np.float32)


def _spread(rows: F32) -> NDArray[np.float64]:
    directions = units(rows)
    spread: NDArray[np.float64] = (directions.T @ directions / max(len(directions), 1)).astype(np.float64)
    return spread


def _costs(rows: F32, queries: F32, axes: F32, *, rank: int) -> list[PrefixCost]:
    """rank: how many of `rows` are expected among the best that are looked for."""
    scores = queries @ rows.T  # (B, n)
    at = min(max(rank, 1), scores.shape[1]) - 1
    threshold = -np.partition(-scores, at, axis=1)[:, at, None]
    turned_rows, turned_queries = rows @ axes.T, queries @ axes.T
    rest_rows, rest_queries = (np.einsum("ij,ij->i", part, part) for part in (rows, queries))
    lengths = np.sqrt(rest_queries)[:, None] * np.sqrt(rest_rows)
    threshold = threshold - _CODE_ERROR * lengths
    whole = -(-rows.shape[1] // 64) * 64 + 12
    found, known, begin = [], np.zeros_like(scores), 0
    for width in _WIDTHS:
        if width > rows.shape[1]:
            break
        part = slice(begin, width)
        known += turned_queries[:, part] @ turned_rows[:, part].T
        rest_rows = rest_rows - np.einsum("ij,ij->i", turned_rows[:, part], turned_rows[:, part])
        rest_queries = rest_queries - np.einsum("ij,ij->i", turned_queries[:, part], turned_queries[:, part])
        rest = np.sqrt(np.maximum(rest_queries, 0))[:, None] * np.sqrt(np.maximum(rest_rows, 0))
        left = 1.0 - float((known + rest < threshold).mean())  # what overflows is left
        found.append(PrefixCost(width, left, _FIXED_COST + (width + _HEADER / _BLOCK) / whole + _GATHERED_COST * left))
        begin = width
    return found
