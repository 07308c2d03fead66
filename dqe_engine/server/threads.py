"""`Threads`: work of requests that would hold up the event loop, in a few threads of one purpose each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from dqe_engine.errors import DeadlineError, OverloadError

MOST = 256
"""Pieces of work that are done or wait, for each pool; a page asks for some dozens at a time."""
T = TypeVar("T")


class Threads:
    """A pool and the number of those who wait for it. Used from one event loop."""

    def __init__(self, pool: ThreadPoolExecutor, *, deadline_s: float | None = None) -> None:
        """deadline_s: seconds for which a caller waits at most, for a thread and for the work; None without end."""
        self._pool, self._deadline_s, self._count = pool, deadline_s, 0

    async def do(self, work: Callable[..., T], *arguments: object) -> T:
        """What `work(*arguments)` gives. Work that has begun goes on to its end, also when nobody waits any more, so it counts until then.

        Raises OverloadError where much waits already, and DeadlineError.
        """
        if self._count >= MOST:
            raise OverloadError(f"{self._count} pictures, listings and counts wait already; ask again in a moment")
        self._count += 1
        submitted = self._pool.submit(partial(work, *arguments))
        running = asyncio.wrap_future(submitted)
        running.add_done_callback(self._left)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(running)
        except TimeoutError as error:
            if running.done():  # the work's own
                raise
            submitted.cancel()  # does nothing to what has begun
            raise DeadlineError(f"there was no answer within {self._deadline_s:g} s; ask again later") from error

    def close(self) -> None:
        """Nobody waits for what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _left(self, running: asyncio.Future[T]) -> None:
        self._count -= 1
        if not running.cancelled():
            running.exception()  # nobody may wait for it any more
