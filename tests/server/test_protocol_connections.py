"""Connections: how many there may be, in all and of one peer."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest
from support.guarded import KEYS as KEYS
from support.guarded import echo, exchange, read_all, served, settings
from support.raw_http import GET, IMPLEMENTATIONS, LAST, error_of, status_of, statuses, until

from dqe_engine.server import connections
from dqe_engine.server.connections import Watch

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def test_connections_in_all_are_bounded_and_who_waits_longest_goes(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_GRACE_S", 60)
    given = settings(max_connections=20, head_timeout_s=60)
    with served(echo, given, implementation=implementation) as (port, server, _factory), ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(20)]
        until(lambda: len(server.server_state.connections) == 20)
        answer = exchange(port, LAST)
        assert status_of(answer) == 503
        assert error_of(answer)["code"] == "connections"
        assert b"retry-after: 1" in answer
        # Once they have waited a moment, the first of them has to go.
        monkeypatch.setattr(connections, "_GRACE_S", 0)
        assert status_of(exchange(port, LAST)) == 200
        assert read_all(slow[0]) == b""
        assert len(server.server_state.connections) == 19
        # So has one that idles, where nobody waits for a head.
        for connection in slow[1:]:
            connection.sendall(GET)
            until(lambda connection=connection: b"size" in connection.recv(65536, socket.MSG_PEEK))
        new = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
        new.sendall(GET)
        until(lambda: b"size" in new.recv(65536, socket.MSG_PEEK))
        assert status_of(exchange(port, LAST)) == 200
        assert statuses(read_all(slow[1])) == [200]


def test_refused_connections_hold_nothing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_GRACE_S", 60)
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    given = settings(max_connections=1, head_timeout_s=60)
    with served(echo, given, implementation=implementation) as (port, server, factory), ExitStack() as stack:
        stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
        until(lambda: len(server.server_state.connections) == 1)
        refused = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(200)]
        watch = factory.watch(server.server_state)
        assert {status_of(read_all(connection)) for connection in refused} <= {503, 0}
        until(lambda: watch.refused == 0)
        assert watch.connections == 1


class Peer:
    """A connection as `Watch` knows it, from an address of our choice."""

    def __init__(self, watch: Watch, address: str) -> None:
        self.is_admitted = self.is_refused = False
        self.counted_for: str | None = None
        self.is_admitted = watch.admit(self, address)  # type: ignore[arg-type]

    def drop(self) -> None:
        raise AssertionError("nobody has to go")


def test_connections_of_one_peer_are_bounded(implementation: str) -> None:
    async def check() -> None:
        given = settings(max_connections_per_peer=3, proxies=("10.0.0.0/24", "2001:db8:9::7"))
        watch = Watch(given, asyncio.get_running_loop())
        same = [Peer(watch, address) for address in ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1")]
        assert [peer.is_admitted for peer in same] == [True, True, True, False]
        assert Peer(watch, "192.0.2.2").is_admitted
        network = [Peer(watch, f"2001:db8::{number}") for number in range(4)]
        assert [peer.is_admitted for peer in network] == [True, True, True, False]
        for free in ("127.0.0.1", "::1", "10.0.0.7", "2001:db8:9::7"):
            assert all(Peer(watch, free).is_admitted for _ in range(10)), free
        watch.release(same[0])  # type: ignore[arg-type]
        watch.release(same[0])  # type: ignore[arg-type]
        assert Peer(watch, "192.0.2.1").is_admitted
        assert not Peer(watch, "192.0.2.1").is_admitted

    asyncio.run(check())
