"""Clusters of tokens that an exact search may skip, and which token is in which; cpp_ext/lists.hpp has the certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I64
from .compiled import kernels
from .prefix import NoPrefix, Prefix
from .sampling import sampled, units

LEAST_TOKENS = 1 << 15
"""Fewer tokens are swept in less time than lists would take."""
_PREFIX = 16
"""Principal components by which tokens are clustered; the certificates are those of all D numbers."""
_LISTS_PER_ROOT = 8
"""As many lists as this times the root of the number of tokens: a query looks at each list, and at the tokens of a few."""
_LEAST_PER_LIST = 16
_SAMPLE_PER_LIST = 12
_ROUNDS = 4
_LEFT_SAMPLE, _LEFT_QUERIES, _LEFT_K, _LEFT_LISTS = 16_384, 16, 10, 1024
"""Tokens, queries and lists by which it is judged what lists spare, for searches for so many of the best."""
MOST_LEFT = 0.1
"""Share of the tokens that lists may leave where they are worth their memory: where they leave more, prefixes alone take less time."""
_SPREAD_SAMPLE = 1 << 16  # tokens, at most, whose principal components these are


@dataclass(slots=True)
class _Tally:
    """How a gallery's queries have fared: where lists rule out too little, they are tried ever more rarely."""

    tried: int = 0
    scattered: int = 0
    skipped: int = 0


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
    tally: _Tally = field(default_factory=_Tally)
    always: bool = False
    """Tried for every query, whatever the tally says: for measurements, which a sweep in full would flatter."""

    @classmethod
    def build(cls, shards: Sequence[NDArray[Any]], *, threads: int, least: int = LEAST_TOKENS) -> TokenLists | None:
        """Cluster the tokens of (n, M, D) shards; None where there are fewer than `least`, or too many for 32 bits."""
        covered, tokens, width = sum(map(len, shards)), *shards[0].shape[1:]
        size = covered * tokens
        if not least <= size < 2**32 - 1:
            return None
        wanted = max(1, min(_LISTS_PER_ROOT * math.isqrt(size), size // _LEAST_PER_LIST))
        rng = np.random.default_rng(0)
        sample = units(sampled(shards, min(size, wanted * _SAMPLE_PER_LIST), rng))
        if len(sample) < wanted:
            return None  # most tokens have no direction
        tree = _Tree.grown(sample, wanted, rng, threads)
        assigned = np.empty(size, np.uint32)
        kernels().assign_tokens(list(shards), tree.axes, tree.roots, tree.leaves, tree.offsets, assigned, threads)
        count = len(tree.directions)
        longest, widest, starts = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count + 1, np.int64)
        rows, cosines = np.empty(size, np.uint32), np.empty(size, np.uint16)
        kernels().fill_lists(list(shards), tree.directions, assigned, longest, widest, starts, rows, cosines, threads)
        codes = np.empty((count, 1, -(-width // 64) * 64), np.uint8)
        scales, errors, norms = (np.empty((count, 1), np.float32) for _ in range(3))
        kernels().encode(tree.directions[:, None], codes, scales, errors, norms, threads)
        return cls(covered, codes[:, 0], scales[:, 0], errors[:, 0], norms[:, 0], longest, widest, starts, rows, cosines)

    def prefixed(self, shards: Sequence[NDArray[Any]], *, threads: int, queries: F32 | None = None, width: int | None = None) -> TokenLists:
        """The same lists, with prefixes of their tokens where these pay; the arguments are those of `Prefix.weighed`."""
        return replace(self, level=Prefix.weighed(shards, queries=queries, threads=threads, least=1, width=width, order=self.rows))

    @property
    def prefix(self) -> Prefix | None:
        return self.level if isinstance(self.level, Prefix) else None

    def left(self, shards: Sequence[NDArray[Any]], queries: F32 | None = None) -> float:
        """The share of the tokens that a query cannot skip, as some tokens tell, or queries that are like those that will be asked."""
        rng = np.random.default_rng(0)
        rows = units(sampled(shards, min(len(self.rows), _LEFT_SAMPLE + _LEFT_QUERIES), rng))
        if len(rows) < 2:
            return 1.0
        asked, rows = np.split(rng.permutation(rows), [min(_LEFT_QUERIES, len(rows) // 2)])
        if queries is not None and len(given := units(queries)):
            asked = given[:: -(-len(given) // _LEFT_QUERIES)]
        rank = min(max(1, _LEFT_K * len(rows) // len(self.rows)), len(rows)) - 1
        best = -np.partition(-(asked @ rows.T), rank, axis=1)[:, rank, None]
        lists = slice(None, None, -(-len(self.longest) // _LEFT_LISTS))
        width = shards[0].shape[2]
        along = np.clip(asked @ ((self.codes[lists, :width] - np.float32(128)) * self.scales[lists, None]).T, -1.0, 1.0)
        within = np.cos(np.maximum(np.arccos(along) - np.arccos(np.clip(best, -1.0, 1.0)), 0.0))  # of the list's direction
        begins, sizes = self.starts[:-1][lists], np.diff(self.starts)[lists]
        which = np.repeat(np.arange(len(sizes)), sizes)
        at = np.arange(len(which)) + np.repeat(begins - np.cumsum(sizes) + sizes, sizes)
        cosines = self.cosines[at] / np.float32(32767.5) - 1
        return float((cosines <= within[:, which]).mean()) if len(which) else 1.0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays()) + (self.prefix.nbytes if self.prefix else 0)

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return (self.codes, self.scales, self.errors, self.norms, self.longest, self.widest, self.starts, self.rows, self.cosines)

    def for_kernels(self) -> tuple[Any, ...]:
        """What `_kernels.sweep` takes as `lists`."""
        return (self.covered, *self._arrays())

    def shrunk(self, share: float, *, always: bool = False) -> TokenLists:
        """The same lists, as if their caps had only a `share` of their angle: what a search skips is no longer certain to hold nothing."""
        angles = np.arccos(np.clip(self.widest.astype(np.float64), -1.0, 1.0)) * share
        return replace(self, widest=np.cos(angles).astype(np.float32), tally=_Tally(), always=always)

    def worth_trying(self) -> bool:
        """Whether enough of the queries until now were spared enough; after many that were not, one in 64 is tried."""
        tally = self.tally
        if self.always or tally.tried < 8 or 2 * tally.scattered <= tally.tried:
            return True
        tally.skipped += 1
        return tally.skipped % 64 == 0

    def note(self, tried: int, scattered: int) -> None:
        tally = self.tally
        tally.tried += tried
        tally.scattered += scattered
        if tally.tried > 256:  # what was long ago counts less
            tally.tried //= 2
            tally.scattered //= 2


@dataclass(frozen=True, slots=True, eq=False)
class _Tree:
    """k-means in two levels over the first principal components of unit vectors."""

    axes: F32  # (P, D)
    roots: F32  # (S, P)
    leaves: F32  # (L, P)
    offsets: I64  # (S + 1,): the first leaf of each root
    directions: F32  # (L, D), unit vectors

    @classmethod
    def grown(cls, sample: F32, leaves: int, rng: np.random.Generator, threads: int) -> _Tree:
        some = sample[:: -(-len(sample) // _SPREAD_SAMPLE)].astype(np.float64)
        some -= some.mean(axis=0)
        spread = some.T @ some
        axes: F32 = np.ascontiguousarray(np.linalg.eigh(spread).eigenvectors.T[::-1][:_PREFIX], np.float32)
        points: F32 = sample @ axes.T
        roots, of_root = _kmeans(points, max(1, math.isqrt(leaves)), rng, rounds=_ROUNDS, threads=threads)
        centres, directions = [], []
        for root in range(len(roots)):
            (members,) = np.nonzero(of_root == root)
            share = max(1, min(len(members), round(leaves * len(members) / len(sample))))
            own, of_leaf = (
                _kmeans(points[members], share, rng, rounds=_ROUNDS, threads=threads)
                if len(members)
                else (roots[root : root + 1], np.empty(0, np.uint32))
            )
            sums = np.zeros((len(own), sample.shape[1]))
            order = np.argsort(of_leaf, kind="stable")
            present, begins = np.unique(of_leaf[order], return_index=True)
            if len(present):
                sums[present] = np.add.reduceat(sample[members[order]], begins, axis=0, dtype=np.float64)
            norms = np.linalg.norm(sums, axis=1, keepdims=True)
            lost = norms[:, 0] == 0  # an empty leaf, or one whose members cancel
            sums[lost, 0], norms[lost] = 1.0, 1.0
            centres.append(own)
            directions.append((sums / norms).astype(np.float32))
        offsets = np.concatenate(([0], np.cumsum([len(own) for own in centres])))
        return cls(axes, roots, np.concatenate(centres), offsets, np.concatenate(directions))


def _kmeans(points: F32, count: int, rng: np.random.Generator, *, rounds: int, threads: int) -> tuple[F32, NDArray[np.uint32]]:
    """Lloyd's iterations from `count` of the points: centres and the nearest of each point. A centre without points stays."""
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = _nearest(points, centres, threads)
        sizes = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, column, minlength=count) for column in points.T], axis=1)
        found = sizes > 0
        centres[found] = (sums[found] / sizes[found, None]).astype(np.float32)
    return centres, _nearest(points, centres, threads)


def _nearest(points: F32, centres: F32, threads: int) -> NDArray[np.uint32]:
    """For each (n, P) point the centre of least distance."""
    nearest = np.empty(len(points), np.uint32)
    kernels().find_nearest(points, centres, nearest, threads)
    return nearest
