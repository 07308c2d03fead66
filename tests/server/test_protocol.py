"""The protocols, with real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from support.guarded import KEYS as KEYS
from support.guarded import READ_KEY, WRITE_KEY, Service, echo, exchange, read_all, served, settings
from support.thorough import cases as random_cases

from dqe_engine.errors import InputError
from dqe_engine.server import connections
from dqe_engine.server.connections import MOST_HEADERS, MOST_PIPELINED, Watch
from dqe_engine.server.guards import Receive, Scope, Send
from dqe_engine.server.protocol import ProtocolFactory

IMPLEMENTATIONS = ("httptools", "h11")
GET = b"GET /v1/items HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /v1/items HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\n"

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def statuses(answers: bytes) -> list[int]:
    """Of several answers, whose bodies hold no status line."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def error_of(answer: bytes) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error: dict[str, str] = json.loads(body)["error"]
    assert f"x-request-id: {error['request_id']}".encode() in head
    assert b"content-security-policy: " in head
    return error


def not_taken(connection: socket.socket) -> bool:
    try:
        connection.sendall(GET)
    except OSError:
        return True
    return False


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_uvicorn_has_what_is_overridden(implementation: str) -> None:
    """uvicorn's class, as our subclass takes it for granted; a new version of uvicorn may need another subclass."""
    import inspect

    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle as H11Cycle
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as HttpToolsCycle

    both = ("connection_made", "connection_lost", "data_received", "on_response_complete", "pause_writing", "resume_writing")
    calls = ("send_400_response", "_unset_keepalive_if_required")
    theirs: Any = HttpToolsProtocol if implementation == "httptools" else H11Protocol
    cycle: Any = HttpToolsCycle if implementation == "httptools" else H11Cycle
    parsing = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete")
    for name in (*both, *calls, *(parsing if implementation == "httptools" else ("handle_events",))):
        assert callable(vars(theirs)[name]), name
    arguments = ["self", "config", "server_state", "app_state", "_loop"]
    assert list(inspect.signature(theirs.__init__).parameters) == arguments
    source = inspect.getsource(theirs)
    for attribute in (
        "self.cycle",
        "self.flow",
        "self.transport",
        "self.ws_protocol_class",
        "self.conn" if implementation == "h11" else "self.pipeline",
    ):
        assert f"{attribute} = " in source or f"{attribute}: " in source, attribute
    made = inspect.getsource(cycle)
    for attribute in ("keep_alive", "response_started", "response_complete", "more_body", "transport"):
        assert f"self.{attribute} = " in made, attribute
    assert "self.transport.close()" in made
    parser_error = "except httptools.HttpParserError:" if implementation == "httptools" else "except h11.RemoteProtocolError:"
    handler = source.split(parser_error)[1].split("return")[0]
    assert "self.send_400_response(" in handler


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_requests_are_answered(implementation: str, loop: str) -> None:
    service = Service()
    with served(service.guards, service.settings, implementation=implementation, loop=loop) as (port, server, _factory):
        answers = exchange(
            port,
            GET * 3 + POST + b"Content-Length: 5\r\n\r\nhello" + POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n" + LAST,
        )
        assert statuses(answers) == [200] * 6
        assert answers.count(b'"size": 5') == 2
        assert answers.count(b"x-request-id") == 6
        until(lambda: not server.server_state.connections)
    assert [line["status"] for line in service.lines] == [200] * 6


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_three_hundred_slow_clients_hold_nobody_up_and_are_closed(implementation: str, loop: str) -> None:
    """A third sends nothing, a third half a head, a third a byte now and then."""
    given = settings(head_timeout_s=2.0)
    ended = threading.Event()
    with served(echo, given, implementation=implementation, loop=loop) as (port, server, factory), ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 30)) for _ in range(300)]
        for connection in slow[100:200]:
            connection.sendall(b"GET /v1/items HTTP/1.1\r\nHost: loc")

        def drip() -> None:
            drops = iter(GET[:-2] + b"X-Drip: " + b"x" * 10_000)
            while not ended.wait(0.1):
                drop = bytes((next(drops),))
                for connection in slow[200:]:
                    with suppress(OSError):
                        connection.sendall(drop)

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            until(lambda: len(server.server_state.connections) >= 299)
            for _ in range(5):
                assert status_of(exchange(port, LAST)) == 200
            answers = [read_all(connection) for connection in slow]
        finally:
            ended.set()
            dripping.join()
        assert set(map(status_of, answers[:100])) == {0}
        assert set(map(status_of, answers[100:200])) == {408}
        assert {status_of(answer) for answer in answers[200:]} <= {408, 0}
        assert error_of(answers[100])["code"] == "too_slow"
        assert status_of(exchange(port, LAST)) == 200
        until(lambda: not server.server_state.connections)
        assert factory.watch(server.server_state).connections == 0


def test_a_slow_head_after_an_answer_is_given_up_too(implementation: str) -> None:
    given = settings(head_timeout_s=0.5)
    with (
        served(echo, given, implementation=implementation) as (port, _server, _factory),
        socket.create_connection(("127.0.0.1", port), 30) as one,
    ):
        one.sendall(GET)
        until(lambda: b'"size": 0' in one.recv(65536, socket.MSG_PEEK))
        one.sendall(b"\r\n\r\nGET / HT")
        assert statuses(read_all(one)) == [200, 408 if implementation == "httptools" else 400]  # h11 takes no empty lines


def test_an_idle_connection_is_closed_by_uvicorn(implementation: str) -> None:
    given = settings(head_timeout_s=60)
    with served(echo, given, implementation=implementation, keep_alive=0.3) as (port, _server, _factory):
        assert statuses(exchange(port, GET)) == [200]


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 40_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(5000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000_000,
    ],
)
def test_a_head_over_the_limit_is_refused(implementation: str, head: bytes) -> None:
    with served(echo, settings(), implementation=implementation) as (port, _server, _factory):
        if implementation == "httptools" or not head.endswith(b"\r\n\r\n"):  # h11 takes what comes whole in one piece
            answer = exchange(port, head)
            assert status_of(answer) == 431
            assert error_of(answer)["code"] == "head_too_large"
        assert (
            status_of(exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"x" * 30_000 + b"\r\n\r\n")) == 200
        )


def test_headers_are_counted(implementation: str) -> None:
    if implementation == "h11":
        return  # which bounds their bytes alone
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(MOST_HEADERS))
    with served(echo, settings(), implementation=implementation) as (port, _server, _factory):
        assert status_of(exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")) == 431


@pytest.mark.parametrize(
    "rest",
    [
        b"5;x=" + b"y" * 1_000_000,
        b"5\r\nhello\r\n0\r\nX: " + b"y" * 1_000_000,
        b"5\r\nhello\r\n0\r\n" + b"".join(b"X-%d: 1\r\n" % number for number in range(100_000)),
    ],
)
def test_chunk_extensions_and_trailers_are_bounded(implementation: str, rest: bytes) -> None:
    with served(echo, settings(), implementation=implementation) as (port, _server, _factory):
        answer = exchange(port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + rest)
        assert status_of(answer) in (400, 431)


def test_trailers_do_not_become_headers(implementation: str) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        seen.append([name for name, _ in scope["headers"]])

    with served(app, settings(), implementation=implementation) as (port, _server, _factory):
        body = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\nX-API-Key: abc\r\n\r\n"
        assert status_of(exchange(port, POST + body)) == 200
    assert seen == [[b"host", b"transfer-encoding", b"connection"]]


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00",
        b"hello\r\n\r\n",
        b"GET / HTTP/99\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nA b: c\r\n\r\n",
        b"\x00" * 50,
    ],
)
def test_what_is_no_http_is_told_so(implementation: str, raw: bytes) -> None:
    with served(echo, settings(head_timeout_s=1), implementation=implementation) as (port, _server, _factory):
        answer = exchange(port, raw)
        assert status_of(answer) in (400, 408)
        assert error_of(answer)["code"] in ("unreadable", "too_slow")


def test_what_comes_after_a_request_that_is_being_answered_does_not_take_its_place(implementation: str) -> None:
    """A second request that is none: the first answer is whole, and nothing is between."""

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2)
        await echo(scope, receive, send)

    with served(slowly, settings(), implementation=implementation) as (port, _server, _factory):
        answer = exchange(port, GET + b"\x00\x01 rubbish\r\n\r\n")
        first, size, rest = answer.partition(b'"size": 0}')
        assert statuses(first) == [200]
        assert size
        # httptools reads ahead, so the protocol knows that nothing follows; h11 reads on after the answer, and says what it finds.
        assert statuses(rest) == ([] if implementation == "httptools" else [400])


def test_requests_ahead_of_answers_are_bounded(implementation: str) -> None:
    started: list[str] = []

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        started.append(scope["path"])
        await asyncio.sleep(0.01)
        await echo(scope, receive, send)

    with served(slowly, settings(), implementation=implementation) as (port, _server, _factory):
        answer = exchange(port, GET * 2000 if implementation == "httptools" else GET * 100 + LAST)
        assert set(statuses(answer)) == {200}
        assert len(started) == len(statuses(answer)) == (MOST_PIPELINED + 1 if implementation == "httptools" else 101)


def test_too_large_bodies_are_answered_though_the_client_is_still_sending(implementation: str) -> None:
    service = Service(settings=settings(max_body_bytes=100_000))
    with served(service.guards, service.settings, implementation=implementation) as (port, server, _factory):
        for head in (b"Content-Length: 10000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n989680\r\n"):
            answer = exchange(port, POST + head + b"x" * 10_000_000)
            assert status_of(answer) == 413
            assert b"connection: close" in answer.lower()
            assert error_of(answer)["code"] == "too_large"
        until(lambda: not server.server_state.connections)


def test_after_an_answer_the_rest_of_a_request_is_thrown_away_for_a_moment_only(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.3)
    service = Service(settings=settings(max_body_bytes=100_000))
    with served(service.guards, service.settings, implementation=implementation) as (port, server, _factory):
        with socket.create_connection(("127.0.0.1", port), 30) as one:
            one.sendall(POST + b"Content-Length: 10000000\r\n\r\n")
            assert status_of(read_all(one)) == 413
            # What comes after the answer is no request, whatever it looks like.
            until(lambda: not_taken(one))
        until(lambda: not server.server_state.connections)
        assert len(service.lines) == 1


def test_who_does_not_take_the_answer_is_dropped(implementation: str) -> None:
    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"20000000")]})
        for number in range(20):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": number < 19})

    with served(patient, settings(send_timeout_s=0.5), implementation=implementation) as (port, server, _factory):
        with socket.create_connection(("127.0.0.1", port), 30) as one:
            one.sendall(GET)
            until(lambda: len(server.server_state.connections) == 1)
            until(lambda: not server.server_state.connections)
            assert len(read_all(one)) < 20_000_000
        # Who takes some of it now and then is not.
        with socket.create_connection(("127.0.0.1", port), 30) as one:
            one.sendall(LAST)
            taken = 0
            while taken < 20_000_000:
                part = one.recv(1_000_000)
                assert part
                taken += len(part)
                time.sleep(0.02)


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


def test_a_factory_reaches_workers(implementation: str) -> None:
    factory = pickle.loads(pickle.dumps(ProtocolFactory(settings(), implementation=implementation)))
    assert (factory.settings, factory.implementation) == (settings(), implementation)
    with pytest.raises(InputError):
        ProtocolFactory(settings(), implementation="zttp")


def test_h11_is_taken_where_httptools_is_missing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqe_engine.server import protocol

    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    assert ProtocolFactory(settings()).implementation == "h11"


# Attacks.


@contextmanager
def guarded(implementation: str, **given: Any) -> Iterator[tuple[Service, int, uvicorn.Server]]:
    service = Service(settings=settings(keys=KEYS, **given))
    with served(service.guards, service.settings, implementation=implementation) as (port, server, _):
        yield service, port, server


WRITING = f"Authorization: Bearer {WRITE_KEY}\r\n".encode()
SMUGGLED = b"DELETE /v1/items/x HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\nContent-Length: %d\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n0\r\n\r\n",
        b"Content-Length: %d\r\nContent-Length: 0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n",
        b"Content-Length: 0, %d\r\n\r\n",
        b"Content-Length: -%d\r\n\r\n",
        b"Content-Length: 0x%d\r\n\r\n",
        b"Content-Length:\r\n %d\r\n\r\n",
    ],
)
def test_a_request_with_two_lengths_carries_no_other_request(implementation: str, framing: bytes) -> None:
    """Whichever length a proxy before us believed, we answer one request, and end the connection or take the rest for its body."""
    with guarded(implementation) as (service, port, _server):
        head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\n" + WRITING
        body = SMUGGLED.replace(b"\r\n\r\n", b"\r\n" + WRITING + b"\r\n")
        length = b"%d" % len(body)
        answer = exchange(port, head + framing.replace(b"%d", length) + body)
        assert ("DELETE", "/v1/items/x") not in service.reached
        assert len(statuses(answer)) == 1


def test_a_request_id_cannot_make_headers(implementation: str) -> None:
    with guarded(implementation) as (_service, port, _server):
        for value in (
            b"a\r\n Set-Cookie: x=1",
            b"a\rSet-Cookie: x=1",
            b"a\nSet-Cookie: x=1",
            b"a\x00b",
            b"a%0d%0aSet-Cookie: x=1",
            b"\xe2\x98\x83",
        ):
            answer = exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-ID: " + value + b"\r\n\r\n")
            assert status_of(answer) in (200, 400)
            assert b"\r\nset-cookie" not in answer.lower()
            assert b"\nset-cookie" not in answer.lower()


@pytest.mark.parametrize(
    "line",
    [
        b"DELETE //v1/items/x HTTP/1.1",
        b"DELETE /%2e%2e/v1/items/x HTTP/1.1",
        b"DELETE /page/../v1/items/x HTTP/1.1",
        b"DELETE /page/%2e%2e/v1/items/x HTTP/1.1",
        b"DELETE /healthz HTTP/1.1",
        b"DELETE /v1/session/../items/x HTTP/1.1",
        b"DELETE /v1/session%2f..%2fitems%2fx HTTP/1.1",
        b"DELETE /v1/session%00 HTTP/1.1",
        b"DELETE /v1/session? HTTP/1.1 ",
        b"DELETE /V1/SESSION HTTP/1.1",
        b"delete /v1/items/x HTTP/1.1",
        b"Delete /v1/session HTTP/1.1",
        b"POST /v1/items?/v1/search HTTP/1.1",
        b"POST /v1/items#/v1/search HTTP/1.1",
        b"POST /v1/items;/v1/search HTTP/1.1",
        b"POST /v1/search%2f..%2fitems HTTP/1.1",
        b"POST http://localhost/v1/items HTTP/1.1",
        b"PATCH http://localhost/healthz/../v1/items HTTP/1.1",
        b"PUT * HTTP/1.1",
        b"POST \\v1\\search HTTP/1.1",
        b"CONNECT localhost:80 HTTP/1.1",
        b"TRACE / HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"GET /v1/items?key=" + WRITE_KEY.encode() + b" HTTP/1.1",
        b"HEAD /v1/items/x HTTP/1.1",
        b"OPTIONS /v1/items HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET /page/../v1/items HTTP/1.1",
        b"GET /page/%2e%2e/v1/items HTTP/1.1",
        b"GET /page/..%5cv1/items HTTP/1.1",
        b"GET /page//v1/items HTTP/1.1",
    ],
)
def test_no_spelling_gets_past_the_keys(implementation: str, line: bytes) -> None:
    with guarded(implementation) as (service, port, _server):
        for extra in (b"", b"X-HTTP-Method-Override: DELETE\r\nX-Original-URL: /v1/items/x\r\nX-Rewrite-URL: /healthz\r\n"):
            answer = exchange(port, line + b"\r\nHost: localhost\r\nConnection: close\r\n" + extra + b"\r\n")
            if line == b"DELETE /v1/session? HTTP/1.1 ":
                assert status_of(answer) in (200, 400)
                assert {path for _, path in service.reached} <= {"/v1/session"}
            else:
                assert status_of(answer) in (400, 401, 403, 405)
                assert not service.reached


def test_an_upgrade_is_a_request_like_others(implementation: str) -> None:
    with guarded(implementation, head_timeout_s=1) as (service, port, _server):
        for protocol in (b"websocket", b"h2c"):
            upgrade = (
                b"Connection: Upgrade\r\nUpgrade: "
                + protocol
                + b"\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            )
            with socket.create_connection(("127.0.0.1", port), 30) as one:
                one.sendall(b"GET /v1/items HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n" + SMUGGLED)
                one.shutdown(socket.SHUT_WR)
                answer = read_all(one)
            assert set(statuses(answer)) <= {401, 400}
            assert not service.reached


def mutated(rng: Any, seeds: list[bytes]) -> bytes:
    raw = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(raw) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            raw[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
        elif kind == 1:
            del raw[place : place + rng.randint(1, 8)]
        elif kind == 2 and place < len(raw):
            raw[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            raw[place:place] = rng.choice(
                (b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"/", b"%2e", b"%", b"..", b"\r\n\r\n", b",", b";", b"chunked")
            )
        elif kind == 4:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            raw[place:place] = other[start : start + rng.randint(1, 60)]
        else:
            raw[place:place] = raw[max(0, place - rng.randint(1, 40)) : place]
    return bytes(raw)


@pytest.mark.slow
def test_mutated_requests(implementation: str) -> None:
    """Never a 500, never a write without its key, and nothing is left behind."""
    import random

    requests = random_cases(2_000, 10_000)

    rng = random.Random(7)
    seeds = [
        GET,
        LAST,
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nX-API-Key: " + READ_KEY.encode() + b"\r\nContent-Length: 11\r\n\r\nhello world",
        b"POST /v1/items HTTP/1.1\r\nHost: localhost\r\nCookie: a=b; dqe_key=" + WRITE_KEY.encode() + b"\r\nContent-Length: 5\r\n\r\nhello",
        b"DELETE /v1/items/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + READ_KEY.encode() + b"\r\n\r\n",
        b"PATCH /v1/items/a%2Fb HTTP/1.1\r\nHost: localhost:8000\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"DELETE /v1/session HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nX-Request-ID: abc\r\nExpect: 100-continue\r\n\r\n",
        b"HEAD /page/a.js HTTP/1.0\r\nConnection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ]
    public = {("POST", "/v1/session"), ("DELETE", "/v1/session"), ("POST", "/v1/search")}
    with guarded(implementation, head_timeout_s=5, body_timeout_s=5) as (service, port, server):
        found: dict[int, int] = {}
        sizes = []
        for number in range(requests):
            cut_short = seeds[number : number + 1]  # the first ones: all but the last byte of each
            raw = cut_short[0][:-1] if cut_short else b"".join(mutated(rng, seeds) for _ in range(rng.choice((1, 1, 1, 2, 3))))
            with socket.create_connection(("127.0.0.1", port), 30) as one:
                try:
                    one.sendall(raw)
                    one.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                for status in statuses(read_all(one)):
                    found[status] = found.get(status, 0) + 1
            if number % (requests // 4) == requests // 4 - 1:
                until(lambda: not server.server_state.connections and not server.server_state.tasks)
                gc.collect()
                sizes.append(sum(isinstance(one, connections.Connection) for one in gc.get_objects()))
                service.log.seek(0)
                service.log.truncate()
        assert not [status for status in found if status >= 500]
        assert {200, 400, 401, 403} <= set(found)
        assert all(method in ("GET", "OPTIONS") or (method, path) in public for method, path in service.reached)
        assert max(sizes) <= 2
        assert status_of(exchange(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 200
