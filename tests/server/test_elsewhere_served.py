"""`dqe-serve` over Milvus Lite and over shards on Ray, and the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.server import WRITE_KEY, bearer
from support.serving import serving

from dqe_engine.cli import serve as serve_command
from dqe_engine.client import Client, ServerError
from dqe_engine.errors import NoAnswerError
from dqe_engine.index import GalleryIndex
from dqe_engine.index.shard_files import cut_index, read_shards
from dqe_engine.server import service as services
from dqe_engine.server.settings import Key

Serve = Callable[..., TestClient]


def described(path: Path, **places: Any) -> Path:
    path.write_text(json.dumps({"kind": "index-elsewhere", "schema_version": 1, **places}))
    return path


def told(client: TestClient, query: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v1/search", json=query)
    assert answer.status_code == 200, answer.text
    return {name: answer.json()[name] for name in ("hits", "zones", "exact", "lost")}


def refused(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.fixture
def collection(shop: Path, tmp_path: Path) -> Iterator[Path]:
    """The file of a collection of the shop's items."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'dqe-engine[milvus]'")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: pip install 'dqe-engine[milvus]'")
    from milvus_lite.server_manager import server_manager_instance

    from dqe_engine.index.milvus import MilvusIndex

    with GalleryIndex.load(shop / "index") as index:
        MilvusIndex.create(str(tmp_path / "garments.db"), "garments", index).close()
    yield described(tmp_path / "milvus.json", milvus={"uri": "garments.db", "collection": "garments"})
    server_manager_instance.release_all()


def test_a_collection_answers_as_the_index(serve: Serve, collection: Path, keys: tuple[Key, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from dqe_engine.index.milvus import MilvusIndex

    monkeypatch.setattr(services, "WATCHED_EVERY", 0.05)
    single, client, reader = serve(), serve(index=collection), bearer(WRITE_KEY)
    for query in (
        {"text": "in red", "k": 30, "zones": True, "explain": True},
        {"text": "in red", "filter": {"colour": "green", "price": {">": 5}}},
        {"reference_id": "02.png", "unlike": ["04.png", "sub/21.png"], "k": 7, "offset": 2, "weights": {}},
    ):
        assert told(client, query) == told(single, query), query
    assert client.get("/v1/items/sub%2F21.png").json()["metadata"] == single.get("/v1/items/sub%2F21.png").json()["metadata"]
    assert client.get("/v1/items/sub%2F21.png/image").content == single.get("/v1/items/sub%2F21.png/image").content
    assert refused(client.get("/v1/items/nothing")) == (404, "unknown_item")
    assert refused(client.post("/v1/search", json={"reference_id": "nothing"})) == (404, "unknown_item")
    for query in ({"reference_id": "02.png", "text": "in red"}, {"text": "in red", "filter": {"colour": "red"}, "zones": True}):
        assert refused(client.post("/v1/search", json=query)) == (422, "invalid")
    keyed = serve(index=collection, keys=keys)
    for answer in (keyed.get("/v1/items", headers=reader), keyed.get("/v1/facets", headers=reader)):
        assert (*refused(answer), answer.headers["allow"]) == (405, "not_offered", "")
    answer = keyed.delete("/v1/items/02.png", headers=reader)
    assert (*refused(answer), answer.headers["allow"]) == (405, "not_offered", "GET")
    vocabulary = client.get("/v1/vocabulary").json()
    assert (vocabulary["offers"], vocabulary["index"]) == ([], {"items": 24, "revision": None})
    assert sorted(path for path in client.get("/openapi.json").json()["paths"] if path.startswith("/v1/items")) == [
        "/v1/items/{id}", "/v1/items/{id}/image"
    ]  # fmt: skip

    asked = MilvusIndex.asked

    def away(self: MilvusIndex, *arguments: Any, **options: Any) -> Any:
        raise NoAnswerError("Milvus is away")

    monkeypatch.setattr(MilvusIndex, "asked", away)
    assert refused(client.post("/v1/search", json={"text": "in red"})) == (503, "no_answer")
    assert refused(client.get("/v1/items/02.png")) == (503, "no_answer")
    until(lambda: client.get("/readyz").status_code == 503)
    monkeypatch.setattr(MilvusIndex, "asked", asked)
    until(lambda: client.get("/readyz").status_code == 200)
    assert told(client, {"text": "in red"}) == told(single, {"text": "in red"})


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 600  # only so that a test which will never pass ends: Ray takes minutes for an actor on a busy machine
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_actors_answer_as_the_index_and_come_back(
    serve: Serve, shop: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(services, "WATCHED_EVERY", 0.1)
    with GalleryIndex.load(shop / "index") as index:
        cut_index(index, tmp_path / "shards", 2)
    place = described(tmp_path / "ray.json", shards={"path": "shards", "on_loss": "partial", "timeout": 300.0})
    single, client = serve(), serve(index=place, deadline_s=600.0)  # a shard that is late is no lost one here
    for query in (
        {"text": "in red", "k": 24, "zones": True, "filter": {"price": {">": 2}}},
        {"reference_id": "sub/23.png", "text": "in red", "explain": True, "unlike": ["02.png"]},
    ):
        assert told(client, query) == told(single, query), query
    assert client.get("/v1/items?limit=20").json()["items"] == single.get("/v1/items?limit=20").json()["items"]
    transport = client.app.state.service.engine.searched._transport  # type: ignore[attr-defined]
    ray.kill(transport.actor(1), no_restart=True)
    partial = told(client, {"text": "in red", "k": 24})
    if partial["lost"]:  # else the server's own look has started another by now
        assert (partial["exact"], partial["lost"]) == (False, [read_shards(tmp_path / "shards").shards[1].name])
    until(lambda: told(client, {"text": "in red", "k": 24}) == told(single, {"text": "in red", "k": 24}))
    until(lambda: client.get("/readyz").json()["lost"] == [])


def test_the_command_serves_a_sharded_folder(bundle_path: Path, shop: Path, tmp_path: Path) -> None:
    """Two workers, each with maps of the same files, which follow a cut."""
    with GalleryIndex.load(shop / "index") as index:
        cut_index(index, tmp_path / "shards", 2)
        options = ["--images", str(shop / "photos"), "--provider", "cpu", "--threads", "1", "--workers", "2"]
        with serving([str(bundle_path), str(tmp_path / "shards"), *options], tmp_path) as server, Client(server.url) as client:
            assert len(client.search(text="in red", k=24).hits) == 24
            assert len(list(client.items({"colour": "red"}, page=3))) == 8
            assert client.image("00.png", size=160)
            assert client.vocabulary().offers == ("list", "refine", "filtered_zones")
            with pytest.raises(ServerError) as caught:
                client.facets()
            assert (caught.value.status, caught.value.code) == (405, "not_offered")
            index.remove(["00.png"])
            index.save(tmp_path / "whole")
            cut_index(index, tmp_path / "shards", 2, anew=True)
            revision = read_shards(tmp_path / "shards").revision
            until(lambda: all(client.vocabulary().index.revision == revision for _ in range(8)))
            assert len(client.search(text="in red", k=24).hits) == 23
            assert server.end() == 0
        assert "Traceback" not in server.said


def test_a_start_without_a_shard_is_one_line(bundle_path: Path, shop: Path, tmp_path: Path) -> None:
    with GalleryIndex.load(shop / "index") as index:
        gone = cut_index(index, tmp_path / "shards", 2).shards[1].name
    shutil.rmtree(tmp_path / "shards" / gone)
    command = [
        str(Path(sys.executable).with_name("dqe-serve")),
        str(bundle_path),
        str(tmp_path / "shards"),
        "--port",
        "0",
        "--log",
        "error",
    ]
    for workers in ("1", "2"):
        ended = subprocess.run([*command, "--workers", workers], capture_output=True, text=True, timeout=120)
        said = [json.loads(line)["message"] for line in ended.stderr.splitlines() if line.startswith("{")]
        assert ended.returncode == 2
        assert said[0].startswith(f"shard {gone} of 2 gave no answer, so the search has no answer (")
        assert "Traceback" not in ended.stderr


def test_what_the_command_refuses(
    bundle_path: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with GalleryIndex.load(shop / "index") as index:
        cut = cut_index(index, tmp_path / "shards", 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    actors = described(tmp_path / "ray.json", shards={"path": "shards", "name": "shop"})
    (tmp_path / "garments.db").touch()
    lite = described(tmp_path / "lite.json", milvus={"uri": "garments.db", "collection": "garments"})
    here = described(tmp_path / "here.json", shards={"path": "shards", "actors": False, "name": "shop"})
    photos = ["--images", str(shop / "photos")]
    for arguments, says in (
        ([tmp_path / "shards", *photos, "--update"], "--update: "),
        ([actors, "--workers", "2"], "each of 2 workers would start actors of its own; give the file a name"),
        ([lite, "--workers", "2"], "Milvus Lite's file serves one process; leave --workers out"),
        ([here], 'name and threads are of actors; leave them out beside "actors": false'),
        ([described(tmp_path / "none.json", shards={"path": "none"})], "no sharded index here"),
        ([described(tmp_path / "no.json", milvus={"uri": "no.db", "collection": "c"})], "milvus.uri: no such file"),
    ):
        assert serve_command.main([str(bundle_path), *map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    other = json.loads((tmp_path / "shards" / "shards.json").read_text()) | {"model_hash": "f" * len(cut.model_hash)}
    (tmp_path / "shards" / "shards.json").write_text(json.dumps(other))
    assert serve_command.main([str(bundle_path), str(tmp_path / "shards")]) == 2
    assert "was made with model ffffffffffff" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "no.db")
