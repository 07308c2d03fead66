"""`Rates`: how many requests a client may send. Each process counts its own, so with N workers a client gets up to N times the rate."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from ..errors import InputError


class Rates:
    """A token bucket for each client: `burst` requests at once, refilled at `rate` a second.

    Memory is bounded: of `clients` that are remembered, the one that asked longest ago is forgotten first, and starts anew. The clock is
    monotonic, so setting the machine's time changes nothing. For one thread, the event loop's.
    """

    def __init__(self, rate: float, burst: float, *, clients: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises InputError for a rate that is not above 0, a burst below 1, or no clients."""
        if not rate > 0 or not burst >= 1 or clients < 1:
            raise InputError(f"expected rate > 0, burst >= 1 and clients >= 1, got {rate}, {burst} and {clients}")
        self.rate, self.burst, self._most, self._clock = rate, burst, clients, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: (tokens, when they were that many)

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._buckets)

    def take(self, client: str) -> float:
        """0 where the request may pass, and is counted; else the seconds until one may, and nothing is counted."""
        now = self._clock()
        tokens, then = self._buckets.get(client, (self.burst, now))
        tokens = min(self.burst, tokens + max(0.0, now - then) * self.rate)
        passes = tokens >= 1
        self._buckets[client] = (tokens - 1 if passes else tokens, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if passes else (1 - tokens) / self.rate
