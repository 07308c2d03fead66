"""`Refusals`: what a search is told where too many wait already, before anything is made for it: no task, no scope, no route.

Clients that offer ten times what can be done are mostly refused, so a refusal is what the event loop does most. By way of the guards it
takes 0.2 ms of processor time; here, a fraction of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from .headers import SEARCH, request_id_of
from .logs import AccessLog
from .metrics import Metrics
from .problems import queue_full, raw_answer, response_bytes
from .settings import ServerSettings


class Fullness(Protocol):
    """What is asked of the service."""

    def full(self, coming: int = 0) -> bool:
        """Whether one search more would wait for too many others, `coming` of which are not counted yet; asked for each."""
        ...


class Refusals:
    """Called with the headers of a search whose answer is not begun: the whole answer, counted and logged; None for one that may go on.

    Neither the Host header nor the key is looked at: the answer is the same for all, and says nothing of the index.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, state: Fullness, log: AccessLog | None = None) -> None:
        self._metrics, self._state = metrics, state
        self._log = AccessLog(least=settings.log) if log is None else log
        self._code = queue_full().code
        self._answer, self._length = _template()
        self._coming = 0  # searches whose tasks have not run yet: many requests are read before any of their tasks has a turn

    def __call__(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        if not self._state.full(self._coming):
            return None
        begun = time.perf_counter()
        given = [value for name, value in headers if name == b"x-request-id"]
        request_id = request_id_of(given[0] if len(given) == 1 else None)
        shown = request_id.encode("ascii")
        answer = self._answer % (shown, self._length + len(shown), shown)
        seconds = time.perf_counter() - begun
        self._metrics.request(SEARCH, "POST", 429, seconds)
        self._metrics.rejected(self._code)
        self._log.write(
            request_id=request_id, method="POST", route=SEARCH, status=429, milliseconds=1000 * seconds, bytes_in=0, bytes_out=len(answer),
            key=None, reason=self._code,
        )  # fmt: skip
        return answer

    def admitted(self, loop: asyncio.AbstractEventLoop) -> None:
        """A search goes on: its task was made just now, and waits for its first turn, in which the service counts it."""
        self._coming += 1
        loop.call_soon(self._has_run)

    def _has_run(self) -> None:
        self._coming -= 1


def _template() -> tuple[bytes, int]:
    """The answer, to be formatted with the request id, the body's length and the id again; and that length without the id."""
    problem, place = queue_full(), "-" * 16
    length = len(response_bytes(problem, place))
    answer = raw_answer(problem, place, closes=False).replace(b"%", b"%%").replace(place.encode(), b"%s")
    return answer.replace(b"content-length: %d\r\n" % length, b"content-length: %d\r\n"), length - len(place)
