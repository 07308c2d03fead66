"""Log lines."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import re
from typing import Any

import pytest

from dqe_engine.server.headers import request_id_of
from dqe_engine.server.logs import AccessLog, JSONLines, configuration, described


def line(**changed: Any) -> dict[str, Any]:
    stream = io.StringIO()
    fields: dict[str, Any] = {
        "request_id": "r",
        "method": "GET",
        "route": "/v1/items/{id}",
        "status": 200,
        "milliseconds": 1.23456,
        "bytes_in": 0,
        "bytes_out": 7,
        "key": None,
    }
    AccessLog(stream).write(**{**fields, **changed})
    assert stream.getvalue().count("\n") == 1
    parsed: dict[str, Any] = json.loads(stream.getvalue())
    return parsed


def test_a_line_has_what_operators_need() -> None:
    fields = line(key="ci")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {
        "level": "info",
        "request_id": "r",
        "method": "GET",
        "route": "/v1/items/{id}",
        "status": 200,
        "ms": 1.235,
        "bytes_in": 0,
        "bytes_out": 7,
        "key": "ci",
    }


@pytest.mark.parametrize(("status", "level"), [(200, "info"), (404, "info"), (503, "warning"), (507, "warning"), (500, "error")])
def test_levels(status: int, level: str) -> None:
    assert line(status=status)["level"] == level


def test_a_closed_stream_is_let_be() -> None:
    stream = io.StringIO()
    stream.close()
    AccessLog(stream).write(request_id="r", method="GET", route="/", status=200, milliseconds=1, bytes_in=0, bytes_out=0, key=None)


@pytest.mark.parametrize("given", [b"a", b"A-z.0_9", b"x" * 64])
def test_a_good_request_id_is_kept(given: bytes) -> None:
    assert request_id_of(given) == given.decode()


@pytest.mark.parametrize(
    "given", [None, b"", b"x" * 65, b"a b", b"a\r\nSet-Cookie: x=1", b"a\n", b"\xff", b'a"', "é".encode(), b"<script>"]
)
def test_a_bad_request_id_is_replaced(given: bytes | None) -> None:
    first, second = request_id_of(given), request_id_of(given)
    assert first != second
    assert re.fullmatch(r"[0-9a-f]{16}", first)


def raised() -> BaseException:
    try:
        try:
            raise ValueError("secret of a client")
        except ValueError as error:
            raise OSError(28, "secret", "/srv/secret") from error
    except OSError as error:
        return error


def test_an_error_is_told_by_type_and_place() -> None:
    error = described(raised())
    assert (error["type"], error["errno"], error["from"][0]["type"]) == ("OSError", 28, "ValueError")
    assert re.fullmatch(r"server/test_logs.py:\d+ raised", error["at"][-1])
    assert "secret" not in json.dumps(error)


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert len(described(first)["from"]) == 5


def test_loggers_write_lines_too() -> None:
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "x.py", 1, "odd %s\n\ud800", ("name",), None)
    fields = json.loads(JSONLines().format(record))
    assert (fields["level"], fields["logger"], fields["message"]) == ("warning", "uvicorn.error", "odd name\n\\ud800")
    error = raised()
    record = logging.LogRecord("a", logging.ERROR, "x.py", 1, "failed", (), (type(error), error, error.__traceback__))
    assert "secret" not in JSONLines().format(record)


def test_the_configuration_is_one_that_logging_takes(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logging.config.dictConfig(configuration("warning"))
        logging.getLogger("somebody").warning("heard")
        logging.getLogger("somebody").info("not heard")
        logging.getLogger("uvicorn.access").warning("GET /v1/items?filter=secret")
        logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    finally:
        root.handlers[:], root.level = before[0], before[1]
        for silent in map(logging.getLogger, ("uvicorn.access", "PIL")):
            silent.propagate, silent.level = True, logging.NOTSET
    assert [json.loads(entry)["message"] for entry in capsys.readouterr().err.splitlines()] == ["heard"]
