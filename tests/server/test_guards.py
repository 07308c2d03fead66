"""The guards, in process."""

from __future__ import annotations

import pytest
from support.guarded import READ_KEY, WRITE_KEY, Service, counted, keyed, settings

from dqe_engine.server.policies import PUBLIC, READ, WRITE, policy_of, template_of

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
