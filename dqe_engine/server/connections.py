"""What a server's connections share: who waits for what, until when, and how many there are.

A connection is in one of these states; `Watch` drops it when it stays too long.

- It waits for a whole head (request line and headers): from the start, and later from the first byte of the next request.
- It idles between requests: uvicorn closes it. While it reads a body, or answers, the guards count the time.
- It does not take its answer.
- It lingers: the answer is sent, the rest of the request is thrown away.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

from .peers import is_loopback, network_of
from .problems import Problem, raw_answer, retry_after
from .settings import ServerSettings

MOST_HEADERS = 100
MOST_PIPELINED = 16
"""Requests that a client may send before the answer to its first."""
LINGER_S = 1.0
LINGER_BYTES = 16 << 20
"""Seconds and bytes for which the rest of a request is thrown away after its answer. Closing at once would reset the connection, and the
client might never read the answer."""
PARTING_S = 1.0
"""Seconds for which a connection that idles when the server ends still takes a request: one may be on its way, and its client would see a
reset. The answer to it says that the connection ends."""
_LEAST_RATE = 1024  # bytes a second that a client has to take of its answer
_GRACE_S = 0.5  # for which a new connection is not dropped to make room
_MOST_REFUSED = 64  # connections that are told 503 at the same time; more are dropped


class Watch:
    """The connections of one server in one process. For the thread of its event loop."""

    def __init__(self, settings: ServerSettings, loop: asyncio.AbstractEventLoop) -> None:
        self.settings, self.loop = settings, loop
        self.connections = 0
        self.refused = 0
        self._trusted = [ip_network(proxy, strict=False) for proxy in settings.proxies]
        self._peers: Counter[str] = Counter()
        # Each in the order of deadlines, as each kind has one time limit.
        self._heads: dict[Connection, float] = {}
        self._idle: dict[Connection, None] = {}
        self._stalled: dict[Connection, tuple[float, int]] = {}  # and the bytes that were not taken yet
        self._lingering: dict[Connection, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # when it goes off

    def admit(self, connection: Connection, peer: str | None) -> bool:
        """Whether there is room for it. Where there is none, who has waited for a head, or idled, longest goes."""
        peer = None if peer is None or is_loopback(peer) or self._is_proxy(peer) else network_of(peer)
        if peer is not None and self._peers[peer] >= self.settings.max_connections_per_peer:
            return False
        if self.connections >= self.settings.max_connections and not self._make_room():
            return False
        self.connections += 1
        if peer is not None:
            self._peers[peer] += 1
        connection.counted_for = peer
        return True

    def release(self, connection: Connection) -> None:
        """It is gone, or as good as gone."""
        self._heads.pop(connection, None)
        self._idle.pop(connection, None)
        self._stalled.pop(connection, None)
        self._lingering.pop(connection, None)
        if connection.is_admitted:
            connection.is_admitted = False
            self.connections -= 1
            if connection.counted_for is not None:
                self._peers[connection.counted_for] -= 1
                if not self._peers[connection.counted_for]:
                    del self._peers[connection.counted_for]
        elif connection.is_refused:
            connection.is_refused = False
            self.refused -= 1

    def expect_head(self, connection: Connection) -> None:
        """From now on, unless it is expected already."""
        if connection not in self._heads:
            self._idle.pop(connection, None)
            self._heads[connection] = self.loop.time() + self.settings.head_timeout_s
            self._arm()

    def have_head(self, connection: Connection) -> None:
        self._heads.pop(connection, None)
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        if connection not in self._heads:
            self._idle[connection] = None

    def expect_taking(self, connection: Connection, left: int) -> None:
        """`left`: bytes of answers that its client has not taken."""
        if connection not in self._stalled:
            self._stalled[connection] = (self.loop.time() + self.settings.send_timeout_s, left)
            self._arm()

    def all_taken(self, connection: Connection) -> None:
        self._stalled.pop(connection, None)

    def expect_end(self, connection: Connection) -> None:
        """It lingers."""
        self.have_head(connection)
        self._lingering[connection] = self.loop.time() + LINGER_S
        self._arm()

    def _is_proxy(self, peer: str) -> bool:
        if not self._trusted:
            return False
        try:
            address = ip_address(network_of(peer).partition("/")[0])
            return any(address in network or ip_address(peer) in network for network in self._trusted)
        except ValueError:
            return False

    def _make_room(self) -> bool:
        oldest = next(iter(self._heads), None)
        if oldest is not None and self._heads[oldest] - self.settings.head_timeout_s + _GRACE_S <= self.loop.time():
            oldest.drop()
            return True
        longest = next(iter(self._idle), None)
        if longest is not None:
            longest.drop()
            return True
        return False

    def _arm(self) -> None:
        """One timer for all: the earliest deadline."""
        first = min(
            next(iter(self._heads.values()), math.inf),
            next(iter(self._lingering.values()), math.inf),
            next(iter(self._stalled.values()), (math.inf, 0))[0],
        )
        if first < self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._due = first
            self._timer = self.loop.call_later(max(0.01, first - self.loop.time()), self._look)

    def _look(self) -> None:
        self._timer, self._due = None, math.inf
        now = self.loop.time()
        while self._heads and (late := next(iter(self._heads))) and self._heads[late] <= now:
            del self._heads[late]
            late.head_is_late()
        while self._lingering and (done := next(iter(self._lingering))) and self._lingering[done] <= now:
            done.drop()
        while self._stalled and (slow := next(iter(self._stalled))) and self._stalled[slow][0] <= now:
            before = self._stalled.pop(slow)[1]
            left = slow.transport.get_write_buffer_size()
            if left and 0 <= before - left < min(before, _LEAST_RATE * self.settings.send_timeout_s):
                slow.drop()
            elif left:
                self.expect_taking(slow, left)
        self._arm()


class Connection(asyncio.Protocol):
    """What uvicorn's protocols are mixed with, before them. A subclass says when a head begins and ends."""

    transport: Any
    cycle: Any
    ws_protocol_class: Any
    _unset_keepalive_if_required: Callable[[], None]

    def __init__(self, watch: Watch, **uvicorn: Any) -> None:
        """uvicorn: what its server makes a protocol with."""
        super().__init__(**uvicorn)
        self.ws_protocol_class = None
        self.watch = watch
        self.counted_for: str | None = None
        self.is_admitted = self.is_refused = False
        self.is_parting = False  # the server ends, and with its next answer the connection
        self._deaf = False  # to what comes: the connection is about to end
        self.is_ended = False  # nothing more is sent
        self._discarded = 0
        self._raw: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.admitted(transport):
            super().connection_made(transport)
            self.watch.expect_head(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.release(self)
        self._unset_keepalive_if_required()  # uvicorn leaves the timer, and so the connection, where there was an error
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch.expect_taking(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self.watch.all_taken(self)

    def admitted(self, transport: Any) -> bool:
        """Whether the connection may be; else its client is told so, and it ends."""
        self._raw = transport
        peer = transport.get_extra_info("peername")
        if self.watch.admit(self, str(peer[0]) if isinstance(peer, tuple) and peer else None):
            self.is_admitted = True
            return True
        self._deaf = True
        self.transport = transport
        if self.watch.refused >= _MOST_REFUSED:
            transport.abort()
            return False
        self.is_refused = True
        self.watch.refused += 1
        message = "the server takes no more connections; try again in a moment, and use fewer"
        transport.write(raw_answer(Problem(503, "connections", message, retry_after(1))))
        self.linger()
        return False

    def discards(self, data: bytes) -> bool:
        """Whether nobody reads `data`."""
        if self._deaf:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.drop()
        return self._deaf

    def refuse(self, problem: Problem) -> None:
        """Say what is wrong with what came, unless an answer is on its way, and end the connection."""
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        self.watch.have_head(self)
        if self.is_answering():
            self.cycle.keep_alive = False  # it ends with that answer
            return
        self.transport.write(raw_answer(problem))
        if self.cycle is not None and not self.cycle.response_complete:  # its body is damaged: who reads it learns that no more comes
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.linger()

    def head_is_late(self) -> None:
        """The head did not come in time."""
        if self.is_answering():  # it is the next request's; first the answer to this one
            self.watch.expect_head(self)
        elif self.has_part_of_head():
            self.refuse(Problem(408, "too_slow", "the request's line and headers did not arrive in time; send them at once"))
        else:
            self.drop()  # a browser's connection ahead of need: an answer would be taken for that to its next request

    def has_part_of_head(self) -> bool:
        """Whether something of a head came."""
        raise NotImplementedError

    def drop(self) -> None:
        """End the connection now, whatever is left to send."""
        self._deaf = self.is_ended = True
        self.watch.release(self)
        self._raw.abort()

    def answered(self, *, is_idle: bool) -> None:
        """An answer is handed to the transport. `is_idle`: neither another request nor the rest of this one is there."""
        left = self._raw.get_write_buffer_size()
        if left:
            self.watch.expect_taking(self, left)
        if is_idle and not self._deaf and not self._raw.is_closing():
            self.watch.idle(self)

    def part(self, end: Callable[[], None]) -> None:
        """The server ends. `end`: what uvicorn does then, to a connection that idles or that answers."""
        self.is_parting = True
        if self.cycle is None or self.cycle.response_complete:
            self.watch.loop.call_later(PARTING_S, lambda: None if self._raw.is_closing() else end())
        else:
            end()

    def is_answering(self) -> bool:
        """Whether somebody works on an answer that cannot be replaced."""
        return self.cycle is not None and not self.cycle.response_complete and (self.cycle.response_started or not self.cycle.more_body)

    def linger(self) -> None:
        """Close for writing, and give the client a moment to read before the connection is reset by what it still sends."""
        self._deaf = self.is_ended = True
        self.watch.expect_end(self)
        try:
            if not self._raw.can_write_eof():
                self._raw.close()
                return
            self._raw.write_eof()
            self._raw.resume_reading()
        except (OSError, RuntimeError):
            self.drop()


class Closer:
    """The transport as an answer (uvicorn's cycle) sees it: `close` lingers where its request has not come whole."""

    def __init__(self, connection: Connection, cycle: Any, transport: Any) -> None:
        self._connection, self._cycle, self._transport = connection, cycle, transport
        self.write = transport.write

    def is_closing(self) -> bool:
        return self._connection.is_ended or bool(self._transport.is_closing())

    def close(self) -> None:
        if not self._cycle.more_body or self._transport.is_closing():
            self._transport.close()
        elif not self._connection.is_ended:
            self._connection.linger()
