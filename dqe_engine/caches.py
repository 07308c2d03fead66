"""What is remembered of earlier requests: bounded by bytes, the least recently used goes first."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from numpy.typing import NDArray

from .device_tokens import Tokens, copied
from .errors import BackendError

_ENTRY_BYTES, _ARRAY_BYTES = 512, 128
"""What a short key and its place take, and each array beside its values."""
T = TypeVar("T", bound=Tokens)


@dataclass(frozen=True)
class CacheStats:
    hits: int
    misses: int
    entries: int
    bytes: int


class ArrayCache(Generic[T]):
    """Tuples of arrays by a key of at most some hundred bytes, each kept where it lies. Threads may share it; arrays are read-only by
    agreement.

    `most_bytes`: in the process's memory and on a device together; 0 to keep nothing.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[T, ...]] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: Hashable) -> tuple[T, ...] | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kept.move_to_end(key)
            return found

    def peek(self, key: Hashable) -> tuple[T, ...] | None:
        """`get`, not counted: for who has asked before."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: Hashable, arrays: tuple[T, ...]) -> None:
        """Keep copies, since what is given may be a view into a batch; nothing where a device has no memory for them."""
        size = _bytes_of(arrays)
        if size > self._most or self.peek(key) is not None:
            return
        try:
            copies = cast(tuple[T, ...], tuple(copied(array) for array in arrays))
        except BackendError as error:
            logging.getLogger(__name__).warning("%s; answers go on without a copy for the next question", error)
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = copies
            self._bytes += size
            while self._bytes > self._most:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= _bytes_of(gone)

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._kept), self._bytes)


@dataclass(eq=False)
class _Making:
    done: threading.Event = field(default_factory=threading.Event)
    made: NDArray[Any] | None = None  # still None when done: it failed


class SharedArrays:
    """Arrays by what they are made from. Each is made once for all who ask while it is made or while somebody still holds it; nothing is
    kept beyond that. Threads may share it; arrays are read-only by agreement."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakValueDictionary[Hashable, NDArray[Any]] = weakref.WeakValueDictionary()
        self._making: dict[Hashable, _Making] = {}

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """What `make` gave to the first who asked. Raises what `make` raises; whoever waited for that one then makes it anew."""
        while True:
            with self._lock:
                if (held := self._held.get(key)) is not None:
                    return held
                making = self._making.get(key)
                is_first = making is None
                if making is None:
                    making = self._making[key] = _Making()
            if not is_first:
                making.done.wait()
                if making.made is not None:
                    return making.made
                continue
            try:
                made = making.made = make()
                with self._lock:
                    self._held[key] = made
                return made
            finally:
                with self._lock:
                    self._making.pop(key, None)
                making.done.set()


def _bytes_of(arrays: tuple[Tokens, ...]) -> int:
    return sum(array.nbytes + _ARRAY_BYTES for array in arrays) + _ENTRY_BYTES
