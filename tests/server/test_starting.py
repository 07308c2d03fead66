"""Who comes while a server loads its models is told so at once, and never once it is ready."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
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


def tasks(process: int) -> set[int]:
    """Its threads."""
    return {int(task.name) for task in Path(f"/proc/{process}/task").iterdir()}


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

        own = os.getpriority(os.PRIO_PROCESS, 0)
        for worker, before in {worker: tasks(worker) for worker in server.pids()}.items():

            def begun(worker: int = worker, before: set[int] = before) -> set[int]:
                server.send("POST", "/v1/search", json={"text": "red"})
                return tasks(worker) - before

            until(begun, "its first search starts a thread")
            assert {os.getpriority(os.PRIO_PROCESS, task) for task in begun()} == {min(19, own + NICENESS)}
            assert os.getpriority(os.PRIO_PROCESS, worker) == own, "the event loop does not give way"
    finally:
        server.__exit__()
    assert server.process.returncode == 0
