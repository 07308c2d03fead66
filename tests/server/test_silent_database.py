"""A server whose Milvus says nothing: who asks is told in time, and whoever asks something else is not held up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.stalling import Stalling

from dqe_engine.index import GalleryIndex
from dqe_engine.server import service as services

pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'dqe-engine[milvus]'")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'dqe-engine[milvus]'")

Serve = Callable[..., TestClient]


@pytest.fixture
def way(shop: Path, tmp_path: Path) -> Iterator[Stalling]:
    """To a Milvus with the shop's items."""
    from milvus_lite.server_manager import server_manager_instance

    from dqe_engine.index.milvus import MilvusIndex

    with GalleryIndex.load(shop / "index") as index:
        MilvusIndex.create(str(tmp_path / "garments.db"), "garments", index).close()
    port = int(str(server_manager_instance.start_and_get_uri(str(tmp_path / "garments.db"))).rpartition(":")[2])
    with Stalling(port) as way:
        yield way
    server_manager_instance.release_all()


def place(way: Stalling, folder: Path, **options: Any) -> Path:
    milvus = {"uri": way.address, "collection": "garments", **options}
    file = folder / "shop.json"
    file.write_text(json.dumps({"kind": "index-elsewhere", "schema_version": 1, "milvus": milvus}))
    return file


def refused(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_what_needs_no_database_is_answered_meanwhile(serve: Serve, way: Stalling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More items are asked for than there are threads; the metrics are made in one."""
    monkeypatch.setattr(services, "WATCHED_EVERY", 600.0)
    client = serve(index=place(way, tmp_path), deadline_s=120.0)
    way.flowing.clear()
    with ThreadPoolExecutor(20) as others:
        asked = [others.submit(client.get, f"/v1/items/{n:02}.png") for n in range(0, 24, 2)]
        searches = [others.submit(client.post, "/v1/search", json={"reference_id": "02.png"}) for _ in range(3)]
        try:
            for path in ("/metrics", "/v1/vocabulary", "/readyz", "/healthz"):
                assert client.get(path).status_code == 200
            assert not any(one.done() for one in (*asked, *searches)), "else nothing was held up"
        finally:
            way.flowing.set()
        assert [one.result().status_code for one in (*asked, *searches)] == [200] * 15


def test_who_asks_is_told_in_time_and_it_comes_back(serve: Serve, way: Stalling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "WATCHED_EVERY", 0.2)
    client = serve(index=place(way, tmp_path), deadline_s=120.0)
    index = client.app.state.service.engine.attached  # type: ignore[attr-defined]
    before = client.post("/v1/search", json={"reference_id": "02.png"}).json()["hits"]
    assert index._timeout == 30, "the file's, which is less than half the deadline"
    index._timeout = index._calls.timeout = 0.2
    way.flowing.clear()
    for _ in range(2):
        assert refused(client.get("/v1/items/02.png")) == (503, "no_answer")
        assert refused(client.get("/v1/items/02.png/image")) == (503, "no_answer")
        assert refused(client.post("/v1/search", json={"reference_id": "02.png"})) == (503, "no_answer")
        assert refused(client.post("/v1/search", json={"text": "in red", "unlike": ["04.png"]})) == (503, "no_answer")
    until = time.monotonic() + 60
    while (ready := client.get("/readyz")).status_code != 503:
        assert time.monotonic() < until, ready.text
    index._timeout = index._calls.timeout = 60
    way.flowing.set()
    while client.get("/readyz").status_code != 200:  # by the server's own looks
        assert time.monotonic() < until
        time.sleep(0.02)
    assert client.get("/v1/items/02.png").status_code == 200
    assert client.post("/v1/search", json={"reference_id": "02.png"}).json()["hits"] == before


def test_a_read_has_the_servers_deadline(serve: Serve, way: Stalling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where many wait for a database that is slow rather than silent."""
    monkeypatch.setattr(services, "WATCHED_EVERY", 600.0)
    client = serve(index=place(way, tmp_path), deadline_s=120.0)
    service = client.app.state.service  # type: ignore[attr-defined]
    service._asking._deadline_s = 0.2
    way.flowing.clear()
    for path in ("/v1/items/02.png", "/v1/items/02.png/image"):
        assert refused(client.get(path)) == (504, "deadline")
    way.flowing.set()
    service._asking._deadline_s = 60
    assert client.get("/v1/items/02.png").status_code == 200
