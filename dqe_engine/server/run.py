"""`serve`: uvicorn with this application, in one process or in several workers, until SIGTERM or Ctrl-C.

SIGHUP replaces workers one by one, by ones with the settings of now. A server without workers has nobody to answer meanwhile, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from dqe_engine.errors import DQEError, InputError

from .app import create_app
from .logs import configuration
from .parting import Quiet, stop_taking
from .protocol import ProtocolFactory
from .settings import ServerSettings
from .starting import starting

log = logging.getLogger("dqe_engine.server")
_BACKLOG = 1024
_ACCEPTED_AT_ONCE = 32
"""Handles of the listening socket in each process. uvloop accepts one connection a turn of its loop from each: where turns are long because
there is much to do, new clients would wait for seconds, one behind the other."""
_WORKER_S = 60
"""Seconds for a worker to import and load everything, and to say that it lives: on a busy machine, uvicorn's five are too few, and a worker
that is killed for it is started again and again."""


def serve(
    settings: ServerSettings,
    *,
    indexing: Sequence[str] | None = None,
    again: Callable[[], ServerSettings] | None = None,
) -> int:
    """Listen and answer. Returns the exit code: 0 after SIGTERM, 2 where it cannot start.

    indexing: command of a process that fills the index meanwhile, and is ended with
    the server. again: the settings of workers that are made after SIGHUP; what it raises is logged, and all stays as it was. Raises
    InputError for an address that cannot be had.
    """
    listening = _listen(settings.host, settings.port)
    config = uvicorn.Config(
        partial(create_app, settings, owns_process=True),
        factory=True,
        workers=settings.workers,
        http=ProtocolFactory(settings),  # type: ignore[arg-type]  # called as a class would be
        loop="auto",
        lifespan="on",
        log_config=configuration(settings.log),
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies) or None,
        ws="none",
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
        timeout_worker_healthcheck=_WORKER_S,
        backlog=_BACKLOG,
    )
    with contextlib.ExitStack() as opened:
        opened.enter_context(listening)
        sockets = [listening, *(opened.enter_context(listening.dup()) for _ in range(_ACCEPTED_AT_ONCE - 1))]
        opened.enter_context(starting(settings, listening))
        opened.enter_context(_background(indexing))
        print(f"search page: {_address(listening)}  (Ctrl-C ends it)", flush=True)
        if settings.workers > 1:
            workers = _Workers(config, sockets, again or (lambda: settings))
            workers.run()
            return 2 if workers.failed else 0
        signal.signal(signal.SIGTERM, lambda *_: None)  # what uvicorn puts back, and raises again, when it has drained
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        server = _Server(config)
        try:
            server.run(sockets)
        except SystemExit:  # uvicorn's, after a start that failed
            return 2
        return 0 if server.started else 2


class _Server(uvicorn.Server):
    """The only process: it answers all who came before it stops listening."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if sockets and stop_taking(sockets[0]):
            quiet = Quiet(sockets[0])
            while not quiet() and not self.force_exit:
                await asyncio.sleep(0.01)
        await super().shutdown(sockets)


class _Workers(Multiprocess):
    """uvicorn's workers, which SIGHUP replaces by ones with other settings."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], again: Callable[[], ServerSettings]) -> None:
        super().__init__(config, sockets)
        self._again = again

    @property
    def failed(self) -> bool:
        """Whether a worker could not start, which ends the others as well."""
        return any(process.exitcode == STARTUP_FAILURE for process in self.processes)

    def keep_subprocess_alive(self) -> None:
        for process in self.processes:
            process.child_conn.close()  # the worker's end: while the parent has it too, the death of one that is asked goes unseen
        super().keep_subprocess_alive()

    def terminate_all(self) -> None:
        if stop_taking(self.sockets[0]):
            quiet = Quiet(self.sockets[0])
            while not quiet() and any(process.process.is_alive() for process in self.processes):  # else nobody takes them
                time.sleep(0.01)
        for listening in self.sockets:  # else who connects while the workers drain waits for nobody
            listening.close()
        super().terminate_all()

    def handle_hup(self) -> None:
        try:
            settings = self._again()
        except (DQEError, OSError) as error:
            log.error("SIGHUP: the workers keep running as they are: %s", error)
            return
        self.config.app = partial(create_app, settings, owns_process=True)
        self.config.http = ProtocolFactory(settings)  # type: ignore[assignment]  # as above
        super().handle_hup()


def _listen(host: str, port: int) -> socket.socket:
    """Raises InputError for an address that cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # now: else two servers that start together both get the port, and one of them no request
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
