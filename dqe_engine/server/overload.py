"""`Refusals`: what a search is told where too many wait already, before anything is made for it: no task, no scope, no route.

Clients that offer ten times what can be done are mostly refused, so a refusal is what the event loop does most. By way of the guards it
takes 0.2 ms of processor time; here, a fifth of that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from .headers import SEARCH, request_id_of
from .logs import AccessLog
from .metrics import Metrics
from .problems import queue_full, raw_answer
from .settings import ServerSettings


class Fullness(Protocol):
    """What is asked of the service."""

    def full(self) -> bool:
        """Whether one search more would wait for too many others; asked for each."""
        ...


class Refusals:
    """Called with the headers of a search whose answer is not begun: the whole answer, counted and logged; None for one that may go on.

    Neither the Host header nor the key is looked at: the answer is the same for all, and says nothing of the index.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, state: Fullness, log: AccessLog | None = None) -> None:
        self._metrics, self._state = metrics, state
        self._log = AccessLog(least=settings.log) if log is None else log
        self._problem = queue_full()

    def __call__(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        if not self._state.full():
            return None
        begun = time.perf_counter()
        given = [value for name, value in headers if name == b"x-request-id"]
        request_id = request_id_of(given[0] if len(given) == 1 else None)
        answer = raw_answer(self._problem, request_id, closes=False)
        seconds = time.perf_counter() - begun
        self._metrics.request(SEARCH, "POST", 429, seconds)
        self._metrics.rejected(self._problem.code)
        self._log.write(
            request_id=request_id, method="POST", route=SEARCH, status=429, milliseconds=1000 * seconds, bytes_in=0, bytes_out=len(answer),
            key=None, reason=self._problem.code,
        )  # fmt: skip
        return answer
