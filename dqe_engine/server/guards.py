"""`Guards`: what every request passes before it reaches a route, and every answer on its way out."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from .headers import SEARCH, SECURITY, answer_headers, request_id_of
from .keys import Keyring, cookies_of
from .logs import AccessLog
from .metrics import Metrics
from .peers import network_of
from .policies import HEALTH, METHODS, PUBLIC, READ, SAFE, SESSION, WRITE, is_page, policy_of, template_of
from .problems import GoneError, Problem, problem_of, queue_full, response_bytes, response_headers, retry_after
from .rates import Rates
from .settings import Key, ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SESSION_BYTES = 4 << 10  # of the one body that comes without a key
_SWALLOWED, _SWALLOWED_S = 16 << 10, 0.02
_FREE = frozenset((*HEALTH, "/"))  # of the rate, as the page's files are: who shows a page asks for many at once
_ALWAYS = frozenset((*HEALTH, "/", "/metrics"))  # answer while the service is not ready; so does the page

_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]*)?")
_OURS = frozenset(name for name, _ in SECURITY) | {b"x-request-id"}
"""Headers that are the guards' to set: an application's own are replaced."""


class Readiness(Protocol):
    """What the guards ask of the service."""

    def ready(self) -> bool:
        """Whether requests are answered; asked for each, so it takes no time."""
        ...

    def full(self) -> bool:
        """Whether one search more would wait for too many others; asked for each search."""
        ...

    def not_offered(self, method: str, path: str) -> Problem | None:
        """The answer to a request that needs what the index cannot do."""
        ...

    @property
    def turn(self) -> Callable[[], Awaitable[None]]:
        """What a search waits for before it begins."""
        ...


class Guards:
    """ASGI middleware. Routes find `request_id` (str) and `key` (Key or None) in `request.state`.

    In this order: a Host header that is not this server's, a method that is none, a foreign page that would send something, the key, the
    client's rate, readiness, what the index does not offer, a body over the limit. While the application reads: the bytes that come are
    counted and timed. Of the answer: security headers, the request's id, a line in the log, and its time in the metrics. An exception that
    no route handled is the answer that `problem_of` says, and is logged where that is a 500.

    HEAD is answered by the route of GET, without the body. Where an answer begins before the body has come, the connection ends with it.
    """

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics, state: Readiness, log: AccessLog | None = None) -> None:
        """`log`: None for lines to stderr."""
        self.app, self.settings, self.metrics, self.state = app, settings, metrics, state
        self.log = AccessLog(least=settings.log) if log is None else log
        self.keys = Keyring(settings.keys)
        self.hosts = settings.allowed_hosts
        self.rates = None if settings.rate is None else Rates(settings.rate, settings.burst_size)
        self.arriving = 0
        """Bytes that came of the bodies of requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "no WebSockets here"})
        else:
            await self.app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, guards: Guards, scope: Scope, receive: Receive, send: Send) -> None:
        self._guards, self._scope, self._receive, self._send = guards, scope, receive, send
        self._started = time.perf_counter()
        self._deadline = 0.0  # of the body, on the loop's clock
        self._key: Key | None = None
        self._hosts: list[bytes] = []
        self._lengths: list[bytes] = []
        self._request_ids: list[bytes] = []
        self._origin: bytes | None = None
        self._site: bytes | None = None
        self._is_chunked = False
        self._has_cookie = False
        for name, value in scope["headers"]:
            if name == b"host":
                self._hosts.append(value)
            elif name == b"content-length":
                self._lengths.append(value)
            elif name == b"transfer-encoding":
                self._is_chunked = True
            elif name == b"x-request-id":
                self._request_ids.append(value)
            elif name == b"origin":
                self._origin = value
            elif name == b"sec-fetch-site":
                self._site = value
            elif name == b"cookie":
                self._has_cookie = True
        self.request_id = request_id_of(self._request_ids[0] if len(self._request_ids) == 1 else None)
        self._method: str = scope["method"]
        self._path: str = scope["path"]
        self._body_is_due = self._is_chunked or any(length != b"0" for length in self._lengths)
        self._bytes_in = self._bytes_out = 0
        self._arriving = 0  # bytes that were counted for it
        self._status = 0
        self._problem: Problem | None = None  # the answer, unless the application has one of its own
        self._refused = False  # by the guards
        self._error: BaseException | None = None  # that makes a 500
        self._replaced = False  # the application's answer is not sent: the problem was

    async def run(self) -> None:
        inner: Scope = dict(self._scope)  # uvicorn's own still says HEAD
        try:
            problem = self._refusal()
            if problem is None:
                if self._path == SEARCH:
                    await self._guards.state.turn()
                inner["state"] = {**inner.get("state", {}), "request_id": self.request_id, "key": self._key}
                if self._method == "HEAD":
                    inner["method"] = "GET"
                await self._guards.app(inner, self._read, self._write)
                if self._problem is not None and not self._status:
                    await self._answer(self._problem)
            else:
                self._problem, self._refused = problem, True
                if problem.status == 429:
                    await self._swallow()
                await self._answer(problem)
        except GoneError:
            pass
        except Exception as error:
            await self._failed(error)
        finally:
            self._guards.arriving -= self._arriving
            self._account(_template_in(inner) or template_of(self._path))

    def _refusal(self) -> Problem | None:
        """Why the request goes no further."""
        return (
            self._malformed()
            or self._not_ours()
            or self._foreign()
            or self._not_allowed()
            or self._not_ready()
            or self._guards.state.not_offered(self._method, self._path)
            or self._too_many()
            or self._too_large(int(self._lengths[0]) if self._lengths else 0)
        )

    def _malformed(self) -> Problem | None:
        """What parsers between the client and here might read in two ways."""
        if len(self._lengths) > 1 or (self._lengths and self._is_chunked):
            return Problem(400, "unreadable", "the body's length is given twice; send one Content-Length, or Transfer-Encoding: chunked")
        if self._lengths and not (self._lengths[0].isdigit() and len(self._lengths[0]) <= 18):
            return Problem(400, "unreadable", "Content-Length is not a number of bytes; send the body's length in decimal digits")
        if len(self._hosts) > 1 or (not self._hosts and self._scope.get("http_version") == "1.1"):
            return Problem(400, "unreadable", f"the request has {len(self._hosts)} Host headers, expected one; send one")
        if self._method not in METHODS:
            return Problem(405, "method", "the method is none of HTTP's; send one that Allow names", {"Allow": ", ".join(sorted(METHODS))})
        return None

    def _not_ours(self) -> Problem | None:
        """A Host header with another's name: a page of that name had it point here, to be let in by a browser (DNS rebinding)."""
        hosts = self._guards.hosts
        if hosts is None or (self._hosts and _host_of(self._hosts[0]) in hosts):
            return None
        if self._path in HEALTH and not self._guards.settings.on_loopback:
            return None  # a balancer asks by address
        return Problem(403, "host", "the header Host is none of this server's names; use one, or start the server with --hostname NAME")

    def _foreign(self) -> Problem | None:
        """A page of another site that would send something. Browsers say whose page it is, and pages cannot change what they say."""
        if self._method in SAFE:
            return None
        if self._site is not None:
            if self._site in (b"same-origin", b"none"):
                return None
        elif self._origin is None:
            return None
        else:
            named = _host_of(self._origin.partition(b"://")[2])
            if (
                self._hosts and self._origin.partition(b"://")[2].lower() == self._hosts[0].lower()
            ) or named in self._guards.settings.hosts:
                return None
        return Problem(403, "cross_site", "a page of another site sent this; open this server's own page, or use a program")

    def _not_allowed(self) -> Problem | None:
        """What the key may not do, and a client that asks too often, to guess keys as well."""
        guards = self._guards
        policy = policy_of(self._method, self._path)
        headers = self._scope["headers"]
        if guards.keys:
            self._key = guards.keys.find(headers, cookies_of(headers) if self._has_cookie else {})
        if guards.rates is not None and self._path not in _FREE and not is_page(self._path):
            client = self._scope.get("client")
            wait = guards.rates.take(self._key.name if self._key is not None else f"@{network_of(client[0]) if client else ''}")
            if wait > 0:
                return Problem(429, "rate", "this client asks too often; wait as long as Retry-After says", retry_after(wait))
        if policy is PUBLIC:
            return None
        if not guards.keys:
            if policy is READ:
                return None
            takes_none = Problem(403, "read_only", "this server takes no writes: it has no keys; start it with --keys FILE")
            return guards.state.not_offered(self._method, self._path) or takes_none
        if self._key is None:
            return Problem(401, "key_needed", "expected a key that this server knows; send it as Authorization: Bearer KEY")
        if policy is WRITE and not self._key.may_write:
            says = "this key, or a cookie, may only read; send a key that may write as Authorization: Bearer KEY"
            return Problem(403, "may_not_write", says)
        return None

    def _not_ready(self) -> Problem | None:
        if self._path in _ALWAYS or self._guards.state.ready() or is_page(self._path):
            return None
        return Problem(503, "not_ready", "the server is starting or ending; ask again in a moment, see /readyz", retry_after(2))

    def _too_many(self) -> Problem | None:
        """Before anything is read or made for it: who is over what can be done is told so at once, and costs the others next to nothing."""
        if self._path != SEARCH or not self._guards.state.full():
            return None
        return queue_full()

    def _too_large(self, length: int) -> Problem | None:
        most = _SESSION_BYTES if self._path == SESSION else self._guards.settings.max_body_bytes
        if length <= most:
            return None
        return Problem(413, "too_large", f"the body has more than {most} bytes, which is this server's limit; send less")

    def _too_much(self, size: int) -> Problem | None:
        """All bodies that are on their way lie in memory or in temporary files."""
        guards = self._guards
        if guards.arriving + size > max(guards.settings.max_arriving_bytes, guards.settings.max_body_bytes):
            return Problem(429, "too_many", "too many large requests are on their way already; ask again in a moment", retry_after(1))
        self._arriving += size
        guards.arriving += size
        return None

    async def _swallow(self) -> None:
        """Take a small body that came with its head, so that a client that is asked to wait keeps its connection."""
        if self._is_chunked or not self._body_is_due or int(self._lengths[0]) > _SWALLOWED:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SWALLOWED_S):
                while self._body_is_due:
                    self._body_is_due = bool((await self._receive()).get("more_body", False))

    async def _read(self) -> Message:
        """`receive` of the application: counted, and no longer than the body may take."""
        if not self._body_is_due:
            return await self._receive()
        if not self._deadline:
            self._deadline = asyncio.get_running_loop().time() + self._guards.settings.body_timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._guards.settings.body_timeout_s
            self._refused = True
            self._problem = Problem(408, "too_slow", f"the body did not arrive within {seconds:g} seconds; send it faster, or less")
            raise self._problem from None
        if message["type"] == "http.disconnect":
            raise GoneError
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._bytes_in += size
            self._problem = self._problem or self._too_large(self._bytes_in) or self._too_much(size)
            if self._problem is not None:
                self._refused = True
                raise self._problem
            self._body_is_due = bool(message.get("more_body", False))
        return message

    async def _write(self, message: Message) -> None:
        """`send` of the application."""
        if self._problem is not None and not self._status:
            await self._answer(self._problem)  # whatever it made of the exception that `_read` raised
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            await self._begin(message["status"], message.get("headers", ()))
        else:
            await self._continue(message.get("body", b""), more=message.get("more_body", False))

    async def _begin(self, status: int, headers: Any) -> None:
        kept, is_cached = answer_headers(self.request_id), False
        for name, value in headers:
            name = name.lower()
            if name not in _OURS:
                kept.append((name, value))
                is_cached = is_cached or name == b"cache-control"
        if not is_cached:
            kept.append((b"cache-control", b"no-store"))
        if self._body_is_due:
            kept.append((b"connection", b"close"))  # else the rest would be read as the next request
        self._status = status
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def _continue(self, body: bytes, *, more: bool) -> None:
        if self._method == "HEAD":
            body = b""
        self._bytes_out += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _answer(self, problem: Problem) -> None:
        self._replaced = True
        body = response_bytes(problem, self.request_id)
        await self._begin(problem.status, response_headers(problem, body))
        await self._continue(body, more=False)

    async def _failed(self, error: Exception) -> None:
        """An exception that the application let through."""
        problem = self._problem or problem_of(error)
        self._problem = problem
        if problem.status == 500:
            self._error = error
        if self._status:
            raise error  # the answer has begun: the server cuts it off
        await self._answer(problem)

    def _account(self, template: str) -> None:
        seconds = time.perf_counter() - self._started
        method = self._method if self._method in METHODS else "other"
        guards = self._guards
        guards.metrics.request(template, method, self._status, seconds)
        if self._problem is not None and self._refused:
            guards.metrics.rejected(self._problem.code)
        guards.log.write(
            request_id=self.request_id,
            method=method,
            route=template,
            status=self._status,
            milliseconds=seconds * 1000,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            key=None if self._key is None else self._key.name,
            reason=None if self._problem is None else self._problem.code,
            error=self._error,
        )


def _template_in(scope: Scope) -> str | None:
    """The template of the route that took the request: with the prefixes of the routers that it is in, which FastAPI keeps apart."""
    route = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return getattr(route, "path_format", None) or getattr(route, "path", None)


def _host_of(header: bytes) -> str:
    """The name in a Host header: without the port, in lower case; "" for what is none."""
    found = _HOST.fullmatch(header.strip(b" \t").lower())
    return "" if found is None else found[1].decode("ascii").removesuffix(".")
