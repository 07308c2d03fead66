"""`Problem`: an answer that is an error, and what becomes of every exception.

| status | means, and nothing else |
|---|---|
| 400 | what came is no HTTP message, or no JSON or multipart that can be read |
| 401 | a key is needed, or unknown |
| 403 | the key may not do this, the server takes no writes, or the request was not meant for this server |
| 404, 405 | no such item, image or route; the method, or what the index does not offer |
| 408 | the request did not arrive in time |
| 409 | the item exists |
| 413, 415 | the body is over the limit; its type is not taken |
| 422 | read, and not acceptable |
| 429 | too many |
| 431 | the request's line and headers are over the limit |
| 500 | our bug |
| 503 | not ready, or a part of the index gives no answer |
| 504 | the deadline passed |
| 507 | the disk is full, or refuses |
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from ..errors import DeadlineError, DQEError, IndexConflictError, InputError, NoAnswerError, OverloadError
from .headers import answer_headers, request_id_of

CODES: Mapping[int, str] = {
    400: "unreadable",
    401: "key_needed",
    403: "forbidden",
    404: "not_found",
    405: "method",
    408: "too_slow",
    409: "exists",
    413: "too_large",
    415: "type",
    422: "invalid",
    429: "too_many",
    431: "head_too_large",
    500: "internal",
    503: "not_ready",
    504: "deadline",
    507: "disk",
}
"""The statuses of problems, and the code of a problem that has no code of its own."""

LONGEST_MESSAGE = 1000
_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))
_FAILED = "the server failed; tell whoever runs it the request id"
# In quotes, spaces belong to the path; else it ends where a word does. One name after a slash may be an id, so it stays.
# Nothing is tried twice (possessive), so the time is linear whatever a client sent.
_QUOTED_PATH = re.compile(r"""(['"])(?:/|[A-Za-z]:\\)(?:[^'"/\\]*+[/\\])*+([^'"/\\]*+)\1""")
_PATH = re.compile(r"""(?<![\w/.:%…-])/(?:[^\s/:;,'"()]++/)++([^\s/:;,'"()]*+)""")


class GoneError(Exception):
    """The client has left: there is nobody to answer, and nothing to tell."""


def without_paths(text: str) -> str:
    """Of absolute paths only the last name stays."""
    return _PATH.sub(r"…/\1", _QUOTED_PATH.sub(r"\1…/\2\1", text))


class Problem(DQEError):  # noqa: N818 - as in RFC 9457
    """An answer that is an error.

    `code`: a word for programs. The message is one line: what came, what was expected, the remedy. Control characters in it are escaped,
    and of absolute paths only the last name stays. `headers`: further headers of the answer, such as Retry-After.
    """

    def __init__(self, status: int, code: str, message: object, headers: Mapping[str, str] | None = None) -> None:
        """`status`: one of `CODES`; another is a bug."""
        if status not in CODES:
            raise ValueError(f"{status} is no status of a problem; expected one of {sorted(CODES)}")
        text = without_paths(str(message)[: 4 * LONGEST_MESSAGE])
        super().__init__(text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…")
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def __reduce__(self) -> tuple[type[Problem], tuple[int, str, str, dict[str, str]]]:
        return type(self), (self.status, self.code, str(self), self.headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header of a problem that passes: whole seconds, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(min(seconds, 86400))))}


def queue_full() -> Problem:
    """Of a search."""
    return Problem(429, "queue_full", "too many searches wait already; ask again in a moment", retry_after(1))


def no_answer(parts: Sequence[str]) -> Problem:
    """Where shards or a database are lost, without which there is none. parts: their names, which `/readyz` has too, if they are known. Who
    runs the server reads in the log why."""
    if not parts:
        which = "a part of the index gives no answer"
    else:
        named = ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")
        which = f"part {named} of the index gives no answer" if len(parts) == 1 else f"parts {named} of the index give no answer"
    return Problem(503, "no_answer", f"{which}, so there is none; ask again in a moment", retry_after(5))


def problem_of(error: BaseException) -> Problem:
    """What a client is told about an error. What it cannot mend is told in general words: our own message may name files."""
    if isinstance(error, Problem):
        return error
    if _errnos(error) & _DISK:
        return Problem(507, "disk", "the server cannot write to its disk; check whether the change was made, and tell whoever runs it")
    if isinstance(error, OverloadError):
        return Problem(429, "queue_full", "too many requests wait already; ask again in a moment", retry_after(1))
    if isinstance(error, DeadlineError | TimeoutError):
        return Problem(504, "deadline", "there was no answer within the deadline; ask again later")
    if isinstance(error, IndexConflictError):
        return Problem(503, "busy", "the index is being written by another program; ask again in a moment", retry_after(5))
    if isinstance(error, NoAnswerError):
        return no_answer(error.parts)
    if isinstance(error, InputError):
        return Problem(422, "invalid", error)
    if isinstance(error, OSError) and error.errno in _DESCRIPTORS:
        return Problem(429, "too_many", "the server has too many files and connections open; ask again in a moment", retry_after(1))
    return _of_framework(error) or Problem(500, "internal", _FAILED)


def response_bytes(problem: Problem, request_id: str) -> bytes:
    """The body: `{"error": {"code": …, "message": …, "request_id": …}}` in UTF-8."""
    error = {"code": problem.code, "message": str(problem), "request_id": request_id}
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode()


def response_headers(problem: Problem, body: bytes) -> list[tuple[bytes, bytes]]:
    """Those of the answer with `body`, as ASGI wants them: type, length, never cached, WWW-Authenticate of a 401, and the problem's own."""
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers + [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in problem.headers.items()]


def raw_answer(problem: Problem, request_id: str | None = None, *, closes: bool = True) -> bytes:
    """A whole HTTP/1.1 answer, for where no application is reached. `closes`: whether the connection ends with it."""
    request_id = request_id_of(None) if request_id is None else request_id
    body = response_bytes(problem, request_id)
    headers = [*answer_headers(request_id), *response_headers(problem, body)]
    if closes:
        headers.append((b"connection", b"close"))
    phrase = HTTPStatus(problem.status).phrase.encode()
    lines = [b"HTTP/1.1 %d %s" % (problem.status, phrase), *(name + b": " + value for name, value in headers), b"", body]
    return b"\r\n".join(lines)


def _errnos(error: BaseException) -> set[int]:
    """Of the error and of what it was raised from: a save that fails says so in an error of our own."""
    return {cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno is not None}


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _of_framework(error: BaseException) -> Problem | None:
    """Of what Starlette and FastAPI raise: an unknown route, another method, a body that is not what the route declares."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if isinstance(error, RequestValidationError):
        first: Mapping[str, Any] = next(iter(error.errors()), {})
        # Not the value, which may be long, or somebody's secret.
        where = ".".join(str(part) for part in first.get("loc", ())) or "request"
        if first.get("type") == "json_invalid":
            return Problem(400, "unreadable", f"the body is not valid JSON ({where}); send one value in UTF-8")
        return Problem(422, "invalid", f"{where}: {first.get('msg', 'not acceptable')}; see /openapi.json for what is expected")
    if not isinstance(error, HTTPException):
        return None
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, "not_found", "no such route; see /openapi.json for those there are", headers)
    if error.status_code == 405:
        return Problem(405, "method", "this route does not take that method; the header Allow names those it takes", headers)
    status = error.status_code if error.status_code in CODES else 400 if 400 <= error.status_code < 500 else 500
    return Problem(status, CODES[status], error.detail if status < 500 else _FAILED, headers)
