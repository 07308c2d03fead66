"""The protocols, with real sockets."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from support.guarded import KEYS as KEYS
from support.guarded import Service, echo, exchange, read_all, served, settings
from support.raw_http import GET, IMPLEMENTATIONS, LAST, POST, error_of, status_of, statuses, until

from dqe_engine.errors import InputError
from dqe_engine.server import connections
from dqe_engine.server.connections import MOST_HEADERS, MOST_PIPELINED
from dqe_engine.server.guards import Receive, Scope, Send
from dqe_engine.server.protocol import ProtocolFactory

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def not_taken(connection: socket.socket) -> bool:
    try:
        connection.sendall(GET)
    except OSError:
        return True
    return False


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


def test_a_factory_reaches_workers(implementation: str) -> None:
    factory = pickle.loads(pickle.dumps(ProtocolFactory(settings(), implementation=implementation)))
    assert (factory.settings, factory.implementation) == (settings(), implementation)
    with pytest.raises(InputError):
        ProtocolFactory(settings(), implementation="zttp")


def test_h11_is_taken_where_httptools_is_missing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqe_engine.server import protocol

    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    assert ProtocolFactory(settings()).implementation == "h11"
