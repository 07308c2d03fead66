"""Who comes while a server loads its models is told so at once, and never once it is ready."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.chaos import Server, until

from dqe_engine.bundle import Bundle
from dqe_engine.server.app import NICENESS
from dqe_engine.server.settings import ServerSettings
from dqe_engine.server.starting import starting, take_over
from dqe_engine.server.writes import make_index


@pytest.fixture
def settings(make_settings: Callable[..., ServerSettings], tmp_path: Path) -> ServerSettings:
    (tmp_path / "state").mkdir()
    return make_settings(state=tmp_path / "state")


def test_it_answers_until_a_worker_takes_over(settings: ServerSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, starting(settings, listening):
        address = listening.getsockname()
        with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=60) as client:
            ready = client.get("/readyz", headers={"X-Request-ID": "mine"})
            assert (ready.status_code, ready.json()["error"]["code"], ready.headers["Retry-After"]) == (503, "starting", "1")
            assert (ready.headers["X-Request-ID"], "Refresh" in ready.headers) == ("mine", False)
            assert client.get("/").headers["Refresh"] == "1"
            assert client.post("/v1/search", json={"text": "red"}).status_code == 503
            assert client.head("/readyz").content == b""
            assert client.get("/healthz").json() == {"status": "ok"}
        for _ in range(2):  # workers
            take_over(settings.state)
        with socket.create_connection(address), listening.accept()[0]:  # by nobody else
            pass


def test_it_ends_with_a_server_that_never_was_ready(settings: ServerSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with starting(settings, listening), socket.create_connection(listening.getsockname()):
            pass
        take_over(settings.state)
        with socket.create_connection(listening.getsockname()), listening.accept()[0]:
            pass


@pytest.mark.parametrize("workers", [1, 2])
def test_who_has_seen_it_ready_meets_nobody_who_starts(bundle_path: Path, tmp_path: Path, workers: int) -> None:
    make_index(Bundle.load(bundle_path), tmp_path / "index")
    server, told = Server(bundle_path, tmp_path, workers=workers), set()
    try:
        while (answer := server.send("GET", "/readyz")).status_code != 200:
            told.add((answer.status_code, answer.json()["error"]["code"]))
        assert told == {(503, "starting")}
        assert {server.send("GET", "/readyz").status_code for _ in range(100)} == {200}

        def has_given_way(worker: int) -> bool:
            """The thread that searches has, which the first search starts."""
            server.send("POST", "/v1/search", json={"text": "red"})
            tasks = [int(task.name) for task in Path(f"/proc/{worker}/task").iterdir()]
            return min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS) in [os.getpriority(os.PRIO_PROCESS, task) for task in tasks]

        for worker in server.pids():
            until(partial(has_given_way, worker), "a thread gives way")
            assert os.getpriority(os.PRIO_PROCESS, worker) == os.getpriority(os.PRIO_PROCESS, 0)  # the event loop's does not
    finally:
        server.__exit__()
    assert server.process.returncode == 0
