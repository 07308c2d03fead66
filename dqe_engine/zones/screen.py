"""Certified screening: 8-bit copies of items whose bounds say, exactly, which items need not be read in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError
from dqe_engine.processors import available_cpus

from .arrays import F32, check_array, shards_of
from .compiled import Made, kernels
from .lists import MOST_LEFT, NoLists, TokenLists
from .memory import CODE_ALIGNMENT, empty_codes
from .prefix import NoPrefix, Prefix

MAX_WIDTH = 65536
"""Of tokens that can be screened; kMostCodedWidth of cpp_ext/screen.hpp."""


class CodedShard(NamedTuple):
    """One shard of a gallery; cpp_ext/screen.hpp has the inequality that the three numbers enter."""

    codes: NDArray[np.uint8]  # (n, M, W): round(item / scale) + 128; W is D rounded up to a multiple of 64
    scales: F32  # (n, M)
    errors: F32  # (n, M): norm of what the codes leave, with room for rounding
    norms: F32  # (n, M): norm of scale * codes


@dataclass(frozen=True, slots=True)
class Screen:
    """The 8-bit copy of a gallery, passed as `screen=` to `select_zones` with the items that it was built from."""

    shards: tuple[CodedShard, ...]
    lists: TokenLists | None = None
    """Clusters of the tokens, by which a query skips what cannot matter without a look at its codes."""
    prefix: Prefix | None = None
    """A few numbers of each token, by which most of the others' codes need not be read; None where that would save little, and where there
    are lists, which then have them in an order of their own."""
    no_prefix: NoPrefix | None = None
    """Why there is none, where one was weighed."""
    left: float | None = None
    """What lists would leave of the tokens, where that was too much to keep them."""
    _made: Made = field(default_factory=Made, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        items: NDArray[Any] | Sequence[NDArray[Any]],
        queries: F32 | None = None,
        *,
        threads: int = 0,
        lists: bool | Literal["always"] = True,
        prefix: bool = True,
    ) -> Screen:
        """Quantise items as `select_zones` takes them. `nbytes` is about a quarter of float32 items.

        The other arguments change the time of a search, never its result:

        queries: (B, D) float32, finite, like those that will be asked. They decide whether lists and a prefix pay; without them, some of
            the tokens stand in.
        lists: also cluster the tokens, if there are enough of them and queries can skip most; "always": even if they cannot, for searches
            that stop early.
        prefix: also keep the first numbers of each token in a rotated basis, if these should rule out most tokens (`describe` says).

        Raises InputError for items and queries that `select_zones` would refuse and queries that are not finite, BackendError where the
        kernels are not built.
        """
        shards = shards_of(items)
        if queries is not None:
            _check_queries(queries, shards[0].shape[2])
        if (width := shards[0].shape[2]) > MAX_WIDTH:
            raise InputError(f"items: D={width}, at most {MAX_WIDTH} can be screened; search without a screen")
        threads = threads or available_cpus()
        # Codes last: what the others needed meanwhile becomes part of their memory, which a process that is new to the system waits for.
        most_left = 1.0 if lists == "always" else MOST_LEFT
        found = TokenLists.weighed(shards, queries=queries, threads=threads, most_left=most_left) if lists else NoLists()
        if isinstance(found, TokenLists):
            kept = found.prefixed(shards, queries=queries, threads=threads) if prefix else found
            return cls(_coded(shards, threads), kept)
        weighed = Prefix.weighed(shards, queries=queries, threads=threads) if prefix else None
        level, reason = (None, weighed) if isinstance(weighed, NoPrefix) else (weighed, None)
        return cls(_coded(shards, threads), None, level, reason, found.left)

    def for_kernels(self) -> Any:
        """What `_kernels.sweep` takes as `coded`, made once."""
        if self._made.value is None:
            self._made.value = kernels().Codes(list(self.shards))
        return self._made.value

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for shard in self.shards for array in shard) + sum(
            part.nbytes for part in (self.lists, self.prefix) if part
        )

    def describe(self) -> str:
        """What a search looks at, and why."""
        tokens = sum(shard.codes.shape[0] * shard.codes.shape[1] for shard in self.shards)
        parts = [f"8-bit codes of {tokens:,} tokens"]
        if self.lists:
            parts.append(f"{len(self.lists.longest):,} lists of {len(self.lists.rows):,} tokens")
        elif self.left is not None:
            parts.append(f"no lists: they would leave {self.left:.0%} of the tokens")
        level = self.lists.level if self.lists else self.prefix or self.no_prefix
        parts.append(level.describe() if level else "no prefix")
        return f"{'; '.join(parts)}; {self.nbytes / 2**20:,.0f} MiB"

    def check_fits(self, shards: tuple[NDArray[Any], ...]) -> None:
        """Raise InputError unless this is the shape of a screen of these (n, M, D) shards."""
        expected = [_coded_shape(shard) for shard in shards]
        found = [shard.codes.shape for shard in self.shards]
        if found != expected:
            raise InputError(f"screen: its shards have shapes {found}, those of items need {expected}; build it from the same items")


def _coded(shards: Sequence[NDArray[Any]], threads: int) -> tuple[CodedShard, ...]:
    coded = []
    for shard in shards:
        codes = empty_codes(_coded_shape(shard))
        scales, errors, norms = (np.empty(shard.shape[:2], np.float32) for _ in range(3))
        kernels().encode(shard, codes, scales, errors, norms, threads)
        coded.append(CodedShard(codes, scales, errors, norms))
    return tuple(coded)


def _check_queries(queries: F32, width: int) -> None:
    check_array("queries", queries, (np.float32,), (2,))
    if queries.shape[1] != width:
        raise InputError(f"queries have D={queries.shape[1]} and items D={width}; both must be the same")
    if not np.isfinite(queries).all():
        at = int(np.flatnonzero(~np.isfinite(queries).all(axis=1))[0])
        raise InputError(f"queries: row {at} holds NaN or infinity; leave it out")


def _coded_shape(shard: NDArray[Any]) -> tuple[int, int, int]:
    count, tokens, width = shard.shape
    return count, tokens, -(-width // CODE_ALIGNMENT) * CODE_ALIGNMENT


def screen_bytes(shards: Sequence[NDArray[Any]]) -> int:
    """What `Screen.build` of these (n, M, D) shards will take."""
    return sum(count * tokens * (width + 12) for count, tokens, width in map(_coded_shape, shards))
