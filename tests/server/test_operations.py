"""What docs/operations.md and the files beside it say of the server: metrics that there are, options that there are, signals that work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from starlette.testclient import TestClient
from support.samples import noise_image
from support.serving import serving
from support.signals import hangups_heard  # noqa: F401 (used by every test here)

from dqe_engine.cli.serve import build_parser, main
from dqe_engine.server import service as services
from dqe_engine.server.metrics import MEDIA_TYPE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "operations"
KEYS = ("first-key-of-a-shop", "second-key-of-a-shop")


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bdqe_[a-z_]+", expression))


@pytest.fixture
def told(serve: Callable[..., TestClient]) -> str:
    """The metrics of a server that has met every kind of request."""
    from io import BytesIO

    client, png = serve(), BytesIO()
    noise_image(1).save(png, "PNG")
    assert client.post("/v1/search", files={"image": ("a.png", png.getvalue())}).status_code == 200
    assert client.post("/v1/search", json={"text": "red"}).status_code == 200
    assert client.delete("/v1/items/01.png").status_code == 403
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == MEDIA_TYPE
    return answer.text


def test_every_metric_of_rules_board_and_page_is_given(told: str) -> None:
    given = set(re.findall(r"^(dqe_[a-z_]+)", told, re.MULTILINE))
    rules = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((FOLDER / "grafana.json").read_text())
    expressions = [rule["expr"] for rule in alerts] + [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = set().union(*map(names_in, expressions))
    assert len(asked) > 10
    assert asked <= given, f"not given: {asked - given}"
    page = (ROOT / "docs" / "operations.md").read_text()
    families = set(re.findall(r"^# TYPE (dqe_\w+)", told, re.MULTILINE))
    assert {family for family in families if f"`{family}" not in page} == set(), "the page names every metric"
    assert all(rule["alert"] in page for rule in alerts)
    grid = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(grid)) == len(grid)


def test_the_commands_of_the_files_are_parsed(tmp_path: Path) -> None:
    parser = build_parser()
    unit = (FOLDER / "dqe-serve.service").read_text()
    command = re.search(r"^ExecStart=\S+/dqe-serve (.*)$", unit, re.MULTILINE)
    assert command
    assert parser.parse_args(shlex.split(command[1])).workers == 2
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert parser.parse_args(compose["services"]["serve"]["command"]).host == "0.0.0.0"
    default = re.search(r"^CMD (\[\"/data.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default
    assert parser.parse_args(json.loads(default[1])).index == Path("/data/index")
    for volume in (one for service in compose["services"].values() for one in service.get("volumes", ())):
        source = volume.split(":")[0]
        assert not source.startswith("./docs") or (ROOT / source).is_file(), source


@pytest.fixture
def shop_copy(shop: Path, tmp_path: Path) -> Path:
    shutil.copytree(shop / "index", tmp_path / "index")
    return tmp_path


@pytest.fixture
def arguments(bundle_path: Path, shop_copy: Path) -> list[str]:
    return [str(bundle_path), str(shop_copy / "index"), "--provider", "cpu", "--threads", "1"]


@pytest.mark.slow
def test_sighup_replaces_workers_and_keys_while_requests_are_answered(arguments: list[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"read {KEYS[0]} shop\n")
    failed: list[Any] = []
    ended, in_use = threading.Event(), KEYS[0]

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                try:
                    status = client.post("/v1/search", json={"text": "red", "k": 1}, headers={"X-API-Key": in_use}).status_code
                    if status != 200:
                        failed.append(status)
                except httpx.TransportError as error:
                    failed.append(repr(error))
                time.sleep(0.02)

    with serving([*arguments, "--workers", "2", "--keys", str(keys)], tmp_path) as server:
        client = httpx.Client(base_url=server.url, timeout=60)

        def workers() -> set[str]:
            text = client.get("/metrics", headers={"X-API-Key": in_use}).text
            return set(re.findall(r'dqe_process_start_time_seconds\{worker="(\d+)"\}', text))

        asking = [threading.Thread(target=ask, args=(server.url,)) for _ in range(3)]
        for thread in asking:
            thread.start()
        try:
            for written, used in ((KEYS, KEYS[0]), (KEYS[1:], KEYS[1])):
                in_use = used
                while len(before := workers()) != 2:  # the second may still be starting
                    time.sleep(0.2)
                keys.write_text("".join(f"read {key} shop\n" for key in written))
                server.process.send_signal(signal.SIGHUP)
                until = time.monotonic() + 120
                while len(now := workers()) != 2 or now & before:
                    assert time.monotonic() < until, server.said
                    time.sleep(0.2)
                if written == KEYS:
                    in_use = KEYS[1]
            assert client.get("/v1/items", headers={"X-API-Key": KEYS[0]}).status_code == 401
            keys.write_text("nonsense\n")
            before = workers()
            server.process.send_signal(signal.SIGHUP)
            time.sleep(2)
            assert workers() == before
            assert "the workers keep running as they are" in server.said
        finally:
            ended.set()
            for thread in asking:
                thread.join()
        client.close()
        assert failed == []
        assert server.end() == 0


def is_listening(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_in_flight_is_answered_before_the_end(arguments: list[str], tmp_path: Path, sent: int) -> None:
    body = b'{"text": "red"}'
    head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with serving(arguments, tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 30) as connection:
            connection.sendall(head)
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n", "the request is in flight"
            server.process.send_signal(sent)
            until = time.monotonic() + 120
            while is_listening(port):
                assert time.monotonic() < until, server.said
                time.sleep(0.02)
            connection.sendall(body)
            answer = b""
            while received := connection.recv(65536):
                answer += received
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        assert server.process.wait(120) == 0


def test_a_port_belongs_to_one_server(arguments: list[str], tmp_path: Path) -> None:
    with serving(arguments, tmp_path) as server:
        port = server.url.rpartition(":")[2]
        command = [str(Path(sys.executable).with_name("dqe-serve")), *arguments, "--port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert "cannot listen there" in second.stderr


def test_workers_that_cannot_start_end_the_server(arguments: list[str], bundle_path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_path, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    for count in ("1", "2"):
        command = [str(Path(sys.executable).with_name("dqe-serve")), str(damaged), *arguments[1:], "--port", "0", "--workers", count]
        assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode != 0


def test_without_keys_others_are_warned_of(arguments: list[str], tmp_path: Path) -> None:
    environment = {"LC_ALL": "C", "HOME": "", "PATH": os.defpath}
    with serving([*arguments, "--host", "0.0.0.0"], tmp_path, environment=environment) as server:
        assert server.said.startswith("warning: --host 0.0.0.0 without keys: ")
    with serving(arguments, tmp_path) as server:
        assert "warning: --host" not in server.said


def test_help_needs_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "docs/operations.md" in capsys.readouterr().out


def test_an_index_that_is_to_be_made_of_photos_takes_one_option_more(
    bundle_path: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle_path), str(tmp_path / "new"), "--images", str(shop / "photos")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'new'}: no index here; add --update to make it of the photos in --images\n"
    assert not (tmp_path / "new").exists()


def test_a_worker_whose_parent_went_while_it_started_ends(serve: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has another parent from the beginning."""
    ended = threading.Event()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: (sent.append((process, number)), ended.set()))
    monkeypatch.setattr(services, "parent_process", lambda: SimpleNamespace(pid=os.getppid() + (1 << 22)))
    serve(workers=2)
    assert ended.wait(60)
    assert sent == [(os.getpid(), signal.SIGTERM)]
