"""Clusters of tokens that an exact search may skip, and which token is in which; cpp_ext/lists.hpp has the certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I64
from .compiled import Made, kernels
from .prefix import NoPrefix, Prefix
from .sampling import sampled, sampled_directions, units

LEAST_TOKENS = 1 << 15
"""Fewer tokens are swept in less time than lists would take."""
_PREFIX = 16
"""Principal components by which tokens are clustered; the certificates are those of all D numbers."""
_LISTS_PER_ROOT = 8
"""As many lists as this times the root of the number of tokens: a query looks at each list, and at the tokens of a few."""
_LEAST_PER_LIST = 16
_SAMPLE_PER_LIST = 12
_SAMPLE_PER_ROOT = 256
"""Points, at most, that k-means looks at for each root."""
_ROUNDS = 4
_LEFT_SAMPLE, _LEFT_QUERIES, _LEFT_K = 16_384, 16, 10
"""Tokens and queries by which it is judged what lists spare, for searches for so many of the best."""
MOST_LEFT = 0.1
"""Share of the tokens that lists may leave where they are worth their memory: where they leave more, prefixes alone take less time."""
_TRIED_FIRST, _KEPT_TIMES = 8, 15
_SPREAD_SAMPLE = 1 << 14  # tokens, at most, whose principal components these are


@dataclass(slots=True)
class Tally:
    """How long searches of some number of queries took lately, by lists and without: where lists take longer, they are tried rarely."""

    tried: int = 0
    scattered: int = 0
    """Searches by lists, and those of them that had to sweep some of their queries besides."""
    asked: int = 0
    listed_s: list[float] = field(default_factory=list)  # of searches by lists, with the sweeps that these did not spare
    swept_s: list[float] = field(default_factory=list)

    def note(self, seconds: float, *, scattered: bool) -> None:
        _keep(self.listed_s, seconds, self.tried)
        self.tried += 1
        self.scattered += scattered

    def note_sweep(self, seconds: float) -> None:
        _keep(self.swept_s, seconds, self.asked + self.tried)

    def lists_pay(self, swept_s: float) -> bool:
        """Whether to try lists next: what takes longer is tried once in 64 searches.

        swept_s: what a sweep is guessed to take, in seconds. Where searches by lists take more than a quarter of that, one in 64 is swept.
        """
        if self.tried < _TRIED_FIRST:
            return True
        self.asked += 1
        listed, rare = _median(self.listed_s), self.asked % 64 == 0
        pay = not self.swept_s or listed <= _median(self.swept_s)
        return not (rare and listed > swept_s / 4) if pay else rare


def _keep(times: list[float], seconds: float, number: int) -> None:
    """A median of some is compared, which one that had to wait for a processor does not change."""
    if len(times) < _KEPT_TIMES:
        times.append(seconds)
    else:
        times[number % _KEPT_TIMES] = seconds


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


@dataclass(frozen=True, slots=True)
class NoLists:
    """Why a gallery has no lists."""

    left: float | None = None
    """What they would leave of the tokens, where that is too much; None: there are too few tokens, or too many."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenLists:
    """L lists of the tokens of a gallery's first `covered` items."""

    covered: int
    codes: NDArray[np.uint8]  # (L, W): of the directions, as `CodedShard`'s
    scales: F32  # (L,)
    errors: F32
    norms: F32
    longest: F32  # (L,): the largest norm of the list's tokens
    widest: F32  # (L,): cosine of the widest angle of the list's tokens to its direction
    starts: I64  # (L + 1,): into the next two; the tokens before the first list have no bound
    rows: NDArray[np.uint32]  # (covered * M,): item * M + token
    cosines: NDArray[np.uint16]  # (covered * M,): of the angle to the direction, rounded down
    level: Prefix | NoPrefix | None = None
    """Prefixes of the tokens in the order of `rows`, or why there are none; None where none were weighed."""
    tallies: dict[int, Tally] = field(default_factory=dict)
    always: bool = False
    """Tried for every query, whatever the tallies say: for measurements, which a sweep in full would flatter."""
    _made: Made = field(default_factory=Made, init=False, repr=False, compare=False)

    @classmethod
    def weighed(
        cls,
        shards: Sequence[NDArray[Any]],
        *,
        queries: F32 | None = None,
        threads: int,
        least: int = LEAST_TOKENS,
        most_left: float = MOST_LEFT,
    ) -> TokenLists | NoLists:
        """Cluster the tokens of (n, M, D) shards, unless there are fewer than `least`, too many for 32 bits, or a query could skip too few.

        What a query can skip is known from a sample, before all tokens are looked at.

        queries: (B, D), finite, like those that will be asked; some of the tokens, where there are none with a direction.
        most_left: share of the tokens that lists may leave; 1: whatever they leave.
        """
        covered, tokens, width = sum(map(len, shards)), *shards[0].shape[1:]
        size = covered * tokens
        if not least <= size < 2**32 - 1:
            return NoLists()
        wanted = max(1, min(_LISTS_PER_ROOT * math.isqrt(size), size // _LEAST_PER_LIST))
        rng = np.random.default_rng(0)
        sample = sampled_directions(shards, min(size, wanted * _SAMPLE_PER_LIST), rng, threads=threads)
        if len(sample) < wanted:
            return NoLists()  # most tokens have no direction
        tree = _Tree.grown(sample, wanted, threads)
        del sample
        if most_left < 1 and (left := tree.left(shards, queries, threads)) > most_left:
            return NoLists(left)
        count = len(tree.directions)
        longest, widest, starts = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count + 1, np.int64)
        rows, cosines = np.empty(size, np.uint32), np.empty(size, np.uint16)
        kernels().fill_lists(list(shards), *tree.for_kernels(), tree.directions, longest, widest, starts, rows, cosines, threads)
        codes = np.empty((count, 1, -(-width // 64) * 64), np.uint8)
        scales, errors, norms = (np.empty((count, 1), np.float32) for _ in range(3))
        kernels().encode(tree.directions[:, None], codes, scales, errors, norms, threads)
        return cls(covered, codes[:, 0], scales[:, 0], errors[:, 0], norms[:, 0], longest, widest, starts, rows, cosines)

    @classmethod
    def build(cls, shards: Sequence[NDArray[Any]], *, threads: int, least: int = LEAST_TOKENS) -> TokenLists | None:
        """What `weighed` makes, whatever the lists leave; None where it makes none."""
        found = cls.weighed(shards, threads=threads, least=least, most_left=1.0)
        return found if isinstance(found, cls) else None

    def prefixed(self, shards: Sequence[NDArray[Any]], *, threads: int, queries: F32 | None = None, width: int | None = None) -> TokenLists:
        """The same lists, with prefixes of their tokens where these pay; the arguments are those of `Prefix.weighed`."""
        return replace(self, level=Prefix.weighed(shards, queries=queries, threads=threads, least=1, width=width, order=self.rows))

    @property
    def prefix(self) -> Prefix | None:
        return self.level if isinstance(self.level, Prefix) else None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays()) + (self.prefix.nbytes if self.prefix else 0)

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return (self.codes, self.scales, self.errors, self.norms, self.longest, self.widest, self.starts, self.rows, self.cosines)

    def for_kernels(self) -> Any:
        """What `_kernels.sweep` takes as `lists`, made once."""
        if self._made.value is None:
            self._made.value = kernels().Lists(self.covered, *self._arrays())
        return self._made.value

    def shrunk(self, share: float, *, always: bool = False) -> TokenLists:
        """The same lists, as if their caps had only a `share` of their angle: what a search skips is no longer certain to hold nothing."""
        angles = np.arccos(np.clip(self.widest.astype(np.float64), -1.0, 1.0)) * share
        return replace(self, widest=np.cos(angles).astype(np.float32), tallies={}, always=always)

    def tally_of(self, queries: int) -> Tally:
        """Of searches for so many queries at once, or about so many."""
        return self.tallies.setdefault(queries if queries <= 4 else 1 << queries.bit_length(), Tally())


@dataclass(frozen=True, slots=True, eq=False)
class _Tree:
    """k-means in two levels over the first principal components of unit vectors."""

    axes: F32  # (P, D)
    roots: F32  # (S, P)
    leaves: F32  # (L, P)
    offsets: I64  # (S + 1,): the first leaf of each root
    directions: F32  # (L, D), unit vectors

    @classmethod
    def grown(cls, sample: F32, leaves: int, threads: int) -> _Tree:
        """From (n, D) unit vectors in any order that says nothing of them, since k-means begins with some here and there."""
        some = sample[:: -(-len(sample) // _SPREAD_SAMPLE)]
        some = some - some.mean(axis=0)
        axes: F32 = np.ascontiguousarray(np.linalg.eigh((some.T @ some).astype(np.float64)).eigenvectors.T[::-1][:_PREFIX], np.float32)
        points = np.empty((len(sample), len(axes)), np.float32)
        kernels().project(sample, axes, points, threads)
        count = max(1, math.isqrt(leaves))
        roots, of_root = np.empty((count, len(axes)), np.float32), np.empty(len(points), np.uint32)
        whole = np.asarray([0, len(points)])
        kernels().cluster(points, whole, np.asarray([0, count]), _SAMPLE_PER_ROOT, _ROUNDS, roots, of_root, threads)
        by_root, begins = _grouped(of_root, count)
        sizes = np.diff(begins)
        shares = np.clip(np.rint(leaves * sizes / len(points)).astype(np.int64), 1, np.maximum(sizes, 1))
        offsets = np.concatenate(([0], np.cumsum(shares)))
        centres, nearest = np.repeat(roots, shares, axis=0), np.empty(len(points), np.uint32)
        kernels().cluster(points[by_root], begins, offsets, len(points), _ROUNDS, centres, nearest, threads)
        leaf_of = np.empty(len(points), np.uint32)
        leaf_of[by_root] = nearest + np.repeat(offsets[:-1], sizes).astype(np.uint32)
        directions = np.empty((len(centres), sample.shape[1]), np.float32)
        kernels().mean_directions(sample, leaf_of, directions, threads)
        return cls(axes, roots, centres, offsets, directions)

    def for_kernels(self) -> tuple[F32, F32, F32, I64]:
        return self.axes, self.roots, self.leaves, self.offsets

    def left(self, shards: Sequence[NDArray[Any]], queries: F32 | None, threads: int) -> float:
        """The share of the tokens that a query cannot skip, as some tokens tell, or queries that are like those that will be asked."""
        rng = np.random.default_rng(1)
        size = sum(shard.shape[0] * shard.shape[1] for shard in shards)
        rows = units(sampled(shards, min(size, _LEFT_SAMPLE + _LEFT_QUERIES), rng))
        if len(rows) < 2:
            return 1.0
        asked, rows = np.split(rng.permutation(rows), [min(_LEFT_QUERIES, len(rows) // 2)])
        if queries is not None and len(given := units(queries)):
            asked = given[:: -(-len(given) // _LEFT_QUERIES)]
        rank = min(max(1, _LEFT_K * len(rows) // size), len(rows)) - 1
        best = -np.partition(-(asked @ rows.T), rank, axis=1)[:, rank, None]
        along = np.clip(asked @ self.directions.T, -1.0, 1.0)
        within = np.cos(np.maximum(np.arccos(along) - np.arccos(np.clip(best, -1.0, 1.0)), 0.0))  # of the list's direction
        assigned = np.empty(len(rows), np.uint32)
        kernels().assign_tokens(rows, *self.for_kernels(), assigned, threads)
        cosines = np.einsum("ij,ij->i", rows, self.directions[assigned])
        return float((cosines <= within[:, assigned]).mean())


def _grouped(groups: NDArray[Any], count: int) -> tuple[I64, I64]:
    """Positions in the order of their groups, and where each group begins."""
    sizes = np.bincount(groups, minlength=count)
    return np.argsort(groups.astype(np.uint16 if count <= 1 << 16 else np.uint32), kind="stable"), np.concatenate(([0], np.cumsum(sizes)))
