"""Headers that every answer has, and the id of a request."""

from __future__ import annotations

import random
import re

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SECURITY = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
SEARCH = "/v1/search"
"""The route that is refused before all others where too much is asked."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def request_id_of(given: bytes | None) -> str:
    """The id of a request: the one that the client chose, where it has 1 to 64 letters, digits and `.` `_` `-`; else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return f"{random.getrandbits(64):016x}"  # tells requests apart, and keeps no secret


def answer_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    """Headers of every answer: what browsers may do with it, and the request's id."""
    return [(b"x-request-id", request_id.encode("ascii")), *SECURITY]
