"""`Client` and `AsyncClient`: a `dqe-serve` from Python, answers in the types of its messages. Needs httpx (extra `client`)."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload
from urllib.parse import quote

import httpx
import msgspec

from .errors import DQEError, InputError
from .results import SearchResult
from .server.messages import (
    ErrorResponse,
    FacetsResponse,
    ItemResponse,
    ItemsResponse,
    RemovedResponse,
    SearchRequest,
    VocabularyResponse,
    WrittenResponse,
)

P = ParamSpec("P")
T = TypeVar("T")
_LONGEST_WAIT = 30.0
"""Seconds; a server that asks for more patience gets an error instead."""


class ServerError(DQEError):
    """What the server answered instead. `status`: of HTTP; `code`: for programs, such as "unknown_item"; `request_id`: in its logs;
    `retry_after`: seconds to wait, where it said so."""

    def __init__(self, status: int, code: str, message: str, request_id: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} (status {status}, request {request_id})")
        self.status, self.code, self.request_id, self.retry_after = status, code, request_id, retry_after


@dataclass(frozen=True)
class _Call(Generic[T]):
    """A request, and the type of its answer (bytes: as it came). `again`: whether it may be sent twice."""

    method: str
    path: str
    type: type[T]
    options: dict[str, Any] = field(default_factory=dict)
    again: bool = True


def _path(id: str, rest: str = "") -> str:
    encoded = "%2E" * len(id) if id in (".", "..") else quote(id, safe="")  # dots alone would be taken for folders
    return f"/v1/items/{encoded}{rest}"


def _page(limit: int, after: str | None, filter: Mapping[str, Any] | None) -> _Call[ItemsResponse]:
    return _Call("GET", "/v1/items", ItemsResponse, {"params": _given(limit=limit, after=after, filter=_json(filter))})


def _parts(image: bytes, **told: bytes) -> dict[str, Any]:
    """A multipart body: an image, and JSON beside it."""
    return {"image": ("image", image, "application/octet-stream")} | {name: (None, said, "application/json") for name, said in told.items()}


def _given(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _answer(call: _Call[T], response: httpx.Response) -> T:
    if response.is_success:
        return response.content if call.type is bytes else msgspec.json.decode(response.content, type=call.type)  # type: ignore[return-value]
    try:
        told = msgspec.json.decode(response.content, type=ErrorResponse).error
        code, message, request = told.code, told.message, told.request_id
    except msgspec.DecodeError:  # of a proxy in between, say
        code, message, request = "unknown", response.text[:200], response.headers.get("x-request-id", "unknown")
    after = response.headers.get("retry-after", "")
    raise ServerError(response.status_code, code, message, request, float(after) if after.isdigit() else None)


def _pause(call: _Call[Any], error: ServerError, tried: int, retries: int) -> float | None:
    """Seconds to wait before the request is sent again; None for not at all."""
    if error.status not in (429, 503) or not call.again or tried >= retries:
        return None
    wait = error.retry_after if error.retry_after is not None else 0.1 * 2**tried
    return wait if wait <= _LONGEST_WAIT else None


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class _Method(Generic[P, T]):
    """A method of both clients, made from the function that describes its request: `Client` returns the answer, `AsyncClient` awaits it."""

    def __init__(self, call: Callable[P, _Call[T]]) -> None:
        self._call = call

    @overload
    def __get__(self, client: None, owner: type[Any]) -> Callable[P, _Call[T]]: ...
    @overload
    def __get__(self, client: Client, owner: type[Any]) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type[Any]) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type[Any]) -> Callable[P, Any]:
        if client is None:
            return self._call

        @functools.wraps(self._call)
        def send(*arguments: P.args, **options: P.kwargs) -> Any:
            return client._send(self._call(*arguments, **options))

        return send


class _Methods:
    """What both clients can do, each method once."""

    @_Method
    @staticmethod
    def search(*, image: bytes | None = None, timeout_ms: int | None = None, **query: Any) -> _Call[SearchResult]:
        """query: the fields of `SearchRequest`. timeout_ms: the deadline that the server is told. Raises InputError for other fields."""
        asked = msgspec.json.encode({name: value for name, value in query.items() if value is not None})
        try:
            msgspec.json.decode(asked, type=SearchRequest)
        except msgspec.ValidationError as error:
            raise InputError(f"{error}; the fields of a search are those of SearchRequest") from error
        headers = {} if timeout_ms is None else {"X-Deadline-Ms": str(timeout_ms)}
        if image is None:
            options = {"headers": headers | {"Content-Type": "application/json"}, "content": asked}
        else:
            options = {"headers": headers, "files": _parts(image, query=asked)}
        return _Call("POST", "/v1/search", SearchResult, options)

    @_Method
    @staticmethod
    def item(id: str) -> _Call[ItemResponse]:
        return _Call("GET", _path(id), ItemResponse)

    @_Method
    @staticmethod
    def image(id: str, *, size: int = 320) -> _Call[bytes]:
        """The item's picture, a JPEG, PNG or WebP, its longer side at most `size`: 160, 320 or 640."""
        return _Call("GET", _path(id, "/image"), bytes, {"params": {"size": size}})

    @_Method
    @staticmethod
    def facets(filter: Mapping[str, Any] | None = None) -> _Call[FacetsResponse]:
        return _Call("GET", "/v1/facets", FacetsResponse, {"params": _given(filter=_json(filter))})

    @_Method
    @staticmethod
    def vocabulary() -> _Call[VocabularyResponse]:
        return _Call("GET", "/v1/vocabulary", VocabularyResponse)

    @_Method
    @staticmethod
    def add(id: str, image: bytes, metadata: Mapping[str, Any] | None = None, *, replace: bool = False) -> _Call[WrittenResponse]:
        item = msgspec.json.encode({"id": id, "metadata": metadata, "replace": replace})
        return _Call("POST", "/v1/items", WrittenResponse, {"files": _parts(image, item=item)}, again=False)

    @_Method
    @staticmethod
    def update(id: str, metadata: Mapping[str, Any] | None) -> _Call[WrittenResponse]:
        return _Call("PATCH", _path(id), WrittenResponse, {"json": {"metadata": metadata}}, again=False)

    @_Method
    @staticmethod
    def remove(id: str) -> _Call[RemovedResponse]:
        return _Call("DELETE", _path(id), RemovedResponse, again=False)


class Client(_Methods):
    """One server. A context manager; threads may share it.

    >>> with Client("http://127.0.0.1:8000", key="...") as client:
    ...     result = client.search(reference_id="gallery/000001.jpg", text="is red", k=5)
    ...     result = client.search(image=Path("photo.jpg").read_bytes(), text="is red", weights={"colour": 0.5})
    ...     client.add("shoes/7.jpg", Path("7.jpg").read_bytes(), {"price": 12.5})

    `retries`: how often a search or a read that was answered by 429 or 503 is sent again, after as long as the server said. `options`: of
    `httpx.Client`. Raises ServerError for what the server refuses, InputError for a search
    with fields that there are not, and what httpx raises where there is no server.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 2, **options: Any) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=_headers(key), **options)
        self._retries = retries

    def items(self, filter: Mapping[str, Any] | None = None, *, page: int = 200) -> Iterator[ItemResponse]:
        """All that pass the filter, the oldest first, fetched `page` at a time."""
        after: str | None = None
        while True:
            found = self._send(_page(page, after, filter))
            yield from found.items
            if (after := found.next) is None:
                return

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, call: _Call[T]) -> T:
        for tried in range(self._retries + 1):
            try:
                return _answer(call, self._http.request(call.method, call.path, **call.options))
            except ServerError as error:
                if (wait := _pause(call, error, tried, self._retries)) is None:
                    raise
                time.sleep(wait)
        raise AssertionError


class AsyncClient(_Methods):
    """`Client` for tasks: the same methods, awaited; `items` is iterated by `async for`."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0, retries: int = 2, **options: Any) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, headers=_headers(key), **options)
        self._retries = retries

    async def items(self, filter: Mapping[str, Any] | None = None, *, page: int = 200) -> AsyncIterator[ItemResponse]:
        after: str | None = None
        while True:
            found = await self._send(_page(page, after, filter))
            for item in found.items:
                yield item
            if (after := found.next) is None:
                return

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _send(self, call: _Call[T]) -> T:
        for tried in range(self._retries + 1):
            try:
                return _answer(call, await self._http.request(call.method, call.path, **call.options))
            except ServerError as error:
                if (wait := _pause(call, error, tried, self._retries)) is None:
                    raise
                await asyncio.sleep(wait)
        raise AssertionError
