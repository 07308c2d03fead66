"""Logs: one JSON object a line, to stderr, of requests and of what the process says.

A line never has an image, a text, a filter, an id, a key or a query string: a route is logged by its template, and an error by its type and
the lines of code that it came through. Lines are written by who logs; where nobody reads stderr (a full pipe), the process waits.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import msgspec

_LEVELS = ("info", "warning", "error")
_encode = msgspec.json.Encoder().encode


class AccessLog:
    """A line for each request that was answered, or left."""

    def __init__(self, stream: TextIO | None = None, *, least: str = "info") -> None:
        """`stream`: None for stderr. `least`: info, warning or error; of what matters less, nothing is written."""
        self._stream, self._least = stream, _LEVELS.index(least)

    def write(
        self,
        *,
        request_id: str,
        method: str,
        route: str,
        status: int,
        milliseconds: float,
        bytes_in: int,
        bytes_out: int,
        key: str | None,
        reason: str | None = None,
        error: BaseException | None = None,
    ) -> None:
        """`method`, `route`: one of a bounded set. `status`: 0 where the client left before an answer began. `bytes_in`, `bytes_out`: of
        the bodies. `reason`: the problem's code, where it was refused. `error`: what our bug raised. A stream that fails is let be.
        """
        level = 0 if status < 500 else 1 if status in (503, 504, 507) else 2
        if level < self._least:
            return
        fields: dict[str, Any] = {
            "time": _utc(time.time()),
            "level": _LEVELS[level],
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(milliseconds, 3),
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "key": key,
        }
        if reason is not None:
            fields["reason"] = reason
        if error is not None:
            fields["error"] = described(error)
        with contextlib.suppress(OSError, ValueError):  # a reader that went away, or a closed stream, is no reason to answer nobody
            (self._stream or sys.stderr).write(_encode(fields).decode() + "\n")


class JSONLines(logging.Formatter):
    """What the process's loggers say, as lines of the same form: time, level, logger, message, and the error by type and place."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = described(record.exc_info[1])
        # Lone surrogates, which names of files may have, cannot be encoded.
        fields["message"] = fields["message"].encode("utf-8", "backslashreplace").decode()
        return _encode(fields).decode()


def configuration(level: str = "info") -> dict[str, Any]:
    """For `logging.config.dictConfig`, and so for uvicorn's `log_config`: all loggers to stderr as JSON lines.

    uvicorn's own access log is off: it has paths and query strings. So is Pillow's: what is wrong with an image is its client's to know.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": f"{__name__}.JSONLines"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}},
        "root": {"handlers": ["stderr"], "level": level.upper()},
        "loggers": {name: {"handlers": [], "propagate": False, "level": "CRITICAL"} for name in ("uvicorn.access", "PIL")},
    }


def described(error: BaseException) -> dict[str, Any]:
    """An error's type, and `file:line function` from where it was caught to where it was raised, of its causes as well.

    Not its message, which may have what a client sent.
    """
    found: dict[str, Any] = {"type": type(error).__name__, "at": _places(error.__traceback__)}
    if isinstance(error, OSError) and error.errno is not None:
        found["errno"] = error.errno
    causes: list[dict[str, Any]] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < 5:
        causes.append({"type": type(cause).__name__, "at": _places(cause.__traceback__)})
        cause = cause.__cause__ or cause.__context__
    if causes:
        found["from"] = causes
    return found


def _places(trace: TracebackType | None) -> list[str]:
    """The last 30, innermost last."""
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code
        path = Path(code.co_filename)
        places.append(f"{path.parent.name}/{path.name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places[-30:]


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
