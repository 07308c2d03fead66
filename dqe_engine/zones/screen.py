"""Certified screening: 8-bit copies of items whose bounds say, exactly, which items need not be read in full."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dqe_engine.errors import InputError
from dqe_engine.processors import available_cpus

from .arrays import F32, shards_of
from .compiled import kernels
from .lists import TokenLists

_CODE_ALIGNMENT = 64  # kCodeAlignment of cpp_ext/tiles.hpp
_HUGE_PAGE = 2 << 20
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

    @classmethod
    def build(cls, items: NDArray[Any] | Sequence[NDArray[Any]], *, threads: int = 0, lists: bool = True) -> Screen:
        """Quantise items as `select_zones` takes them. `nbytes` is about a quarter of float32 items.

        lists: also cluster the tokens, where there are enough of them; a result never depends on it.

        Raises InputError for items that `select_zones` would refuse, BackendError where the kernels are not built.
        """
        coded, shards = [], shards_of(items)
        for shard in shards:
            if shard.shape[2] > MAX_WIDTH:
                raise InputError(f"items: D={shard.shape[2]}, at most {MAX_WIDTH} can be screened; search without a screen")
            codes = _empty_codes(_coded_shape(shard))
            scales, errors, norms = (np.empty(shard.shape[:2], np.float32) for _ in range(3))
            kernels().encode(shard, codes, scales, errors, norms, threads or available_cpus())
            coded.append(CodedShard(codes, scales, errors, norms))
        return cls(tuple(coded), TokenLists.build(shards, threads=threads or available_cpus()) if lists else None)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for shard in self.shards for array in shard) + (self.lists.nbytes if self.lists else 0)

    def check_fits(self, shards: tuple[NDArray[Any], ...]) -> None:
        """Raise InputError unless this is the shape of a screen of these (n, M, D) shards."""
        expected = [_coded_shape(shard) for shard in shards]
        found = [shard.codes.shape for shard in self.shards]
        if found != expected:
            raise InputError(f"screen: its shards have shapes {found}, those of items need {expected}; build it from the same items")


def _empty_codes(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """An empty array whose rows (multiples of 64 bytes) each fill whole cache lines: kernels load 64 bytes at a time."""
    size = math.prod(shape)
    room, alignment = _room(size)
    start = -room.ctypes.data % alignment
    return room[start : start + size].reshape(shape)


def _room(size: int) -> tuple[NDArray[np.uint8], int]:
    """An alignment, and enough bytes for `size` of them from a multiple of it on.

    Pages of 2 MiB where Linux has them: with the usual ones, a sweep over some megabytes waits for addresses.
    """
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without such pages; or no memory, which NumPy will say
            pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return np.frombuffer(pages, np.uint8), _HUGE_PAGE
    return np.empty(size + _CODE_ALIGNMENT, np.uint8), _CODE_ALIGNMENT


def _coded_shape(shard: NDArray[Any]) -> tuple[int, int, int]:
    count, tokens, width = shard.shape
    return count, tokens, -(-width // _CODE_ALIGNMENT) * _CODE_ALIGNMENT


def screen_bytes(shards: Sequence[NDArray[Any]]) -> int:
    """What `Screen.build` of these (n, M, D) shards will take."""
    return sum(count * tokens * (width + 12) for count, tokens, width in map(_coded_shape, shards))
