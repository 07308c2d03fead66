"""`dqe-serve` over shards: the single index's answers, what it does not offer, and shards that are lost, hang, or are cut anew under it."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY, bearer

from dqe_engine.engine import RetrievalEngine
from dqe_engine.index import GalleryIndex
from dqe_engine.index.shard_files import SHARDS_FILE, cut_index, read_shards
from dqe_engine.index.shard_server import ShardServer
from dqe_engine.index.sharded import ShardedIndex
from dqe_engine.index.transports import Call, HereTransport, Lost
from dqe_engine.server import service as serving
from dqe_engine.server.service import Service
from dqe_engine.server.settings import Key

Serve = Callable[..., TestClient]
QUERIES: tuple[dict[str, Any], ...] = (
    {"text": "in red", "k": 5},
    {"text": "in red", "k": 24, "zones": True},  # more than a shard has
    {"reference_id": "00.png"},
    {"reference_id": "sub/23.png", "text": "in red", "weights": {"colour": 2.0}, "zones": True, "explain": True},
    {"reference_id": "02.png", "text": "in red", "unlike": ["04.png", "sub/21.png"], "explain": True, "offset": 3, "k": 4},
    {"text": "in red", "filter": {"colour": "green"}, "zones": True},
    {"text": "in red", "filter": {"price": {"<": 3}}, "k": 10},  # in the first shard alone
    {"text": "in red", "filter": {"colour": "none"}},
    {"text": "in red", "exclude": ["00.png", "sub/01.png"], "minimum_score": -1.0, "absolute_weights": {"colour": 0.0}},
)


@pytest.fixture
def shards(shop: Path, tmp_path: Path) -> Path:
    """The shop's index, in two shards of 12 items."""
    with GalleryIndex.load(shop / "index") as index:
        cut_index(index, tmp_path / "shards", 2)
    return tmp_path / "shards"


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def described(shards: Path, **options: Any) -> Path:
    """A file that says how the shards are opened, in the process."""
    place = {"path": str(shards), "actors": False, **options}
    file = shards.with_name("shop.json")
    file.write_text(json.dumps({"kind": "index-elsewhere", "schema_version": 1, "shards": place}))
    return file


def told(client: TestClient, query: dict[str, Any], image: bytes | None = None) -> dict[str, Any]:
    """What an answer says of the items."""
    if image is None:
        answer = client.post("/v1/search", json=query)
    else:
        answer = client.post("/v1/search", files={"image": ("a.png", image)}, data={"query": json.dumps(query)})
    assert answer.status_code == 200, answer.text
    return {name: answer.json()[name] for name in ("hits", "zones", "weights", "exact", "lost")}


def service_of(client: TestClient) -> Service:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    return service


def error_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Slots that give no answer, as long as they are in this set."""
    slots, ask = set[int](), HereTransport.ask

    def asked(self: HereTransport, calls: Sequence[Call], timeout: float) -> list[Any]:
        gone = set(slots)  # of this moment: another thread may change it
        given = iter(ask(self, [call for call in calls if call[0] not in gone], timeout))
        return [Lost("switched off") if slot in gone else next(given) for slot, _ in calls]

    monkeypatch.setattr(HereTransport, "ask", asked)
    return slots


def test_every_search_is_the_single_indexs(serve: Serve, shards: Path) -> None:
    single, sharded = serve(), serve(index=shards)
    for query in QUERIES:
        assert told(sharded, query) == told(single, query), query
    photo = png(noise_image(5))
    for query in ({"text": "in red", "filter": {"sale": False}, "k": 20}, {}):
        assert told(sharded, query, photo) == told(single, query, photo)
    assert single.get("/v1/items/00.png").json() == sharded.get("/v1/items/00.png").json()
    path = "/v1/items/sub%2F23.png/image?size=160"
    assert sharded.get(path).content == single.get(path).content
    for client in (single, sharded):
        assert error_of(client.get("/v1/items/nothing")) == (404, "unknown_item")
        assert error_of(client.get("/v1/items/nothing/image")) == (404, "unknown_item")
        for query in ({"reference_id": "nothing"}, {"text": "in red", "unlike": ["00.png", "nothing"]}):
            assert error_of(client.post("/v1/search", json=query)) == (404, "unknown_item")
        assert error_of(client.post("/v1/search", json={"text": "in red", "filter": {"price": {"like": 1}}})) == (422, "invalid")


@pytest.mark.parametrize("limit", [1, 5, 12, 13, 24, 100])
@pytest.mark.parametrize("filter", [None, {"colour": "red"}, {"price": {">": 12}}, {"sale": True}, {"colour": "none"}])
def test_items_are_listed_in_their_order(filter: Any, limit: int, serve: Serve, shards: Path) -> None:
    """Pages that end with a shard, and shards that have nothing of a page."""

    def pages(client: TestClient) -> list[tuple[list[Any], int, bool]]:
        found, after = [], None
        while True:
            given = {"limit": limit, "filter": None if filter is None else json.dumps(filter), "after": after}
            answer = client.get("/v1/items", params={name: value for name, value in given.items() if value is not None}).json()
            found.append((answer["items"], answer["total"], answer["next"] is None))
            if (after := answer["next"]) is None:
                return found

    assert pages(serve(index=shards)) == pages(serve())


def test_what_shards_do_not_offer_is_one_problem(serve: Serve, shards: Path, keys: tuple[Key, ...]) -> None:
    item = {"image": ("a.png", png(noise_image(1)), "image/png"), "item": (None, json.dumps({"id": "new.png"}))}
    for options, headers in (({}, {}), ({"keys": keys}, bearer(WRITE_KEY))):
        client = serve(index=shards, **options)
        answers = {
            "/v1/facets": client.get("/v1/facets", headers=headers),
            "add": client.post("/v1/items", files=item, headers=headers),
            "change": client.patch("/v1/items/00.png", json={"metadata": None}, headers=headers),
            "remove": client.delete("/v1/items/sub%2F01.png", headers=headers),
        }
        for name, answer in answers.items():
            assert error_of(answer) == (405, "not_offered"), name
            assert answer.headers["allow"] == ("" if name == "/v1/facets" else "GET"), name
            assert "the index of this server does not offer that: " in answer.json()["error"]["message"]
        assert "run dqe-index shard again" in answers["add"].json()["error"]["message"]
        vocabulary = client.get("/v1/vocabulary", headers=headers).json()
        assert (vocabulary["offers"], vocabulary["writes"]) == (["list", "refine", "filtered_zones"], False)
        paths = client.get("/openapi.json").json()["paths"]
        assert "/v1/facets" not in paths
        assert {path: list(methods) for path, methods in paths.items() if path.startswith("/v1/items")} == {
            "/v1/items": ["get"], "/v1/items/{id}": ["get"], "/v1/items/{id}/image": ["get"]
        }  # fmt: skip
        if headers:
            assert [client.put(path, headers=headers).headers["allow"] for path in ("/v1/items/00.png", "/v1/facets")] == ["GET", ""]
    keyed = serve(index=shards, keys=keys)
    assert error_of(keyed.delete("/v1/items/00.png")) == (401, "key_needed")
    assert error_of(keyed.delete("/v1/items/00.png", headers=bearer(READ_KEY))) == (403, "may_not_write")
    whole = serve(keys=keys)
    assert len(whole.get("/openapi.json").json()["paths"]["/v1/items"]) == 2
    assert whole.get("/v1/vocabulary", headers=bearer(READ_KEY)).json()["offers"] == ["list", "facets", "write", "refine", "filtered_zones"]


def test_an_index_without_image_tokens_says_so(bundle_path: Path, shop: Path, tmp_path: Path, serve: Serve) -> None:
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        index = engine.new_index(image_storage="none")
        engine.index_images(shop / "photos")
        engine.save_index(tmp_path / "bare")
        cut_index(index, tmp_path / "shards", 2)
    for place in ("bare", "shards"):
        client = serve(index=tmp_path / place)
        assert "refine" not in client.get("/v1/vocabulary").json()["offers"]
        assert client.post("/v1/search", json={"reference_id": "00.png"}).status_code == 200
        assert error_of(client.post("/v1/search", json={"reference_id": "00.png", "text": "in red"})) == (422, "invalid")


def test_a_lost_shard_is_told_and_comes_back(serve: Serve, shards: Path, lost: set[int]) -> None:
    client, name = serve(index=described(shards, on_loss="partial")), read_shards(shards).shards[1].name
    whole = told(client, {"text": "in red", "k": 24})
    first = [item["id"] for item in client.get("/v1/items?limit=12").json()["items"]]
    assert (metric(client, "dqe_index_parts"), metric(client, "dqe_index_parts_lost")) == (2, 0)
    lost.add(1)
    partial = told(client, {"text": "in red", "k": 24})
    assert (partial["exact"], partial["lost"], len(partial["hits"])) == (False, [name], 12)
    assert [hit["id"] for hit in partial["hits"]] == [hit["id"] for hit in whole["hits"] if hit["id"] in first]
    assert metric(client, 'dqe_incomplete_answers_total{reason="lost"}') == 1
    assert told(client, {"reference_id": "00.png", "text": "in red", "zones": True, "explain": True})["lost"] == [name]
    for query in ({"reference_id": "sub/23.png"}, {"reference_id": "nothing"}, {"text": "in red", "unlike": ["sub/23.png"]}):
        answer = client.post("/v1/search", json=query)
        assert (*error_of(answer), answer.headers["retry-after"]) == (503, "no_answer", "5"), query
    for path in ("/v1/items/sub%2F23.png", "/v1/items/nothing", "/v1/items", "/v1/items/sub%2F23.png/image"):
        assert error_of(client.get(path)) == (503, "no_answer"), path
    assert client.get("/v1/items/00.png/image").status_code == 200
    service_of(client)._look_at_parts()
    assert client.get("/readyz").json()["lost"] == [name]
    assert metric(client, "dqe_index_parts_lost") == 1
    lost.add(0)
    assert error_of(client.post("/v1/search", json={"text": "in red"})) == (503, "no_answer")
    service_of(client)._look_at_parts()
    assert error_of(client.get("/readyz")) == (503, "no_answer")
    lost.clear()
    service_of(client)._look_at_parts()
    assert client.get("/readyz").json()["lost"] == []
    assert told(client, {"text": "in red", "k": 24}) == whole


def test_without_a_choice_a_lost_shard_is_an_error(serve: Serve, shards: Path, lost: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "WATCHED_EVERY", 0.02)
    client, name = serve(index=shards), read_shards(shards).shards[0].name
    lost.add(0)
    answer = client.post("/v1/search", json={"text": "in red"})
    assert error_of(answer) == (503, "no_answer")
    assert answer.json()["error"]["message"] == f"part {name} of the index gives no answer, so there is none; ask again in a moment"
    until = time.monotonic() + 60
    while client.get("/readyz").status_code != 503:  # by the server's own looks
        assert time.monotonic() < until
        time.sleep(0.01)
    lost.clear()
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert told(client, {"text": "in red"})["exact"]
    with monkeypatch.context() as broken:
        broken.setattr(ShardedIndex, "look", lambda self: 1 / 0)
        while client.get("/readyz").status_code != 503:
            assert time.monotonic() < until
            time.sleep(0.01)
    while client.get("/readyz").status_code != 200:  # the server looks on
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_shard_that_is_not_there_comes_back_by_itself(serve: Serve, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk that is mounted late: the server begins without it, says so in each answer, and needs nobody when it is there."""
    monkeypatch.setattr(serving, "WATCHED_EVERY", 0.05)
    whole, name = told(serve(), {"text": "in red", "k": 24}), read_shards(shards).shards[1].name
    (shards / name).rename(shards.with_name("away"))
    client = serve(index=described(shards, on_loss="partial"))
    for query in ({"text": "in red", "k": 24}, {"text": "in red", "k": 24, "zones": True, "explain": True}):
        partial = told(client, query)
        assert (partial["exact"], partial["lost"], len(partial["hits"])) == (False, [name], 12)
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["lost"]) == (200, [name])
    answer = client.get("/v1/items")
    assert error_of(answer) == (503, "no_answer")
    assert f"part {name} of the index gives no answer" in answer.json()["error"]["message"]
    shards.with_name("away").rename(shards / name)
    assert told(client, {"text": "in red", "k": 24}) == whole
    until = time.monotonic() + 60
    while client.get("/readyz").json()["lost"]:  # by the server's own looks
        assert time.monotonic() < until
        time.sleep(0.02)
    assert client.get("/v1/items").json()["total"] == 24


def test_a_shard_that_hangs_costs_one_timeout(serve: Serve, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next callers do not wait for it, until a look finds that it answers; and it does not use up the threads."""
    gate, call, began = threading.Event(), ShardServer.call, list[str]()
    name = read_shards(shards).shards[1].name
    gate.set()

    def hang(self: ShardServer, method: str, shard: str, *arguments: Any) -> Any:
        if shard == name:
            began.append(method)
            assert gate.wait(60)
        return call(self, method, shard, *arguments)

    monkeypatch.setattr(ShardServer, "call", hang)
    client = serve(index=described(shards, on_loss="partial"), deadline_s=0.8)
    whole = told(client, {"text": "in red", "k": 24})
    gate.clear()
    began.clear()
    assert told(client, {"text": "in red", "k": 24, "zones": True, "explain": True})["lost"] == [name], "within the deadline"
    assert began == ["search"]
    assert told(client, {"reference_id": "00.png"})["lost"] == [name]
    assert client.get("/v1/items/00.png").status_code == 200
    assert began == ["search"], "nobody asked it again"
    for _ in range(8):
        service_of(client)._look_at_parts()
    assert len(began) == 4, "as many as may hang"
    assert client.get("/readyz").json()["lost"] == [name]
    gate.set()
    until = time.monotonic() + 60
    while told(client, {"text": "in red", "k": 24})["lost"]:
        assert time.monotonic() < until
        service_of(client)._look_at_parts()
    assert told(client, {"text": "in red", "k": 24}) == whole


def test_a_folder_that_is_cut_anew_is_followed(bundle_path: Path, serve: Serve, shards: Path, shop: Path, tmp_path: Path) -> None:
    client = serve(index=shards)
    after = client.get("/v1/items?limit=1").json()["next"]
    before = told(client, {"text": "in red", "k": 24})
    hidden = shards.with_name("hidden.json")
    given = json.loads((shards / SHARDS_FILE).read_text())
    given["shards"][1]["name"] = "gone"
    hidden.write_text(json.dumps(given))

    def ready(**expected: Any) -> dict[str, Any]:
        until = time.monotonic() + 60
        while True:
            found: dict[str, Any] = client.get("/readyz").json()
            if all(found.get(name) == value for name, value in expected.items()):
                return found
            assert time.monotonic() < until, found
            time.sleep(0.02)

    hidden.replace(shards / SHARDS_FILE)  # names a shard that is not there: the last good state goes on
    ready(following=False)
    assert told(client, {"text": "in red", "k": 24}) == before
    with GalleryIndex.load(shop / "index") as index:
        index.remove(["00.png", "sub/23.png"])
        index.update_metadata({"sub/01.png": {"colour": "black"}})
        index.save(tmp_path / "whole")
        cut_index(index, shards, 3, anew=True)
    ready(following=True, items=22)
    single = serve(index=tmp_path / "whole")
    for query in ({"text": "in red", "k": 30, "zones": True}, {"text": "in red", "filter": {"colour": "black"}}):
        assert told(client, query) == told(single, query)
    assert error_of(client.post("/v1/search", json={"reference_id": "00.png"})) == (404, "unknown_item")
    assert error_of(client.get("/v1/items", params={"after": after})) == (404, "page_gone")
    assert metric(client, "dqe_index_parts") in (2, 3)
    service_of(client)._look_at_parts()
    assert metric(client, "dqe_index_parts") == 3


def test_shards_that_differ_in_metadata_and_share_an_id(bundle_path: Path, serve: Serve, tmp_path: Path) -> None:
    """`join` refuses such an id; a list of shards that was written by hand may have it. The newer item is the one of that id."""
    parts, model = [], RetrievalEngine.load(bundle_path, provider="cpu", threads=1)
    for name, photos, metadata in (("a", {"one": 1, "two": 2}, None), ("b", {"two": 3, "three": 4}, {"brand": "x"})):
        index = model.new_index()
        encoded = model.encode_images([noise_image(n) for n in photos.values()])
        index.add([*photos], encoded.target_tokens, encoded.image_tokens, [metadata] * len(photos))
        index.save(tmp_path / "parts" / name)
        parts.append({"name": name, "revision": index.snapshot().revision, "items": len(photos)})
    made = {
        "kind": "sharded-index", "schema_version": 1, "model_hash": model.bundle.model_hash, "storage": "f32", "image_storage": "f16",
        "target_shape": index.target_shape, "image_shape": index.image_shape, "source_generation": None, "source_rows": None,
        "shards": parts,
    }  # fmt: skip
    (tmp_path / "parts" / SHARDS_FILE).write_text(json.dumps(made))
    client = serve(index=tmp_path / "parts")
    found = told(client, {"text": "in red", "filter": {"brand": "x"}, "zones": True})
    assert sorted(hit["id"] for hit in found["hits"]) == ["three", "two"]
    found = told(client, {"text": "in red", "filter": {"brand": {"exists": False}}, "explain": True})
    assert sorted(hit["id"] for hit in found["hits"]) == ["one", "two"]
    assert client.get("/v1/items/two").json()["metadata"] == {"brand": "x"}
    assert [item["id"] for item in client.get("/v1/items?limit=4").json()["items"]] == ["one", "two", "two", "three"]
    assert told(client, {"reference_id": "two"})["hits"][0]["id"] in ("one", "three")


def test_while_new_shards_are_opened_the_old_ones_answer(serve: Serve, shards: Path, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, state, asked = threading.Event(), ShardServer._state, threading.Event()
    client = serve(index=shards)
    before = told(client, {"text": "in red", "k": 24})
    old = {shard.name for shard in read_shards(shards).shards}

    def slow(self: ShardServer, name: str, revision: str) -> Any:
        if name not in old:
            asked.set()
            assert gate.wait(60)
        return state(self, name, revision)

    monkeypatch.setattr(ShardServer, "_state", slow)
    with GalleryIndex.load(shop / "index") as index:
        index.remove(["00.png"])
        index.save(shards.with_name("whole"))
        cut_index(index, shards, 2, anew=True)
    assert asked.wait(60)
    transport = service_of(client).engine.searched._transport  # type: ignore[attr-defined]
    assert told(client, {"text": "in red", "k": 24, "zones": False}) == before
    service_of(client)._look_at_parts()
    assert old < {*transport._servers}, "both, and a look lets go of neither"
    gate.set()
    until = time.monotonic() + 60
    while client.get("/readyz").json()["items"] != 23:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert len(told(client, {"text": "in red", "k": 24})["hits"]) == 23
    service_of(client)._look_at_parts()
    assert {*transport._servers} == {shard.name for shard in read_shards(shards).shards}
