"""A way to a server that can be held up: connections stay open, what is sent is taken, and nothing arrives."""

from __future__ import annotations

import contextlib
import socket
import threading


class Stalling:
    """Listens on a port of its own and passes everything on to `port` of this machine, while `flowing` is set."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.flowing = threading.Event()
        self.flowing.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Stalling:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flowing.set()
        for one in (self._listener, *self._sockets):
            _end(one)

    def cut(self) -> None:
        """End the connections that there are; new ones are taken."""
        while self._sockets:
            _end(self._sockets.pop())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.flowing.wait()
                sink.sendall(data)
        _end(source)
        _end(sink)


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
