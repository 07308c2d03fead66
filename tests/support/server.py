"""Servers that tests start, and their keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from dqe_engine.server.app import create_app
from dqe_engine.server.protocol import ProtocolFactory
from dqe_engine.server.settings import ServerSettings

READ_KEY, WRITE_KEY = "read-key-0123456789", "write-key-0123456789"


def bearer(key: str) -> dict[str, str]:
    """Headers of a request with this key."""
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def running(settings: ServerSettings) -> Iterator[str]:
    """The address of a server in a thread of this process, over real sockets."""
    config = uvicorn.Config(
        create_app(settings), port=0, http=ProtocolFactory(settings), lifespan="on", log_config=None, access_log=False  # type: ignore[arg-type]
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
