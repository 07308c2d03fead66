"""Requests and answers as bytes."""

from __future__ import annotations

import json
import re
import time
from typing import Any

IMPLEMENTATIONS = ("httptools", "h11")
GET = b"GET /v1/items HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /v1/items HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\n"


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def statuses(answers: bytes) -> list[int]:
    """Of several answers, whose bodies hold no status line."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def error_of(answer: bytes) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error: dict[str, str] = json.loads(body)["error"]
    assert f"x-request-id: {error['request_id']}".encode() in head
    assert b"content-security-policy: " in head
    return error


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
