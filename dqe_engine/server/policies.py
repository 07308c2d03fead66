"""Which requests are public, reads or writes, by one table, and what they are counted under.

What the table does not name is read with GET, HEAD and OPTIONS, and else a write: a new route is protected before anybody thinks of it.
"""

from __future__ import annotations

from .headers import SEARCH

PUBLIC, READ, WRITE = "public", "read", "write"
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
_PUBLIC_PATHS = frozenset(("/", "/healthz", "/readyz", "/openapi.json"))  # with SAFE methods
_PAGE = "/page/"  # and what is under it
SESSION = "/v1/session"
_EXCEPTIONS = {("POST", SEARCH): READ, ("POST", SESSION): PUBLIC, ("DELETE", SESSION): PUBLIC}
HEALTH = frozenset(("/healthz", "/readyz"))
_TEMPLATES = _PUBLIC_PATHS | frozenset(("/metrics", "/v1/vocabulary", "/v1/status", "/v1/facets", "/v1/search", "/v1/items", SESSION))


def policy_of(method: str, path: str) -> str:
    """PUBLIC, READ or WRITE. `path`: decoded, as routes are matched; only what is spelled as in the table is what the table says."""
    exception = _EXCEPTIONS.get((method, path))
    if exception is not None:
        return exception
    if method not in SAFE:
        return WRITE
    return PUBLIC if path in _PUBLIC_PATHS or is_page(path) else READ


def template_of(path: str) -> str:
    """What a request that reached no route is counted under: a known path, or what it is like; never what was sent."""
    if path in _TEMPLATES:
        return path
    if path.startswith("/v1/items/"):
        return "/v1/items/{id}/image" if path.endswith("/image") else "/v1/items/{id}"
    return "/page/{name}" if is_page(path) else "other"


def is_page(path: str) -> bool:
    """Whether it is a file of the page, and nowhere else by way of it."""
    return path.startswith(_PAGE) and not any(part in ("", ".", "..") for part in path[len(_PAGE) :].split("/")) and "\\" not in path
