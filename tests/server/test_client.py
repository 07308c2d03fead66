"""The Python client, against a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.hostile_images import encoded
from support.samples import noise_image
from support.server import READ_KEY, WRITE_KEY, running

from dqe_engine.client import AsyncClient, Client, ServerError
from dqe_engine.errors import InputError
from dqe_engine.server.settings import Key, ServerSettings

ITEM = "sub/01.png"


@pytest.fixture
def url(make_settings: Callable[..., ServerSettings], keys: tuple[Key, ...]) -> Iterator[str]:
    with running(make_settings(keys=keys)) as address:
        yield address


def test_the_client_does_what_the_server_can(url: str, shop: Path) -> None:
    with Client(url, key=WRITE_KEY) as client:
        result = client.search(reference_id=ITEM, text="red", weights={"colour": 2.0}, k=3, zones=True)
        assert (len(result.hits), result.overrides) == (3, {"colour": 2.0})
        uploaded = client.search(image=(shop / "photos" / ITEM).read_bytes(), text="red", weights={"colour": 2.0}, k=4, timeout_ms=60_000)
        assert [hit.id for hit in result.hits] == [hit.id for hit in uploaded.hits if hit.id != ITEM][:3]
        assert [item.id for item in client.items(page=5)] == [item.id for item in client.items()]
        assert len(list(client.items({"sale": True}))) == 6
        assert client.facets({"sale": True}).total == 6
        assert client.vocabulary().writes
        added = client.add("a/ü ?.png", encoded(noise_image(7), "PNG"), {"colour": "teal"})
        assert client.item("a/ü ?.png").content == added.content
        assert client.image("a/ü ?.png", size=160)
        client.update("a/ü ?.png", None)
        assert client.item("a/ü ?.png").metadata is None
        client.remove("a/ü ?.png")
        for dots in (".", ".."):
            client.add(dots, encoded(noise_image(7), "PNG"))
            assert client.item(dots).id == dots
            client.remove(dots)
        with pytest.raises(ServerError, match="not in the index") as refused:
            client.item("a/ü ?.png")
        assert (refused.value.status, refused.value.code) == (404, "unknown_item")


def test_the_async_client_does_the_same(url: str) -> None:
    async def use() -> None:
        async with AsyncClient(url, key=WRITE_KEY) as client:
            results = await asyncio.gather(*(client.search(reference_id=ITEM, text="red", k=k) for k in range(1, 9)))
            assert [len(result.hits) for result in results] == list(range(1, 9))
            assert [item.id async for item in client.items(page=7)] == [item.id async for item in client.items()]
            assert (await client.facets()).total == (await client.vocabulary()).index.items == 24
            await client.add("new.png", encoded(noise_image(7), "PNG"))
            await client.update("new.png", {"colour": "red"})
            assert (await client.item("new.png")).metadata == {"colour": "red"}
            assert await client.image("new.png")
            await client.remove("new.png")

    asyncio.run(use())


def test_what_a_key_may_not_do_is_told(url: str) -> None:
    with Client(url, key=READ_KEY) as client, pytest.raises(ServerError, match="may only read") as refused:
        client.remove(ITEM)
    assert refused.value.status == 403
    with Client(url) as client, pytest.raises(ServerError) as refused:
        client.vocabulary()
    assert (refused.value.status, refused.value.code) == (401, "key_needed")


def test_misspelt_fields_are_told_without_a_server() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(InputError, match="txt"):
        client.search(txt="red")


class _Busy(BaseHTTPRequestHandler):
    """Answers by 429 twice, then as `answer` says."""

    asked: list[str]
    retry_after = "0"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        error = {"error": {"code": "queue_full", "message": "too many", "request_id": "r"}}
        body = json.dumps(error if len(self.asked) < 3 else {"id": "x", "metadata": None, "content": None}).encode()
        self.send_response(429 if len(self.asked) < 3 else 200)
        self.send_header("Retry-After", self.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_DELETE = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[tuple[str, type[_Busy]]]:
    handler = type("Busy", (_Busy,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_busy_server_is_asked_again_and_a_write_is_not(busy: tuple[str, type[_Busy]]) -> None:
    url, handler = busy
    with Client(url) as client:
        assert client.item("x").id == "x"
        assert len(handler.asked) == 3
        handler.asked.clear()
        with pytest.raises(ServerError) as refused:
            client.remove("x")
        assert (len(handler.asked), refused.value.retry_after) == (1, 0.0)
        handler.asked.clear()
        handler.retry_after = "3600"
        with pytest.raises(ServerError):
            client.item("x")
        assert len(handler.asked) == 1
