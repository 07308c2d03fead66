"""`serve`: uvicorn with this application, in one process or in several workers, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial

import uvicorn
from uvicorn.supervisors import Multiprocess

from dqe_engine.errors import InputError

from .app import create_app
from .logs import configuration
from .protocol import ProtocolFactory
from .settings import ServerSettings


def serve(settings: ServerSettings, *, level: str = "info", indexing: Sequence[str] | None = None) -> int:
    """Listen and answer. Returns the exit code: 0 after SIGTERM, 2 where it cannot start.

    level: of log lines; a request is an "info". indexing: command of a process that fills the index meanwhile, and is ended with
    the server. Raises InputError for an address that cannot be had.
    """
    listening = _listen(settings.host, settings.port)
    config = uvicorn.Config(
        partial(create_app, settings),
        factory=True,
        workers=settings.workers,
        http=ProtocolFactory(settings),  # type: ignore[arg-type]  # called as a class would be
        loop="auto",
        lifespan="on",
        log_config=configuration(level),
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies) or None,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.drain_s),
        backlog=1024,
    )
    with listening, _background(indexing):
        print(f"search page: {_address(listening)}  (Ctrl-C ends it)", flush=True)
        if settings.workers > 1:
            Multiprocess(config, [listening]).run()
            return 0
        signal.signal(signal.SIGTERM, lambda *_: None)  # what uvicorn puts back, and raises again, when it has drained
        server = uvicorn.Server(config)
        server.run([listening])
        return 0 if server.started else 2


def _listen(host: str, port: int) -> socket.socket:
    """Raises InputError for an address that cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{host}:{port}: cannot listen there ({said}); choose another --port or --host") from error
    return listening


def _address(listening: socket.socket) -> str:
    """To open in a browser."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


@contextlib.contextmanager
def _background(command: Sequence[str] | None) -> Iterator[None]:
    if command is None:
        yield
        return
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
