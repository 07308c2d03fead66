"""The guards, in process."""

from __future__ import annotations

import asyncio
import errno
import json
import re
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families
from support.guarded import KEYS, READ_KEY, WRITE_KEY, Service, State, settings

from dqe_engine.errors import InputError, OverloadError
from dqe_engine.server.guards import Message, Receive, Scope, Send
from dqe_engine.server.policies import METHODS, PUBLIC, READ, WRITE, policy_of, template_of
from dqe_engine.server.problems import GoneError, Problem

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def keyed(**given: Any) -> Service:
    return Service(settings=settings(keys=KEYS, **given))


def counted(service: Service, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(service.metrics.render().decode())
    return {tuple(one.labels.values()): one.value for family in families for one in family.samples if one.name == name}


# What a route asks for.


@pytest.mark.parametrize(
    ("method", "path", "policy"),
    [
        ("GET", "/", PUBLIC),
        ("HEAD", "/healthz", PUBLIC),
        ("OPTIONS", "/readyz", PUBLIC),
        ("GET", "/openapi.json", PUBLIC),
        ("GET", "/page/app.js", PUBLIC),
        ("GET", "/page/icons/a.svg", PUBLIC),
        ("POST", "/v1/session", PUBLIC),
        ("DELETE", "/v1/session", PUBLIC),
        ("POST", "/v1/search", READ),
        ("GET", "/metrics", READ),
        ("GET", "/v1/items", READ),
        ("HEAD", "/v1/items/x", READ),
        ("GET", "/anything", READ),
        ("OPTIONS", "/v1/items", READ),
        ("POST", "/v1/items", WRITE),
        ("PATCH", "/v1/items/x", WRITE),
        ("DELETE", "/v1/items/x", WRITE),
        ("PUT", "/v1/anything", WRITE),
        ("POST", "/", WRITE),
        ("POST", "/healthz", WRITE),
        ("POST", "/page/app.js", WRITE),
        # Spelled in another way, it is another route.
        ("post", "/v1/search", WRITE),
        ("Get", "/", WRITE),
        ("POST", "/V1/search", WRITE),
        ("POST", "//v1/search", WRITE),
        ("POST", "/v1/search/", WRITE),
        ("POST", "/v1/../v1/search", WRITE),
        ("POST", "/v1/session/x", WRITE),
        ("POST", "/v1/session\x00", WRITE),
        ("GET", "/HEALTHZ", READ),
        ("GET", "//", READ),
        ("GET", "/page", READ),
        ("GET", "/page/", READ),
        ("GET", "/page/../v1/items", READ),
        ("GET", "/page/./a", READ),
        ("GET", "/page//a", READ),
        ("GET", "/page/..\\v1", READ),
        ("GET", "/page/a/../../v1/items", READ),
        ("GET", "", READ),
        ("POST", "", WRITE),
    ],
)
def test_the_table_of_routes(method: str, path: str, policy: str) -> None:
    assert policy_of(method, path) == policy


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/v1/items", "/v1/items"),
        ("/v1/items/secret", "/v1/items/{id}"),
        ("/page/x.js", "/page/{name}"),
        ("/page/../x", "other"),
        ("/secret", "other"),
        ("", "other"),
    ],
)
def test_what_reached_no_route_is_counted_without_what_was_sent(path: str, template: str) -> None:
    assert template_of(path) == template


@pytest.mark.parametrize(
    ("method", "path", "without", "reading", "writing"),
    [
        ("GET", "/", 200, 200, 200),
        ("GET", "/page/a.js", 200, 200, 200),
        ("GET", "/healthz", 200, 200, 200),
        ("GET", "/readyz", 200, 200, 200),
        ("GET", "/openapi.json", 200, 200, 200),
        ("POST", "/v1/session", 200, 200, 200),
        ("DELETE", "/v1/session", 200, 200, 200),
        ("GET", "/metrics", 401, 200, 200),
        ("GET", "/v1/items/a", 401, 200, 200),
        ("HEAD", "/v1/items/a", 401, 200, 200),
        ("OPTIONS", "/v1/items", 401, 200, 200),
        ("POST", "/v1/search", 401, 200, 200),
        ("POST", "/v1/items", 401, 403, 200),
        ("PATCH", "/v1/items/a", 401, 403, 200),
        ("DELETE", "/v1/items/a", 401, 403, 200),
        ("PUT", "/v1/new", 401, 403, 200),
        ("POST", "/v1/search/", 401, 403, 200),
        ("GET", "/page/../v1/items", 401, 200, 200),
    ],
)
def test_keys_by_route(method: str, path: str, without: int, reading: int, writing: int) -> None:
    service = keyed()
    for key, status in ((None, without), (READ_KEY, reading), (WRITE_KEY, writing), ("unknown-unknown-unknown", without)):
        service.reached.clear()
        answer = service.ask(method, path, key=key)
        assert answer.status == status
        assert bool(service.reached) is (status == 200)
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/items", 200), ("POST", "/v1/search", 200), ("DELETE", "/v1/items/a", 403)]
)
def test_without_keys_everybody_reads_and_nobody_writes(method: str, path: str, status: int) -> None:
    service = Service()
    for key in (None, WRITE_KEY):
        answer = service.ask(method, path, key=key)
        assert answer.status == status
        assert status == 200 or answer.code == "read_only"


def test_a_cookie_reads_and_never_writes() -> None:
    service = keyed()
    cookie = [(b"cookie", f"a=b; dqe_key={WRITE_KEY}".encode())]
    assert service.ask("GET", "/v1/items", cookie).status == 200
    assert service.ask("POST", "/v1/search", cookie).status == 200
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = service.ask(method, "/v1/items", [*cookie, (b"sec-fetch-site", b"same-origin")])
        assert (answer.status, answer.code) == (403, "may_not_write")
    assert service.ask("DELETE", "/v1/items/a", cookie, key=WRITE_KEY).status == 200


def test_a_second_cookie_header_with_another_key_counts_for_nothing() -> None:
    cookies = [(b"cookie", f"dqe_key={READ_KEY}".encode()), (b"cookie", b"dqe_key=unknown-unknown-unknown")]
    assert keyed().ask("GET", "/v1/items", cookies).status == 401


def test_a_key_in_the_query_string_counts_for_nothing_and_is_in_no_log() -> None:
    service = keyed()
    scope_path = f"/v1/items?key={READ_KEY}&dqe_key={READ_KEY}"
    assert service.ask("GET", scope_path).status == 401
    assert READ_KEY not in service.log.getvalue()


# Whose request it is.


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1", b"127.0.0.1:1", b"[::1]", b"[::1]:8000", b"localhost.", b"localhost:"]
)
def test_names_of_a_loopback_server(host: bytes) -> None:
    assert Service().ask(headers=[(b"host", host)], host=False).status == 200


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8000",
        b"localhost.evil.example",
        b"evil.example/localhost",
        b"localhost@evil.example",
        b"localhost:80@evil.example",
        b"localhost:evil",
        b"127.0.0.2",
        b"::1",
        b"[::1",
        b"[::1]x",
        b"[::1]:x",
        b"",
        b"\xff",
        b"localhost, evil",
    ],
)
def test_other_names_are_refused_on_loopback(host: bytes) -> None:
    service = keyed()
    for path in ("/v1/items", "/healthz", "/"):
        answer = service.ask("GET", path, [(b"host", host)], host=False, key=READ_KEY)
        assert (answer.status, answer.code) == (403, "host")
    assert not service.reached


def test_names_of_a_public_server() -> None:
    anybody = Service(settings=settings(host="0.0.0.0"))
    assert anybody.ask(headers=[(b"host", b"evil.example")], host=False).status == 200
    named = Service(settings=settings(host="0.0.0.0", hosts=("search.example.org",)))
    assert named.ask(headers=[(b"host", b"Search.Example.org:443")], host=False).status == 200
    assert named.ask(headers=[(b"host", b"evil.example")], host=False).status == 403
    assert named.ask(headers=[(b"host", b"localhost")], host=False).status == 403
    assert named.ask("GET", "/healthz", headers=[(b"host", b"10.0.0.7:8000")], host=False).status == 200


def test_one_host_header_is_expected() -> None:
    service = Service(settings=settings(host="0.0.0.0"))
    assert service.ask(headers=[(b"host", b"a"), (b"host", b"b")], host=False).status == 400
    assert service.ask(host=False).status == 400
    assert service.ask(host=False, version="1.0").status == 200
    assert Service().ask(host=False, version="1.0").status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 200),
        ([(b"origin", b"http://localhost:8000")], 200),
        ([(b"origin", b"http://LOCALHOST:8000")], 200),
        ([(b"sec-fetch-site", b"same-origin"), (b"origin", b"http://renamed.example")], 200),
        ([(b"sec-fetch-site", b"none")], 200),
        ([(b"origin", b"http://localhost:3000")], 403),
        ([(b"origin", b"https://evil.example")], 403),
        ([(b"origin", b"null")], 403),
        ([(b"origin", b"")], 403),
        ([(b"sec-fetch-site", b"cross-site")], 403),
        ([(b"sec-fetch-site", b"same-site")], 403),
        ([(b"sec-fetch-site", b"cross-site"), (b"origin", b"http://localhost:8000")], 403),
    ],
)
def test_pages_of_other_sites_send_nothing(headers: list[tuple[bytes, bytes]], status: int) -> None:
    service = keyed()
    for method, path in (("POST", "/v1/search"), ("POST", "/v1/session"), ("DELETE", "/v1/items/a")):
        assert service.ask(method, path, headers, key=WRITE_KEY).status == status
    assert service.ask("GET", "/", headers).status == 200
    assert len(service.reached) == (4 if status == 200 else 1)


def test_a_proxy_that_renames_the_host_is_told_its_public_name() -> None:
    service = Service(settings=settings(hosts=("search.example.org",)))
    assert service.ask("POST", "/v1/search", [(b"origin", b"https://search.example.org")]).status == 200
    assert service.ask("POST", "/v1/search", [(b"origin", b"https://other.example.org")]).status == 403


def test_no_answer_invites_other_sites() -> None:
    answer = Service().ask("OPTIONS", "/v1/search", [(b"origin", b"https://evil.example"), (b"access-control-request-method", b"POST")])
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# How much a client may send.


def test_a_rate_is_of_a_key_or_an_address() -> None:
    service = keyed(rate=0.001, burst=2)
    assert [service.ask(key=READ_KEY, client=f"10.0.0.{n}").status for n in range(3)] == [200, 200, 429]
    assert service.ask(key=WRITE_KEY).status == 200
    assert [service.ask(client="2001:db8::1").status for _ in range(2)] == [401, 401]
    answer = service.ask(client="2001:db8::2")  # guessing keys has its rate too
    assert (answer.status, answer.code) == (429, "rate")
    assert int(answer.headers["retry-after"]) > 900
    assert service.ask("POST", "/v1/session", client="2001:db8::3").status == 429
    assert service.ask("GET", "/healthz", client="2001:db8::2").status == 200
    assert service.ask("GET", "/page/a.js", client="2001:db8::2").status == 200
    assert service.ask("GET", "/page/../v1/x", client="2001:db8::2").status == 429
    assert counted(service, "dqe_rejected_total")[("rate",)] == 4


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


# When nobody answers.


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


# What every answer has.


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
