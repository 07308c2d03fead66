"""The service as its clients see it: every route, its problems, and that bodies are what OpenAPI says."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.hostile_images import encoded
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY, bearer, running

from dqe_engine.engine import RetrievalEngine
from dqe_engine.query import Query
from dqe_engine.results import SearchResult
from dqe_engine.server import messages
from dqe_engine.server.policies import template_of
from dqe_engine.server.service import Service
from dqe_engine.server.settings import Key, ServerSettings

Serve = Callable[..., TestClient]
ITEM = "sub/01.png"


def ask(client: TestClient, **query: Any) -> Any:
    response = client.post("/v1/search", json=query)
    assert response.status_code == 200, response.text
    msgspec.json.decode(response.content, type=SearchResult)
    return response.json()


def problem(response: Any) -> tuple[int, str]:
    error = msgspec.json.decode(response.content, type=messages.ErrorResponse).error
    assert error.request_id == response.headers["X-Request-ID"]
    assert "\n" not in error.message
    return response.status_code, error.code


def png(seed: int) -> bytes:
    return encoded(noise_image(seed), "PNG")


def test_a_search_answers_as_the_engine_does(serve: Serve, bundle_path: Path, shop: Path) -> None:
    asked = {"reference_id": ITEM, "text": "the same but red", "weights": {"colour": 2.0}, "filter": {"price": {"<": 20}}, "k": 7}
    answer = ask(serve(), **asked, zones=True, explain=True, unlike=["02.png"])
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        engine.load_index(shop / "index")
        expected = engine.search(Query(**asked, zones=True, explain=True, unlike=["02.png"]))
    assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected.hits]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx([hit.score for hit in expected.hits], abs=1e-6)
    assert answer["weights"] == pytest.approx(expected.weights)
    assert answer["zones"]["counts"] == msgspec.to_builtins(expected.zones.counts)
    assert answer["hits"][0]["explanation"].keys() == msgspec.to_builtins(expected.hits[0].explanation).keys()
    assert answer["index"]["items"] == 24


def test_an_upload_is_searched_by(serve: Serve, shop: Path) -> None:
    client, photo = serve(), (shop / "photos" / ITEM).read_bytes()
    response = client.post("/v1/search", files={"image": photo}, data={"query": json.dumps({"k": 3})})
    assert response.status_code == 200, response.text
    assert response.json()["mode"] == "image"
    assert response.json()["hits"][0]["id"] == ITEM
    assert client.post("/v1/search", files={"image": photo}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 422, "invalid_request"),
        (b'{"filter": {"a": ' + b"[" * 100_000, 400, "invalid_json"),
        (b'"\\ud800"', 400, "invalid_json"),
        (b"[]", 422, "invalid_request"),
        (b"{}", 422, "invalid"),
        (b'{"text": 1}', 422, "invalid_request"),
        (b'{"text": "red", "colour": "red"}', 422, "invalid_request"),
        (b'{"text": "red", "k": 0}', 422, "invalid_request"),
        (b'{"text": "red", "k": 1e400}', 422, "invalid_request"),
        (b'{"text": "red", "k": 9999, "offset": 9999}', 422, "invalid"),
        (b'{"text": "red", "weights": {"colour": -1}}', 422, "invalid_request"),
        (b'{"text": "red", "weights": {"smell": 1}}', 422, "invalid"),
        (b'{"text": "red", "filter": {"price": {"near": 1}}}', 422, "invalid"),
        (b'{"reference_id": "nowhere.png"}', 404, "unknown_item"),
        (b'{"reference_id": "../../etc/passwd"}', 404, "unknown_item"),
        (b'{"text": "red", "unlike": ["nowhere.png"]}', 404, "unknown_item"),
    ],
)
def test_what_is_wrong_with_a_query_is_told(serve: Serve, body: bytes, status: int, code: str) -> None:
    assert problem(serve().post("/v1/search", content=body, headers={"Content-Type": "application/json"})) == (status, code)


@pytest.mark.parametrize(
    "asked",
    [
        {"k": 201, "explain": True},
        {"filter": {"or": [{"price": n} for n in range(200)]}},
        {"filter": {"price": {"in": list(range(10_001))}}},
    ],
)
def test_what_would_take_seconds_is_refused(serve: Serve, asked: dict[str, Any]) -> None:
    client = serve()
    assert problem(client.post("/v1/search", json={"text": "red", **asked})) == (422, "invalid")
    if "filter" in asked and "or" in asked["filter"]:
        given = json.dumps(asked["filter"], separators=(",", ":"))
        for path in ("/v1/facets", "/v1/items"):
            assert problem(client.get(path, params={"filter": given})) == (422, "invalid")


def test_a_search_too_many_is_refused_at_once_and_the_connection_is_kept(
    make_settings: Callable[..., ServerSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [True]
    monkeypatch.setattr(Service, "full", lambda self, coming=0: full[0])
    body = b'{"text": "red"}'
    head = b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-ID: mine\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def answer(connection: socket.socket) -> bytes:
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        top, _, rest = received.partition(b"\r\n\r\n")
        length = int(next(line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        while len(rest) < length:
            rest += connection.recv(65536)
        return top + b"\n" + rest

    with running(make_settings()) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            for _ in range(2):
                connection.sendall(whole)
                refused = answer(connection)
                assert refused.startswith(b"HTTP/1.1 429 ")
                assert b"x-request-id: mine" in refused
                assert b"retry-after: 1" in refused
                assert b'"code":"queue_full"' in refused
            full[0] = False
            connection.sendall(whole)
            assert answer(connection).startswith(b"HTTP/1.1 200 ")
            full[0] = True
            connection.sendall(whole[:-5])  # the rest of it is not waited for
            assert b"connection: close" in answer(connection)
        with httpx.Client(base_url=url) as client:
            assert 'dqe_rejected_total{reason="queue_full"} 3.0' in client.get("/metrics").text
    assert capsys.readouterr().err.count('"reason":"queue_full"') == 3


def test_what_is_wrong_with_a_multipart_body_is_told(serve: Serve) -> None:
    client, photo = serve(), png(1)
    post = client.post
    assert problem(post("/v1/search", content=b"x", headers={"Content-Type": "text/plain"})) == (415, "unsupported_media_type")
    assert problem(post("/v1/search", content=b"x", headers={"Content-Type": "multipart/form-data"}))[0] == 400
    assert problem(post("/v1/search", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=a"}))[0] in (400, 422)
    assert problem(post("/v1/search", files={"query": (None, b"{}")})) == (422, "no_image")
    assert problem(post("/v1/search", files={"image": photo, "other": photo}))[0] in (400, 422)
    assert problem(post("/v1/search", files={"image": photo}, data={"other": "1"})) == (422, "unexpected_part")
    assert problem(post("/v1/search", files=[("image", photo), ("image", photo)]))[0] in (400, 422)
    assert problem(post("/v1/search", files={"image": b"%!PS-Adobe"})) == (415, "image_format")
    assert problem(post("/v1/search", files={"image": photo[:60]})) == (422, "invalid")
    assert problem(post("/v1/search", files={"image": photo}, data={"query": json.dumps({"reference_id": ITEM})})) == (422, "invalid")


def test_items_are_listed_in_pages_while_they_change(serve: Serve, keys: tuple[Key, ...]) -> None:
    client = serve(keys=keys)
    client.headers.update(bearer(WRITE_KEY))
    seen, after = [], None
    while True:
        page = client.get("/v1/items", params={"limit": 5} | ({"after": after} if after else {})).json()
        msgspec.convert(page, messages.ItemsResponse)
        seen += [item["id"] for item in page["items"]]
        if after is None:  # the last one of a page becomes the newest
            assert client.patch(f"/v1/items/{quote(seen[-1], safe='')}", json={"metadata": {"colour": "black"}}).status_code == 200
        if (after := page["next"]) is None:
            break
    assert len(seen) == 25
    assert len(set(seen)) == 24
    filtered = client.get("/v1/items", params={"filter": '{"colour": "black"}'}).json()
    assert (filtered["total"], len(filtered["items"])) == (1, 1)
    assert problem(client.get("/v1/items", params={"after": "01234567-3"})) == (404, "page_gone")
    assert problem(client.get("/v1/items", params={"after": "x"})) == (422, "invalid")
    assert problem(client.get("/v1/items", params={"filter": "[1]"})) == (422, "invalid")
    assert problem(client.get("/v1/items", params={"limit": "0"})) == (422, "invalid")


def test_an_item_is_found_by_its_id_however_it_is_encoded(serve: Serve) -> None:
    client = serve()
    for path in (f"/v1/items/{quote(ITEM, safe='')}", f"/v1/items/{ITEM}"):
        answer = client.get(path)
        expected = {"id": ITEM, "metadata": {"colour": "green", "price": 1.5, "sale": True}}
        assert answer.json() == {**expected, "content": answer.json()["content"]}
    assert problem(client.get("/v1/items/nowhere")) == (404, "unknown_item")
    assert problem(client.get("/v1/items/%ff")) == (404, "unknown_item")


def test_a_picture_is_small_and_known_by_its_etag(serve: Serve) -> None:
    client = serve()
    path = f"/v1/items/{quote(ITEM, safe='')}/image"
    first = client.get(path, params={"size": 160})
    assert first.status_code == 200
    assert max(Image.open(BytesIO(first.content)).size) <= 160
    assert client.get(path, params={"size": 160}, headers={"If-None-Match": f'"x", W/{first.headers["ETag"]}'}).status_code == 304
    assert client.get(path, headers={"If-None-Match": first.headers["ETag"]}).status_code == 200  # another size
    assert problem(client.get(path, params={"size": 7})) == (422, "invalid")
    assert problem(client.get("/v1/items/nowhere/image")) == (404, "unknown_item")


def test_an_item_without_a_photo_has_no_picture(serve: Serve) -> None:
    assert problem(serve(photos=()).get(f"/v1/items/{quote(ITEM, safe='')}/image")) == (404, "no_image")


def test_a_picture_is_only_read(serve: Serve, keys: tuple[Key, ...]) -> None:
    client = serve(keys=keys)
    client.headers.update(bearer(WRITE_KEY))
    for answer in (client.patch("/v1/items/00.png/image", json={"metadata": None}), client.delete("/v1/items/00.png/image")):
        assert problem(answer) == (405, "method")
        assert answer.headers["Allow"] == "GET"
    assert problem(client.delete("/v1/items/00.png%2Fimage")) == (404, "unknown_item")


def test_facets_count_what_a_filter_leaves(serve: Serve) -> None:
    found = serve().get("/v1/facets", params={"filter": '{"sale": true}'}).json()
    msgspec.convert(found, messages.FacetsResponse)
    keys = {facet["key"]: facet for facet in found["keys"]}
    assert found["total"] == 6
    assert {value["value"]: value["count"] for value in keys["colour"]["values"]} == {"red": 2, "green": 2, "blue": 2}
    assert (keys["price"]["least"], keys["price"]["most"]) == (0.5, 5.5)


def test_a_write_is_found_at_once_and_outlives_the_server(serve: Serve, keys: tuple[Key, ...]) -> None:
    client = serve(keys=keys)
    client.headers.update(bearer(WRITE_KEY))
    item = {"id": "new/ä ?#.png", "metadata": {"colour": "teal"}}
    path = f"/v1/items/{quote(item['id'], safe='')}"

    def add(data: bytes, **changes: Any) -> Any:
        return client.post("/v1/items", files={"image": data}, data={"item": json.dumps(item | changes)})

    added = add(png(100))
    assert added.status_code == 201, added.text
    assert client.get(path).json() == {**item, "content": added.json()["content"]}
    assert item["id"] in [hit["id"] for hit in ask(client, reference_id=item["id"], exclude_reference=False, k=25)["hits"]]
    assert client.get(f"{path}/image").status_code == 200
    assert problem(add(png(101))) == (409, "item_exists")
    assert add(png(101), replace=True).json()["content"] != added.json()["content"]
    assert client.patch(path, json={"metadata": None}).status_code == 200
    assert client.get(path).json()["metadata"] is None
    revision = client.delete(path).json()["revision"]
    assert problem(client.get(path)) == (404, "unknown_item")
    assert problem(client.delete(path)) == (404, "unknown_item")
    assert problem(add(b"GIF89a")) == (422, "invalid")
    assert problem(add(b"no image")) == (415, "image_format")
    assert problem(client.post("/v1/items", data={"item": json.dumps(item)}, files={"image": (None, b"x")}))[0] in (400, 422)
    assert serve(keys=keys).get("/readyz").json() == {"status": "ready", "items": 24, "revision": revision, "following": True, "lost": []}


def test_a_write_asks_the_newest_index_not_what_this_process_has_seen(serve: Serve, keys: tuple[Key, ...]) -> None:
    """As where another worker has just answered, and this one has not looked yet."""
    first, second = serve(keys=keys), serve(keys=keys)
    for client in (first, second):
        client.headers.update(bearer(WRITE_KEY))
    for n in range(6):
        item = {"image": png(100 + n)}, {"item": json.dumps({"id": f"{n}.new"})}
        assert first.post("/v1/items", files=item[0], data=item[1]).status_code == 201
        assert second.patch(f"/v1/items/{n}.new", json={"metadata": {"n": n}}).status_code == 200
        assert first.delete(f"/v1/items/{n}.new").status_code == 200
        assert second.post("/v1/items", files=item[0], data=item[1]).status_code == 201


def test_without_keys_nobody_writes(serve: Serve) -> None:
    client = serve()
    assert problem(client.delete("/v1/items/00.png")) == (403, "read_only")
    assert client.get("/v1/vocabulary").json()["writes"] is False


def test_with_keys_no_write_route_answers_without_one(serve: Serve, keys: tuple[Key, ...]) -> None:
    client = serve(keys=keys)
    described = client.get("/openapi.json").json()
    writes = [
        (method, path.replace("{id}", "00.png"))
        for path, operations in described["paths"].items()
        for method in operations
        if method != "get" and (method, path) not in {("post", "/v1/search"), ("post", "/v1/session"), ("delete", "/v1/session")}
    ]
    assert {method for method, _ in writes} == {"post", "patch", "delete"}
    for method, path in writes:
        assert client.request(method, path).status_code == 401
        assert client.request(method, path, headers=bearer("another-key-0123456789")).status_code == 401
        assert client.request(method, path, headers=bearer(READ_KEY)).status_code == 403
        assert client.request(method, path, headers={"Cookie": f"dqe_key={WRITE_KEY}"}).status_code == 403
    reads = [path for path, operations in described["paths"].items() if "get" in operations and path not in ("/healthz", "/readyz")]
    for path in reads:
        assert client.get(path.replace("{id}", "00.png")).status_code == 401
        assert client.get(path.replace("{id}", "00.png"), headers=bearer(READ_KEY)).status_code == 200


def test_a_page_reads_by_a_cookie(serve: Serve, keys: tuple[Key, ...]) -> None:
    client = serve(keys=keys)
    assert problem(client.post("/v1/session", json={"key": "nonsense"})) == (401, "unknown_key")
    answer = client.post("/v1/session", json={"key": READ_KEY})
    assert answer.status_code == 204
    assert "httponly" in answer.headers["Set-Cookie"].lower()
    assert client.get("/v1/vocabulary").status_code == 200
    client.delete("/v1/session")
    assert client.get("/v1/vocabulary").status_code == 401


def test_what_another_process_saves_is_followed(serve: Serve, make_settings: Callable[..., Any], bundle_path: Path) -> None:
    client = serve()
    with RetrievalEngine.load(bundle_path, provider="cpu", threads=1) as engine:
        engine.load_index(make_settings().index)
        engine.index.remove(["00.png"])
        engine.save_index(make_settings().index)
    while client.get("/readyz").json()["items"] != 23:
        pass
    assert problem(client.post("/v1/search", json={"reference_id": "00.png"})) == (404, "unknown_item")


def test_a_deadline_is_held(serve: Serve) -> None:
    client = serve()
    assert client.post("/v1/search", json={"text": "red"}, headers={"X-Deadline-Ms": "60000"}).status_code == 200
    for wrong in ("0", "-1", "1.5", "600001", "9" * 5000, "soon"):
        assert problem(client.post("/v1/search", json={"text": "red"}, headers={"X-Deadline-Ms": wrong})) == (422, "invalid")


def test_openapi_describes_every_route_and_type(serve: Serve) -> None:
    described = serve().get("/openapi.json").json()
    text = json.dumps(described)
    names = {reference.split('"')[0] for reference in text.split('"#/components/schemas/')[1:]}
    assert names <= described["components"]["schemas"].keys()
    assert "HTTPValidationError" not in text
    assert "multipart/form-data" in described["paths"]["/v1/search"]["post"]["requestBody"]["content"]


def test_every_route_is_counted_under_its_own_path(serve: Serve) -> None:
    """Also what is refused before it reaches its route."""
    paths = serve().get("/openapi.json").json()["paths"]
    assert {path: template_of(path) for path in paths} == {path: path for path in paths}


def test_metrics_count_what_was_asked(serve: Serve) -> None:
    client = serve()
    ask(client, text="red")
    text = client.get("/metrics").text
    assert 'dqe_request_seconds_count{method="POST",route="/v1/search",status="200"} 1.0' in text
    assert "dqe_index_items 24.0" in text
    assert 'dqe_stage_seconds_count{stage="search"} 1.0' in text
