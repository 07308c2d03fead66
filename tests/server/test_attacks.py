"""Clients that are old, greedy or rude, over real sockets: each is answered as it may expect, and the next one as ever."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from support.server import running

from dqe_engine.processors import available_cpus
from dqe_engine.server import photos
from dqe_engine.server.service import MOST_BEGUN, MOST_RENDERED
from dqe_engine.server.settings import ServerSettings

BODY = b'{"text": "red", "k": 2}'
REST = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(BODY)
SEARCH = b"POST /v1/search HTTP/1.1\r\n" + REST + b"\r\n" + BODY
LAST = b"POST /v1/search HTTP/1.1\r\nConnection: close\r\n" + REST + b"\r\n" + BODY


def dial(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 60)


def exchange(url: str, sent: bytes) -> bytes:
    """All that comes until the server closes."""
    with dial(url) as connection:
        connection.sendall(sent)
        received = b""
        while data := connection.recv(65536):
            received += data
    return received


def test_http_1_0_and_pipelining(make_settings: Callable[..., ServerSettings]) -> None:
    with running(make_settings()) as url:
        old = exchange(url, b"POST /v1/search HTTP/1.0\r\n" + REST + b"\r\n" + BODY)
        assert b" 200 " in old[:15]
        assert b"transfer-encoding" not in old.lower()
        assert exchange(url, SEARCH * 8 + LAST).count(b"HTTP/1.1 200 ") == 9


def test_a_storm_of_clients_that_leave_holds_no_place_in_the_queue(make_settings: Callable[..., ServerSettings]) -> None:
    with running(make_settings(room=8, most=4)) as url:
        for _ in range(3):
            with ExitStack() as stack:
                crowd = [stack.enter_context(dial(url)) for _ in range(100)]
                for one in crowd:
                    one.sendall(SEARCH)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        until = time.monotonic() + 60
        while (answer := exchange(url, LAST)).startswith(b"HTTP/1.1 429 "):
            assert time.monotonic() < until
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_crowd_of_several_turns_is_answered_whole(make_settings: Callable[..., ServerSettings]) -> None:
    with running(make_settings()) as url, ExitStack() as stack:
        crowd = [stack.enter_context(dial(url)) for _ in range(5 * MOST_BEGUN)]
        for one in crowd:
            one.sendall(SEARCH)
        assert [one.recv(65536)[:13] for one in crowd] == [b"HTTP/1.1 200 "] * len(crowd)


def test_pictures_that_are_made_hold_up_nothing_else(make_settings: Callable[..., ServerSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many large photos are asked for at once, few are decoded, and what is short is answered meanwhile."""
    rendered, making, lock, let_go = photos._rendered, Counter[str](), threading.Lock(), threading.Event()

    def held(*arguments: Any) -> Any:
        with lock:
            making["now"] += 1
            making["most"] = max(making["now"], making["most"])
        assert let_go.wait(60)
        with lock:
            making["now"] -= 1
        return rendered(*arguments)

    settings, ids = make_settings(), [f"{n:02}.png" for n in range(0, 24, 2)]
    with running(settings) as url, ThreadPoolExecutor(len(ids)) as pool, httpx.Client(base_url=url, timeout=30) as client:
        assert client.get("/v1/items/00.png/image").status_code == 200
        monkeypatch.setattr(photos, "_rendered", held)
        asked = [pool.submit(client.get, f"/v1/items/{id}/image?size=640") for id in ids]
        most = min(MOST_RENDERED, available_cpus())
        try:
            while making["now"] < most:
                assert not any(one.done() for one in asked)
                time.sleep(0.01)
            for path in ("/healthz", "/v1/items", "/v1/facets", "/metrics", "/v1/items/00.png/image"):
                assert client.get(path).status_code == 200
            assert not any(one.done() for one in asked)
        finally:
            let_go.set()
        assert [one.result().status_code for one in asked] == [200] * len(ids)
    assert making["most"] == most


def test_connections_that_are_hoarded_make_room(make_settings: Callable[..., ServerSettings]) -> None:
    with running(make_settings(max_connections=20)) as url, ExitStack() as stack:
        for _ in range(60):
            idle = stack.enter_context(dial(url))
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert idle.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert httpx.get(f"{url}/readyz").status_code == 200
