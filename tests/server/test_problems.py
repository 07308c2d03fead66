"""`Problem` and what becomes of exceptions."""

from __future__ import annotations

import errno
import json
import pickle

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dqe_engine.errors import (
    BackendError,
    BundleError,
    DeadlineError,
    IndexConflictError,
    IndexFormatError,
    InputError,
    OverloadError,
)
from dqe_engine.server.problems import (
    CODES,
    LONGEST_MESSAGE,
    Problem,
    problem_of,
    response_bytes,
    response_headers,
    retry_after,
    without_paths,
)


def raised_from(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Problem(404, "unknown_item", "no x"), 404, "unknown_item"),
        (InputError("k is 0, expected 1 or more"), 422, "invalid"),
        (OverloadError("full"), 429, "queue_full"),
        (DeadlineError("late"), 504, "deadline"),
        (TimeoutError(), 504, "deadline"),
        (IndexConflictError("other"), 503, "busy"),
        (OSError(errno.ENOSPC, "x", "/srv/index"), 507, "disk"),
        (OSError(errno.EDQUOT, "x"), 507, "disk"),
        (OSError(errno.EIO, "x"), 507, "disk"),
        (OSError(errno.EROFS, "x"), 507, "disk"),
        (raised_from(IndexFormatError("/srv/index: no space"), OSError(errno.ENOSPC, "x")), 507, "disk"),
        (OSError(errno.EMFILE, "x"), 429, "too_many"),
        (OSError(errno.EACCES, "x", "/srv/index"), 500, "internal"),
        (IndexFormatError("/srv/index/data.bin is damaged"), 500, "internal"),
        (BundleError("/srv/bundle is damaged"), 500, "internal"),
        (BackendError("libcuda.so.1"), 500, "internal"),
        (ValueError("/srv/secret"), 500, "internal"),
        (KeyError("x"), 500, "internal"),
        (MemoryError(), 500, "internal"),
        (HTTPException(404), 404, "not_found"),
        (HTTPException(405, headers={"Allow": "GET"}), 405, "method"),
        (HTTPException(400, detail="There was an error parsing the body"), 400, "unreadable"),
        (HTTPException(418), 400, "unreadable"),
        (HTTPException(502, detail="/srv/x"), 500, "internal"),
        (RequestValidationError([{"type": "json_invalid", "loc": ("body", 3), "msg": "JSON decode error"}]), 400, "unreadable"),
        (RequestValidationError([{"type": "int", "loc": ("query", "k"), "msg": "not an integer", "input": "hunter2"}]), 422, "invalid"),
    ],
)
def test_each_error_has_its_status(error: BaseException, status: int, code: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.code) == (status, code)
    assert "/srv" not in str(problem)
    assert "hunter2" not in str(problem)
    if status in (429, 503):
        assert int(problem.headers["Retry-After"]) >= 1


def test_the_header_that_names_the_methods_is_kept() -> None:
    assert problem_of(HTTPException(405, headers={"Allow": "GET"})).headers == {"Allow": "GET"}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/srv/data/index: permission denied", "…/index: permission denied"),
        ("cannot read '/srv/my data/a b/index'; check", "cannot read '…/index'; check"),
        ('cannot read "/etc/passwd"', 'cannot read "…/passwd"'),
        ("look into /srv/data/, then", "look into …/, then"),
        ("no item gallery/000001.jpg; see GET /items", "no item gallery/000001.jpg; see GET /items"),
        ("https://example.org/a/b stays", "https://example.org/a/b stays"),
        ("one\nline\x1b[31m\u2028", "one\\nline\\x1b[31m\\u2028"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_a_message_has_neither_paths_nor_control_characters(message: str, shown: str) -> None:
    assert str(Problem(422, "invalid", message)) == shown


def test_a_message_is_bounded() -> None:
    assert len(str(Problem(422, "invalid", "x" * 10**6))) == LONGEST_MESSAGE + 1


def test_the_body_is_one_object_in_utf8() -> None:
    body = response_bytes(Problem(422, "invalid", "größer \ud800 \x00"), "id-1")
    assert json.loads(body.decode()) == {"error": {"code": "invalid", "message": "größer \\ud800 \\x00", "request_id": "id-1"}}


def test_headers_of_an_answer() -> None:
    problem = Problem(401, "key_needed", "x", {"Retry-After": "3"})
    assert response_headers(problem, b"12345") == [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", b"5"),
        (b"cache-control", b"no-store"),
        (b"www-authenticate", b"Bearer"),
        (b"retry-after", b"3"),
    ]


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.2, "1"), (1.5, "2"), (1e12, "86400"), (float("inf"), "86400")])
def test_retry_after_is_whole_seconds(seconds: float, header: str) -> None:
    assert retry_after(seconds) == {"Retry-After": header}


def test_a_problem_crosses_processes() -> None:
    problem = pickle.loads(pickle.dumps(Problem(429, "rate", "slow down", {"Retry-After": "2"})))
    assert (problem.status, problem.code, str(problem), problem.headers) == (429, "rate", "slow down", {"Retry-After": "2"})


def test_an_unknown_status_is_a_bug() -> None:
    with pytest.raises(ValueError, match="418"):
        Problem(418, "teapot", "x")


def test_each_status_is_documented() -> None:
    from dqe_engine.server import problems

    assert all(str(status) in (problems.__doc__ or "") for status in CODES)


def test_what_fastapi_raises_for_a_body_is_known() -> None:
    """The type of the error for a body that is no JSON, as the installed FastAPI names it."""
    from fastapi import Body, Request
    from fastapi.responses import Response
    from fastapi.testclient import TestClient

    app = FastAPI()

    async def answer(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        return Response(response_bytes(problem, "r"), problem.status)

    app.add_exception_handler(RequestValidationError, answer)
    app.add_exception_handler(HTTPException, answer)

    @app.post("/x")
    def take(a: int = Body(embed=True)) -> int:
        return a

    client = TestClient(app, raise_server_exceptions=False)
    assert client.post("/x", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/x", content=b"\xff\xfe{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/x", json={"a": "b"}).status_code == 422
    assert client.get("/x").status_code == 405
    assert client.get("/y").status_code == 404


@pytest.mark.parametrize("unit", ["'/", "/a", "'/a", "/", "'", "('/a b/", "C:\\"])
def test_a_message_of_any_length_takes_no_time(unit: str) -> None:
    """Quadratic work on a megabyte would outlive every patience that a run of tests has."""
    for text in (unit * (1_000_000 // len(unit)), unit + "a" * 1_000_000):
        assert len(str(Problem(422, "invalid", text))) <= LONGEST_MESSAGE + 1
        assert isinstance(without_paths(text), str)
