"""Requests that are meant to be read in two ways, and mutated ones, with real sockets."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from support.guarded import KEYS as KEYS
from support.guarded import READ_KEY, WRITE_KEY, Service, exchange, read_all, served, settings
from support.raw_http import GET, IMPLEMENTATIONS, LAST, status_of, statuses, until
from support.thorough import cases as random_cases

from dqe_engine.server import connections

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


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
