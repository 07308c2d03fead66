"""A small guarded application, asked in process or over sockets."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from dqe_engine.server.guards import App, Guards, Message, Receive, Scope, Send
from dqe_engine.server.keys import key_of
from dqe_engine.server.logs import AccessLog
from dqe_engine.server.metrics import Metrics
from dqe_engine.server.problems import Problem
from dqe_engine.server.protocol import ProtocolFactory
from dqe_engine.server.settings import ServerSettings

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

READ_KEY, WRITE_KEY = "read-key-read-key-1", "write-key-write-key-2"
KEYS = (key_of(READ_KEY, "page"), key_of(WRITE_KEY, "ci", may_write=True))
HOST = (b"host", b"localhost:8000")


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(Path("bundle"), Path("index"), **given)


@dataclass
class State:
    is_ready: bool = True
    is_full: bool = False

    def ready(self) -> bool:
        return self.is_ready

    def full(self) -> bool:
        return self.is_full

    def not_offered(self, method: str, path: str) -> Problem | None:
        return None

    async def turn(self) -> None:
        return None


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body, and says what came."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = json.dumps({"method": scope["method"], "path": scope["path"], "size": size}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


@dataclass
class Service:
    """`app` behind the guards. `lines`: of the access log."""

    app: App = echo
    settings: ServerSettings = field(default_factory=settings)
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.log = io.StringIO()
        self.metrics = Metrics(self.settings)
        self.reached: list[tuple[str, str]] = []

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            self.reached.append((scope.get("method", ""), scope.get("path", "")))
            await self.app(scope, receive, send)

        self.guards = Guards(counted, self.settings, self.metrics, self.state, AccessLog(self.log))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def ask(
        self,
        method: str = "GET",
        path: str = "/v1/items",
        headers: list[tuple[bytes, bytes]] | None = None,
        *,
        chunks: list[bytes] | None = None,
        ends: bool = True,
        key: str | None = None,
        client: str = "10.0.0.1",
        host: bool = True,
        version: str = "1.1",
    ) -> Answer:
        """`chunks`: parts of the body as they arrive. `ends`: whether the last one is; else nothing comes after them."""
        given = [*([HOST] if host else []), *(headers or [])]
        if key is not None:
            given.append((b"authorization", f"Bearer {key}".encode()))
        scope: Scope = {
            "type": "http",
            "http_version": version,
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": given,
            "client": (client, 1234),
            "state": {},
        }
        waiting = list(chunks or [])
        sent: list[Message] = []

        async def receive() -> Message:
            if waiting:
                body = waiting.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(waiting) or not ends}
            if not ends:
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        asyncio.run(self.guards(scope, receive, send))
        start = sent[0]
        assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
        assert not sent[-1].get("more_body", False)
        names = [name for name, _ in start["headers"]]
        assert len(set(names)) == len(names), "a header twice"
        headers_out = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], headers_out, b"".join(message["body"] for message in sent[1:]))


@contextmanager
def served(
    app: App, given: ServerSettings, *, implementation: str = "httptools", loop: str = "asyncio", keep_alive: float = 5.0
) -> Iterator[tuple[int, uvicorn.Server, ProtocolFactory]]:
    """(port, server, factory) of `app` in a thread of its own."""
    factory = ProtocolFactory(given, implementation=implementation)
    config = uvicorn.Config(
        app,
        http=factory,  # type: ignore[arg-type]
        ws="none",
        loop=loop,  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
    )
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], server, factory
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def exchange(port: int, raw: bytes, *, timeout: float = 30.0) -> bytes:
    """All that a server answers to `raw` until it closes the connection; b"" where it resets it."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        with suppress(OSError):
            connection.sendall(raw)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            answer += part
    return answer


def keyed(**given: Any) -> Service:
    return Service(settings=settings(keys=KEYS, **given))


def counted(service: Service, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(service.metrics.render().decode())
    return {tuple(one.labels.values()): one.value for family in families for one in family.samples if one.name == name}
