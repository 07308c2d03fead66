"""What is remembered of earlier requests: bounded by bytes, the least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ENTRY_BYTES = 256
"""Of a key and its place, beside the arrays."""


@dataclass(frozen=True)
class CacheStats:
    hits: int
    misses: int
    entries: int
    bytes: int


class ArrayCache:
    """Tuples of arrays by key. Threads may share it; arrays are read-only by agreement. `most_bytes` 0: nothing is kept."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[NDArray[np.float32], ...]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: Hashable) -> tuple[NDArray[np.float32], ...] | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: tuple[NDArray[np.float32], ...]) -> None:
        """Keep copies, since what is given may be a view into a batch."""
        size = sum(array.nbytes for array in arrays) + _ENTRY_BYTES
        if size > self._most:
            return
        copies = tuple(np.array(array) for array in arrays)
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = copies
            self._bytes += size
            while self._bytes > self._most:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= sum(array.nbytes for array in gone) + _ENTRY_BYTES

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._kept), self._bytes)
