"""`starting`: an answer for who comes before a worker is ready, and would otherwise wait until one is.

A thread of the first process listens while the workers load. The worker that is ready first says so by a file, and listens once the thread
has let go of the lock of the run's folder (`take_over`): nobody who has seen a server that is ready meets one that starts. Later workers
find the lock free.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from dqe_engine.files import directory_lock

from .connections import PARTING_S
from .headers import answer_headers, request_id_of
from .problems import Problem, response_bytes, response_headers
from .protocol import ProtocolFactory
from .settings import ServerSettings

_LOOKED_EVERY = 0.01
_ACCEPTED_S = 0.1
"""Seconds in which a connection that was taken just before the end becomes known as one: asyncio makes its protocol some turns later."""


@contextlib.contextmanager
def starting(settings: ServerSettings, listening: socket.socket) -> Iterator[None]:
    """Answer at `listening` until a worker takes over, or the block ends. `settings.state` is needed, else nobody answers."""
    if settings.state is None:
        yield
        return
    with contextlib.ExitStack() as held:
        held.enter_context(directory_lock(settings.state))
        ended = threading.Event()
        thread = threading.Thread(target=_run, args=(settings, listening.dup(), held, ended), name="starting")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def take_over(state: Path | None) -> None:
    """Called by each worker that is ready, before it listens: returns once nobody but workers does."""
    if state is None:
        return
    _ready(state).touch()
    with directory_lock(state):
        pass


def _run(settings: ServerSettings, listening: socket.socket, held: contextlib.ExitStack, ended: threading.Event) -> None:
    try:
        with listening:
            asyncio.run(_answer(settings, listening, held, ended))
    finally:  # whatever became of it, workers wait for this
        held.close()


async def _answer(settings: ServerSettings, listening: socket.socket, held: contextlib.ExitStack, ended: threading.Event) -> None:
    assert settings.state is not None
    config = uvicorn.Config(_app, http=ProtocolFactory(settings), lifespan="off", log_config=None, ws="none")  # type: ignore[arg-type]
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        sock=listening,
        backlog=config.backlog,
    )
    ready = _ready(settings.state)
    while not ended.is_set() and not ready.exists():
        await asyncio.sleep(_LOOKED_EVERY)
    server.close()
    held.close()
    await asyncio.sleep(_ACCEPTED_S)
    until = loop.time() + PARTING_S  # a request may be on its way
    while state.connections and not ended.is_set() and loop.time() < until:
        await asyncio.sleep(_LOOKED_EVERY)
    for connection in list(state.connections):
        connection.transport.close()


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """503 for everything, but that the process runs; a browser is told to look again."""
    headers = {"Retry-After": "1", "Connection": "close"}
    if scope["path"] == "/":
        headers["Refresh"] = "1"
    request_id = request_id_of(next((value for name, value in scope["headers"] if name == b"x-request-id"), None))
    problem = Problem(503, "starting", "this server is starting; ask again in a second", headers)
    body, status = response_bytes(problem, request_id), problem.status
    if scope["path"] == "/healthz":
        body, status = b'{"status":"ok"}', 200
    whole = [*answer_headers(request_id), *response_headers(problem, body)]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _ready(state: Path) -> Path:
    return state / "ready"
