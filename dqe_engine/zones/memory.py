"""Memory for codes that kernels sweep over."""

from __future__ import annotations

import contextlib
import math
import mmap

import numpy as np
from numpy.typing import NDArray

CODE_ALIGNMENT = 64  # kCodeAlignment of cpp_ext/tiles.hpp
_HUGE_PAGE = 2 << 20


def empty_codes(shape: tuple[int, ...]) -> NDArray[np.uint8]:
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
    return np.empty(size + CODE_ALIGNMENT, np.uint8), CODE_ALIGNMENT
