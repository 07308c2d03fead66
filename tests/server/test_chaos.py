"""A server whose processes are killed, whose disk fills, whose index is swapped and whose clients misbehave: no wrong answer, and no
confirmed write lost."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.chaos import Clients, Oracle, Server, check_log, check_whole, children, command_of, name, picture, until
from support.chaos_drill import drill
from support.server import READ_KEY

from dqe_engine.bundle import Bundle
from dqe_engine.engine import RetrievalEngine
from dqe_engine.server.run import _WORKER_S
from dqe_engine.server.writes import make_index

pytestmark = pytest.mark.slow

ITEMS = 400
KILLS = 6


@pytest.fixture(scope="module")
def oracle(bundle_path: Path) -> Oracle:
    return Oracle(bundle_path, ITEMS)


@pytest.fixture
def folder(bundle_path: Path, tmp_path: Path) -> Path:
    """With an empty index in it."""
    make_index(Bundle.load(bundle_path), tmp_path / "index")
    return tmp_path


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("preloaded") / "misfortunes.so"
    source = Path(__file__).parent.parent / "support" / "misfortunes.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def fill(bundle: Path, index: Path, count: int) -> None:
    """An index of items 0 to `count` - 1."""
    with RetrievalEngine.load(bundle, provider="cpu", threads=1) as engine:
        found = engine.encode_images([picture(n) for n in range(count)])
        engine.index.add([name(n) for n in range(count)], found.target_tokens, found.image_tokens, [{"n": n} for n in range(count)])
        engine.save_index(index, overwrite=True)


def test_killed_workers_lose_nothing_that_was_confirmed(bundle_path: Path, tmp_path: Path, oracle: Oracle) -> None:
    done = drill(bundle_path, tmp_path, oracle, KILLS, seed=1)
    assert sum(kill.writing for kill in done) == KILLS // 2


def test_a_worker_that_dies_while_its_parent_asks_it_is_replaced_at_once(bundle_path: Path, folder: Path) -> None:
    with Server(bundle_path, folder) as server:
        victim = server.pids()[0]
        os.kill(victim, signal.SIGSTOP)
        time.sleep(2)  # the parent asks twice a second whether it lives, and waits
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in server.pids() and len(server.pids()) == 2, "another worker", seconds=_WORKER_S * 0.75)
        server.wait_until_ready()


def test_a_killed_parent_takes_its_workers_along(bundle_path: Path, folder: Path, oracle: Oracle) -> None:
    with Server(bundle_path, folder) as server:
        workers = server.pids()
        with Clients(server, oracle, breaks=(httpx.TransportError,)) as clients:
            clients.progress()
            server.process.kill()
            server.process.wait()
            until(lambda: not any(Path(f"/proc/{pid}").exists() and command_of(pid) for pid in workers), "workers end")
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", server.port))
            other.listen()
    with Server(bundle_path, folder, port=server.port) as server:
        check_whole(server, oracle, clients)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_answers_all_that_was_taken(bundle_path: Path, folder: Path, oracle: Oracle, workers: int) -> None:
    with Server(bundle_path, folder, workers=workers) as server:
        with Clients(server, oracle, breaks=(httpx.ConnectError,)) as clients:  # not one that was made is reset
            clients.progress()
            server.process.terminate()
            assert server.process.wait(120) == 0
        check_log(server)
    with Server(bundle_path, folder) as server:
        check_whole(server, oracle, clients)


def test_sighup_replaces_workers_under_load_and_no_request_fails(bundle_path: Path, folder: Path, oracle: Oracle) -> None:
    with Server(bundle_path, folder) as server:
        with Clients(server, oracle, refusals=()) as clients:
            for _ in range(2):
                clients.progress()
                before = set(server.pids())
                server.process.send_signal(signal.SIGHUP)
                until(lambda before=before: not before & set(server.pids()) and len(server.pids()) == 2, "both workers are replaced")
                server.wait_until_ready()
            clients.progress()
        check_whole(server, oracle, clients)
        check_log(server)


def test_a_full_disk_refuses_writes_and_nothing_else(bundle_path: Path, folder: Path, oracle: Oracle, preloaded: Path) -> None:
    flag = folder / "full"
    environment = {"LD_PRELOAD": str(preloaded), "FULL_FLAG": str(flag), "FULL_FOLDER": str(folder / "index")}
    with Server(bundle_path, folder, environment=environment) as server:
        with Clients(server, oracle, refusals=(429, 503, 507)) as clients:
            for _ in range(3):
                clients.progress()
                flag.touch()
                refused = clients.counts["507"] + 2
                until(lambda refused=refused: clients.errors or clients.counts["507"] >= refused, "writes are refused")
                clients.progress(3, 0)
                flag.unlink()
            clients.progress()
        check_whole(server, oracle, clients)
        check_log(server)
    with Server(bundle_path, folder) as server:
        check_whole(server, oracle, clients)


def test_a_published_index_is_taken_up_whole(bundle_path: Path, folder: Path, oracle: Oracle) -> None:
    for count in (10, 25):
        fill(bundle_path, folder / f"of {count}", count)
    shutil.rmtree(folder / "index")
    fill(bundle_path, folder / "index", 10)
    publish = [str(Path(sys.executable).with_name("dqe-index")), "publish"]
    with Server(bundle_path, folder) as server:
        with Clients(server, oracle, refusals=(), generations=(10, 25)) as clients:
            for count in (25, 10, 25):
                subprocess.run([*publish, str(folder / f"of {count}"), str(folder / "index")], check=True, capture_output=True)
                until(lambda count=count: (server.ready() or {})["items"] == count, "it is followed")
                clients.progress(5, 0)
        check_log(server)


@pytest.mark.parametrize("damage", ["removed", "manifest"])
def test_a_damaged_index_is_served_as_it_was(bundle_path: Path, folder: Path, oracle: Oracle, damage: str) -> None:
    shutil.rmtree(folder / "index")
    fill(bundle_path, folder / "index", 12)
    manifest = folder / "index" / "manifest.json"
    whole = manifest.read_bytes()
    with Server(bundle_path, folder) as server:
        with Clients(server, oracle, refusals=(), generations=(12,)) as clients:
            clients.progress(3, 0)
            if damage == "removed":
                (folder / "index").rename(folder / "aside")
            else:
                manifest.write_bytes(whole[:50] + b"\0" + whole[51:])
            until(lambda: (server.ready() or {}).get("following") is False, "it is noticed")
            clients.progress(5, 0)
            assert server.put(12).status_code >= 500
            if damage == "removed":
                (folder / "aside").rename(folder / "index")
            else:
                manifest.write_bytes(whole)
            until(lambda: all((server.ready() or {}).get("following") for _ in range(6)), "it is followed again")
        assert server.put(12).status_code == 201
        until(lambda: oracle.check(server.search().json()["hits"]) == set(range(13)), "both workers follow")


def test_a_clock_that_jumps_changes_nothing(bundle_path: Path, folder: Path, oracle: Oracle, preloaded: Path) -> None:
    clock = folder / "clock"
    clock.write_bytes(struct.pack("<q", 0))
    with Server(bundle_path, folder, "--rate", "10000", environment={"LD_PRELOAD": str(preloaded), "CLOCK_FILE": str(clock)}) as server:
        with Clients(server, oracle, refusals=()) as clients:
            for hours in (1, -24, 87_600, -87_600, 0):
                with clock.open("r+b") as stream:
                    stream.write(struct.pack("<q", hours * 3600))
                clients.progress()
        check_whole(server, oracle, clients)
        check_log(server)


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_a_thousand_slow_clients_hold_up_nobody(bundle_path: Path, folder: Path, oracle: Oracle) -> None:
    head = f"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {READ_KEY}\r\nContent-Length: 1000\r\n".encode()
    with Server(bundle_path, folder) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        for n, one in enumerate(slow):
            one.sendall((b"", head[:40], head[:60], head + b"\r\n")[n % 4])
        with Clients(server, oracle, refusals=()) as clients:
            for turn in range(3):
                for n, one in enumerate(slow):
                    if n % 4 == 2:
                        try:
                            one.sendall(head[60 + turn : 61 + turn])
                        except OSError:
                            continue  # it was dropped
                clients.progress()
        for one in slow:
            one.close()
        check_whole(server, oracle, clients)
        check_log(server)


def test_clients_that_leave_leave_nothing_behind(bundle_path: Path, folder: Path, oracle: Oracle) -> None:
    rng = random.Random(2)
    body = b'{"text": "the same but red", "k": 10000}'
    parts = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + picture(1) + b"\r\n--b--\r\n"
    with Server(bundle_path, folder) as server:
        with Clients(server, oracle) as clients:
            for n in range(300):
                sent, kind = (body, b"application/json") if n % 2 else (parts, b"multipart/form-data; boundary=b")
                head = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n" % READ_KEY.encode()
                whole = head + b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(sent), sent)
                with socket.create_connection(("127.0.0.1", server.port)) as leaving:
                    leaving.sendall(whole[: rng.randrange(len(whole)) if n % 3 else len(whole)])
                    if n % 5 == 0:
                        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                    time.sleep(rng.random() / 200)
            clients.progress()
        check_whole(server, oracle, clients)
        check_log(server)


def test_indexing_that_is_killed_goes_on_at_the_next_start(bundle_path: Path, tmp_path: Path, oracle: Oracle) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(150):
        (photos / f"{n:04}").write_bytes(picture(n))
    options = ("--images", f"item/={photos}", "--update")

    def indexing(server: Server) -> list[int]:
        return [pid for pid in children(server.process.pid) if "server.background" in command_of(pid)]

    def state(server: Server) -> str:
        return str((server.send("GET", "/v1/status").json()["indexing"] or {}).get("state"))

    with Server(bundle_path, tmp_path, *options) as server:
        for pid in indexing(server):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not indexing(server), "it is gone")
        assert server.search().status_code == 200
    with Server(bundle_path, tmp_path, *options) as server:
        until(lambda: state(server) == "done", "all are indexed")
        until(lambda: all((server.ready() or {})["items"] == 150 for _ in range(6)), "they are found")
        assert server.picture(7).status_code == 200
