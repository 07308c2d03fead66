"""uvicorn's protocol on httptools, bounded as `connections` says."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .connections import MOST_HEADERS, MOST_PIPELINED, Closer, Connection, Watch
from .headers import SEARCH
from .problems import Problem, queue_full

_SEARCH = SEARCH.encode()


class HttpToolsConnection(Connection, HttpToolsProtocol):
    """The parser itself bounds nothing, so what it holds is counted here: bytes since it last told of a head, of a part of a body, or of
    their end. Trailers of a chunked body are dropped: they would join the headers after those were looked at.
    """

    def __init__(self, watch: Watch, **uvicorn: Any) -> None:
        super().__init__(watch, **uvicorn)
        self._in_head = True  # or between requests
        self._held = 0
        self._progressed = False
        self._head_bytes = self._headers = 0
        self._reason: Problem | None = None
        self._refusal: bytes | None = None  # the answer to a search that is one too many

    def data_received(self, data: bytes) -> None:
        if self.discards(data):
            return
        if self._in_head:
            self.watch.expect_head(self)
        self._progressed = False
        super().data_received(data)
        if self._refusal is not None and not self._deaf:  # its body is on the way, and nobody waits for it
            self._refusal = None
            self._unset_keepalive_if_required()
            self.refuse(queue_full())
            return
        self._held = 0 if self._progressed else self._held + len(data)
        if self._held > self.watch.settings.max_head_bytes:
            self._unset_keepalive_if_required()
            self.refuse(self._over_limit())

    def on_message_begin(self) -> None:
        self._head_bytes = self._headers = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_PIPELINED:
            self._reason = Problem(429, "pipelined", f"more than {MOST_PIPELINED} requests were sent ahead of answers; wait for them")
            raise ValueError(self._reason)
        self._in_head, self._progressed = False, True
        self.watch.have_head(self)
        refuses = self.app_state.get("refuses_search") if self.url == _SEARCH and not self.is_answering() else None
        if refuses is not None:
            is_plain = self.parser.get_method() == b"POST" and self.parser.get_http_version() == "1.1" and not self.expect_100_continue
            self._refusal = refuses(self.headers) if is_plain else None
            if self._refusal is not None:
                return
        super().on_headers_complete()
        if refuses is not None:
            refuses.admitted(self.loop)
        if self.is_parting:
            self.cycle.keep_alive = False
        self.cycle.transport = Closer(self, self.cycle, self.transport)

    def on_body(self, body: bytes) -> None:
        self._progressed = True
        if self._refusal is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = self._progressed = True
        if self._refusal is None:
            super().on_message_complete()
        elif not self.is_ended:
            self._refuse_search(self._refusal)

    def _refuse_search(self, answer: bytes) -> None:
        """At once, without a task; the connection is kept, as otherwise its client would soon come with another."""
        self._refusal = None
        self.transport.write(answer)
        if self.is_parting or not self.parser.should_keep_alive():
            self.transport.close()
            return
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self.answered(is_idle=True)

    def on_response_complete(self) -> None:
        if self.is_ended:
            self.pipeline.clear()
            return
        super().on_response_complete()
        self.answered(is_idle=self._in_head and self.cycle.response_complete)

    def shutdown(self) -> None:
        self.part(super().shutdown)

    def send_400_response(self, msg: str) -> None:
        self.refuse(self._reason or Problem(400, "unreadable", "what came is not an HTTP/1.1 request; send one"))

    def has_part_of_head(self) -> bool:
        return self._held > 0

    def is_answering(self) -> bool:
        return bool(self.pipeline) or super().is_answering()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.watch.settings.max_head_bytes or self._headers > MOST_HEADERS:
            self._reason = self._over_limit()
            raise ValueError(self._reason)

    def _over_limit(self) -> Problem:
        most = self.watch.settings.max_head_bytes
        return Problem(431, "head_too_large", f"the head has more than {most} bytes or {MOST_HEADERS} headers; send less")
