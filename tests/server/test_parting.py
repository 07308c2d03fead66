"""A listening socket that takes no more connections, and loses none that it has."""

from __future__ import annotations

import socket
import sys

import pytest

from dqe_engine.server.parting import Quiet, stop_taking, waiting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone filters what a listening socket takes")


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_has_come_is_taken_and_nobody_else_comes(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen(8)
        address = listening.getsockname()[:2]
        early = [socket.create_connection(address) for _ in range(3)]
        for one in early:
            one.sendall(b"hello")
        assert stop_taking(listening)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.2)
        quiet = Quiet(listening)
        assert (waiting(listening), quiet()) == (3, False)
        for _ in early:
            taken, _peer = listening.accept()
            assert taken.recv(5) == b"hello"
            taken.sendall(b"bye")
            taken.close()
        assert waiting(listening) == 0
    for one in early:
        with one:
            assert one.recv(3) == b"bye"


def test_it_is_quiet_once_nobody_waited_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now, came = [100.0], [2]
    monkeypatch.setattr("dqe_engine.server.parting.time.monotonic", lambda: now[0])
    monkeypatch.setattr("dqe_engine.server.parting.waiting", lambda listening: came[0])
    quiet = Quiet(socket.socket())
    said = []
    for came[0] in (2, 2, 0, 1, 0, 0, 0):
        now[0] += 0.06
        said.append(quiet())
    assert said == [False] * 5 + [True] * 2
    quiet, came[0] = Quiet(socket.socket()), 1
    now[0] += 10
    assert quiet()  # who is never taken does not keep it for ever
