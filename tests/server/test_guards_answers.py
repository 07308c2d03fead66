"""Guards: bodies on their way in, and answers on their way out."""

from __future__ import annotations

import asyncio
import errno
import json
import re
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families
from support.guarded import KEYS, READ_KEY, SECURITY_HEADERS, WRITE_KEY, Service, State, counted, keyed, settings

from dqe_engine.errors import InputError, OverloadError
from dqe_engine.server.guards import Message, Receive, Scope, Send
from dqe_engine.server.policies import METHODS
from dqe_engine.server.problems import GoneError, Problem


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], "unreadable"),
        ([(b"content-length", b"1"), (b"content-length", b"1")], "unreadable"),
        ([(b"content-length", b"+1")], "unreadable"),
        ([(b"content-length", b"1_0")], "unreadable"),
        ([(b"content-length", "١".encode())], "unreadable"),
        ([(b"content-length", b"9" * 5000)], "unreadable"),
        ([(b"content-length", b"2049")], "too_large"),
    ],
)
def test_a_body_whose_length_is_wrong_is_never_read(headers: list[tuple[bytes, bytes]], code: str) -> None:
    service = keyed(max_body_bytes=2048)
    answer = service.ask("POST", "/v1/items", headers, key=WRITE_KEY, ends=False)
    assert answer.code == code
    assert answer.headers["connection"] == "close"
    assert not service.reached


@pytest.mark.parametrize("length", [None, b"10", b"2048"])
def test_a_body_that_grows_over_the_limit_is_cut_off(length: bytes | None) -> None:
    service = keyed(max_body_bytes=2048)
    header = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", length)
    answer = service.ask("POST", "/v1/items", [header], key=WRITE_KEY, chunks=[b"x" * 2048, b"x"], ends=False)
    assert (answer.status, answer.code, answer.headers["connection"]) == (413, "too_large", "close")
    assert service.ask("POST", "/v1/items", [header], key=WRITE_KEY, chunks=[b"x" * 2048]).status == 200
    assert counted(service, "dqe_rejected_total") == {("too_large",): 1}


def test_a_body_that_does_not_come_is_given_up() -> None:
    service = keyed(body_timeout_s=0.05)
    answer = service.ask("POST", "/v1/search", [(b"content-length", b"9")], key=READ_KEY, chunks=[b"x"], ends=False)
    assert (answer.status, answer.code, answer.headers["connection"]) == (408, "too_slow", "close")
    assert counted(service, "dqe_rejected_total") == {("too_slow",): 1}


def test_the_guards_answer_counts_whatever_the_application_makes_of_the_exception() -> None:
    app = FastAPI()

    @app.post("/v1/search")
    async def search(body: dict[str, int]) -> dict[str, int]:
        return body

    service = Service(app, settings(max_body_bytes=1024))
    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    assert service.ask("POST", "/v1/search", headers, chunks=[b'{"a":', b" " * 2000], ends=False).status == 413
    assert service.ask("POST", "/v1/search", headers, chunks=[b'{"a":', b"1}"]).body == b'{"a":1}'


def test_an_answer_before_the_body_ends_the_connection() -> None:
    async def hasty(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body"})

    service = Service(hasty)
    assert service.ask("POST", "/v1/search", [(b"content-length", b"3")]).headers["connection"] == "close"
    assert "connection" not in service.ask("POST", "/v1/search", [(b"content-length", b"0")]).headers
    assert "connection" not in service.ask("GET", "/v1/items").headers


def test_health_answers_before_the_rest() -> None:
    service = Service(state=State(False))
    for path in ("/healthz", "/readyz", "/metrics", "/", "/page/a.js"):
        assert service.ask("GET", path).status == 200
    answer = service.ask("GET", "/v1/items")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "not_ready", "2")
    service.state.is_ready = True
    assert service.ask("GET", "/v1/items").status == 200


@pytest.mark.parametrize(
    ("error", "status", "logs"),
    [
        (ValueError("secret"), 500, True),
        (Problem(409, "exists", "the item exists"), 409, False),
        (InputError("k is 0"), 422, False),
        (OverloadError("full"), 429, False),
        (OSError(errno.ENOSPC, "no", "/srv/secret"), 507, False),
    ],
)
def test_an_exception_is_an_answer(error: Exception, status: int, logs: bool) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    service = Service(fails)
    answer = service.ask(headers=[(b"x-request-id", b"mine")])
    assert answer.status == status
    assert answer.headers["x-request-id"] == "mine"
    assert SECURITY_HEADERS.items() <= answer.headers.items()
    assert json.loads(answer.body)["error"]["request_id"] == "mine"
    assert "secret" not in answer.body.decode() + service.log.getvalue()
    assert ("error" in service.lines[0]) is logs
    assert counted(service, "dqe_rejected_total") == {}


def test_an_exception_in_the_middle_of_an_answer_cuts_it_off() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("secret")

    service = Service(fails)
    with pytest.raises(ValueError, match="secret"):
        service.ask()
    assert service.lines[0]["error"]["type"] == "ValueError"


def test_a_client_that_leaves_is_counted_as_such() -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    service = Service(waits)
    with pytest.raises(asyncio.CancelledError):
        service.ask()
    assert service.lines[0]["status"] == 0


def test_nobody_is_told_that_nobody_is_there() -> None:
    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        raise GoneError

    service = Service(waits)
    with pytest.raises(IndexError):  # it looks for an answer
        service.ask()
    assert [(line["status"], "error" in line) for line in service.lines] == [(0, False)]


@pytest.mark.parametrize("given", [b"a b", b"x" * 65, b"a\r\nset-cookie: x=1", "é".encode(), b""])
def test_a_bad_request_id_is_replaced_on_every_answer(given: bytes) -> None:
    service = keyed()
    for key in (READ_KEY, None):
        answer = service.ask(headers=[(b"x-request-id", given)], key=key)
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
    assert {line["request_id"] for line in service.lines}.isdisjoint({given.decode("latin-1")})


def test_two_request_ids_are_none() -> None:
    answer = Service().ask(headers=[(b"x-request-id", b"a"), (b"x-request-id", b"b")])
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


def test_an_application_cannot_weaken_headers() -> None:
    async def weak(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"Content-Security-Policy", b"default-src *"),
            (b"x-request-id", b"other"),
            (b"Cache-Control", b"max-age=60"),
            (b"etag", b"x"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    answer = Service(weak).ask(headers=[(b"x-request-id", b"mine")])
    assert SECURITY_HEADERS.items() <= answer.headers.items()
    assert (answer.headers["x-request-id"], answer.headers["cache-control"], answer.headers["etag"]) == ("mine", "max-age=60", "x")
    assert Service().ask().headers["cache-control"] == "no-store"


def test_head_is_answered_by_the_route_of_get_without_the_body() -> None:
    service = Service()
    answer = service.ask("HEAD", "/v1/items")
    assert service.reached == [("GET", "/v1/items")]
    assert (answer.body, answer.headers["content-length"]) == (b"", "49")
    assert service.lines[0]["method"] == "HEAD"
    assert service.lines[0]["bytes_out"] == 0


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "get", "PROPFIND", "X" * 1000])
def test_what_is_no_method_of_ours_reaches_nobody(method: str) -> None:
    service = keyed()
    answer = service.ask(method, "/v1/items", key=WRITE_KEY)
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) == METHODS
    assert service.lines[0]["method"] == "other"
    assert not service.reached


def test_routes_find_the_request_id_and_the_key() -> None:
    app = FastAPI(redirect_slashes=False)
    inner, outer = APIRouter(prefix="/items"), APIRouter(prefix="/v1")

    @inner.get("/{id:path}")
    async def item(id: str, request: Request) -> dict[str, Any]:
        return {"id": id, "request_id": request.state.request_id, "key": request.state.key.name}

    outer.include_router(inner)
    app.include_router(outer)
    service = Service(app, settings(keys=KEYS))
    answer = service.ask("GET", "/v1/items/a/b", [(b"x-request-id", b"mine")], key=READ_KEY)
    assert json.loads(answer.body) == {"id": "a/b", "request_id": "mine", "key": "page"}
    assert service.ask("PUT", "/v1/items/a/b", key=WRITE_KEY).status == 405
    assert service.ask("GET", "/elsewhere", key=READ_KEY).status == 404
    assert [(line["route"], line["status"], line["key"]) for line in service.lines] == [
        ("/v1/items/{id}", 200, "page"),
        ("/v1/items/{id}", 405, "ci"),
        ("other", 404, "page"),
    ]
    assert request_labels(service) == {("/v1/items/{id}", "GET", "200"), ("/v1/items/{id}", "PUT", "405"), ("other", "GET", "404")}


def request_labels(service: Service) -> set[tuple[str, ...]]:
    families = text_string_to_metric_families(service.metrics.render().decode())
    samples = [one for family in families for one in family.samples if one.name == "dqe_request_seconds_count"]
    return {(one.labels["route"], one.labels["method"], one.labels["status"]) for one in samples}


def test_a_line_has_nothing_that_was_sent() -> None:
    service = keyed()
    secret = b"s3cret-s3cret-s3cret"
    service.ask("POST", "/v1/items/s3cret", [(b"cookie", b"dqe_key=" + secret), (b"x-api-key", secret)], chunks=[secret])
    service.ask("GET", "/s3cret", [(b"user-agent", secret), (b"referer", secret)])
    assert len(service.lines) == 2
    assert "s3cret" not in service.log.getvalue()


def test_many_paths_are_few_series() -> None:
    service = Service()
    for number in range(300):
        service.ask("GET", f"/v1/items/{number}")
        service.ask("GET", f"/{number}")
    assert len(request_labels(service)) == 2


def test_websockets_are_closed_and_the_lifespan_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    service = Service(app)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(service.guards({"type": "websocket", "path": "/", "headers": []}, receive, send))
    asyncio.run(service.guards({"type": "lifespan"}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert seen == ["lifespan"]


def test_a_search_too_many_is_told_before_its_body_is_worked_on() -> None:
    service = Service(state=State(is_full=True))
    answer = service.ask("POST", "/v1/search", [(b"content-length", b"2")], chunks=[b"{}"])
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "queue_full", "1")
    assert "connection" not in answer.headers  # the body was small, and was there
    assert service.ask("POST", "/v1/search", [(b"content-length", b"2")], chunks=[b"{"], ends=False).headers["connection"] == "close"
    assert service.ask("POST", "/v1/search", [(b"content-length", b"99999")], chunks=[b"x" * 99999]).headers["connection"] == "close"
    assert service.reached == []
    assert service.ask().status == 200  # what is no search goes on


class FullMeanwhile(State):
    """Others come while a search waits for its turn."""

    async def turn(self) -> None:
        self.is_full = True


def test_a_search_that_was_taken_is_not_refused_after_it_waited() -> None:
    service = Service(state=FullMeanwhile())
    assert service.ask("POST", "/v1/search", [(b"content-length", b"2")], chunks=[b"{}"]).status == 200
    assert service.ask("POST", "/v1/search", [(b"content-length", b"2")], chunks=[b"{}"]).status == 429


def test_bodies_on_their_way_are_bounded_together() -> None:
    service = Service(settings=settings(max_body_bytes=2000, max_arriving_bytes=3000, keys=KEYS))

    def status(*headers: tuple[bytes, bytes], size: int) -> int:
        return service.ask("POST", "/v1/items", list(headers), chunks=[b"x" * (size // 2)] * 2, key=WRITE_KEY).status

    assert status((b"content-length", b"2000"), size=2000) == 200
    assert service.guards.arriving == 0
    service.guards.arriving = 1500  # of requests that are being answered
    assert status((b"content-length", b"2000"), size=2000) == 429
    assert status((b"transfer-encoding", b"chunked"), size=2000) == 429
    assert status((b"transfer-encoding", b"chunked"), size=1500) == 200
    assert service.guards.arriving == 1500  # what was said and never came counts nothing


def test_the_body_that_needs_no_key_is_small() -> None:
    service = Service()
    assert service.ask("POST", "/v1/session", [(b"content-length", b"5000")], chunks=[b"x" * 5000]).status == 413
    assert service.ask("POST", "/v1/session", [(b"transfer-encoding", b"chunked")], chunks=[b"x" * 5000]).status == 413
    assert service.ask("POST", "/v1/session", [(b"content-length", b"500")], chunks=[b"x" * 500]).status == 200
