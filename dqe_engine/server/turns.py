"""`Turns`: at most so many tasks begin in one turn of the event loop, the others in the next ones."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """`await turns()` returns at once for the first `most` of a turn of the event loop, and for others in later turns, in their order.

    A loop that has read many requests in one turn runs all their tasks before it reads again. A search takes it half a millisecond, so
    hundreds that come together would keep what came behind them waiting for a tenth of a second, refusals too. For the loop's thread.
    """

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._count = 0
        self._is_due = False  # a new turn is on its way

    def __len__(self) -> int:
        """How many wait. A task whose turn has come waits until it runs: meanwhile the loop may read more."""
        return self._count

    async def __call__(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._next, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        own = loop.create_future()
        self._waiting.append(own)
        self._count += 1
        try:
            await own
        finally:
            self._count -= 1

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        begun = 0
        while self._waiting and begun < self._most:
            own = self._waiting.popleft()
            if not own.done():  # else its task was cancelled
                own.set_result(None)
                begun += 1
        self._left = self._most - begun
        self._is_due = begun > 0
        if self._is_due:
            loop.call_soon(self._next, loop)
