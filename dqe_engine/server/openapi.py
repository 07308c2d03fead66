"""OpenAPI of bodies: schemas come from the types of `messages`, which requests are read by and answers written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .messages import ErrorResponse

_SAYS = {
    304: "The image is the one whose ETag was sent.",
    400: "No HTTP message, JSON or multipart that can be read.",
    401: "A key is needed, or this one is unknown.",
    403: "This key may not do this, the server takes no writes, or the Host is another's.",
    404: "No such item or image.",
    405: "The index of this server does not offer it; `Allow` names the methods that it does.",
    408: "The request did not arrive in time.",
    409: "There is an item of this id.",
    413: "The body is over the limit.",
    415: "A content type or an image format that is not taken.",
    422: "Read, and not acceptable: a field, a value, or an image that is damaged or over a limit.",
    431: "The address and the headers are over the limit.",
    429: "Too many: the queue is full, or this client's rate is over. `Retry-After` says how many seconds to wait.",
    503: "Not ready: starting, draining, a part of the index gives no answer, or it is being written by a bulk job. See `Retry-After`.",
    504: "The deadline passed.",
    507: "The disk is full, or refuses.",
}
_types: dict[str, Any] = {}


def _reference(type: Any) -> dict[str, str]:
    _types[type.__name__] = type
    return {"$ref": f"#/components/schemas/{type.__name__}"}


def responds(success: Any, *statuses: int, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Of a route: what it answers, and by which of the problems it may fail."""
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": "The answer.", "content": {"application/json": {"schema": _reference(success)}}}
        if success
        else {"description": "Done."}
    }
    for failed in (*statuses, 431):
        answers[failed] = {"description": _SAYS[failed]}
        if failed >= 400:
            answers[failed]["content"] = {"application/json": {"schema": _reference(ErrorResponse)}}
        if failed in (429, 503):
            answers[failed]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return answers


def body(
    *, json: Any = None, examples: Mapping[str, Any] | None = None, parts: Mapping[str, Any] | None = None, required: Sequence[str] = ()
) -> dict[str, Any]:
    """Of a route's `openapi_extra`. `parts`: of multipart/form-data, a type that is sent as JSON, or None for a file."""
    content: dict[str, Any] = {}
    if json is not None:
        content["application/json"] = {"schema": _reference(json)} | ({"examples": dict(examples)} if examples else {})
    if parts is not None:
        file = {"type": "string", "format": "binary"}
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "properties": {name: file if type is None else _reference(type) for name, type in parts.items()},
                "required": list(required),
                "additionalProperties": False,
            },
            "encoding": {name: {"contentType": "application/json"} for name, type in parts.items() if type is not None},
        }
    return {"requestBody": {"required": True, "content": content}}


def schemas() -> dict[str, Any]:
    """Of all types that routes named, for `components`."""
    _, found = msgspec.json.schema_components(list(_types.values()), ref_template="#/components/schemas/{name}")
    return dict(found)
