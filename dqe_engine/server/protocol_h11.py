"""uvicorn's protocol on h11, bounded as `connections` says. Slower than that on httptools; for where that is not installed."""

from __future__ import annotations

import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .connections import Closer, Connection, Watch
from .problems import Problem


class H11Connection(Connection, H11Protocol):
    """The parser bounds what it holds of a head, a chunk's size and trailers, which it drops."""

    def __init__(self, watch: Watch, **uvicorn: Any) -> None:
        super().__init__(watch, **uvicorn)
        self.conn = h11.Connection(h11.SERVER, watch.settings.max_head_bytes)

    def data_received(self, data: bytes) -> None:
        if self.discards(data):
            return
        if self.conn.their_state is h11.IDLE:
            self.watch.expect_head(self)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        if self.is_ended:
            return
        answered = self.cycle
        super().on_response_complete()
        self._follow()
        if self.conn.their_state is h11.IDLE and self.has_part_of_head() and not self.discards(b""):
            self.watch.expect_head(self)
        self.answered(is_idle=self.cycle is answered and self.conn.their_state is h11.IDLE)

    def shutdown(self) -> None:
        self.part(super().shutdown)

    def send_400_response(self, msg: str) -> None:
        """Called where h11's error is handled."""
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            most = self.watch.settings.max_head_bytes
            self.refuse(Problem(431, "head_too_large", f"the head has more than {most} bytes; send less"))
        else:
            self.refuse(Problem(400, "unreadable", "what came is not an HTTP/1.1 request; send one"))

    def has_part_of_head(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def _follow(self) -> None:
        """What h11 made of what came."""
        if self.conn.their_state is not h11.IDLE:
            self.watch.have_head(self)
        if self.cycle is not None and not isinstance(self.cycle.transport, Closer):
            if self.is_parting:
                self.cycle.keep_alive = False
            self.cycle.transport = Closer(self, self.cycle, self.transport)
