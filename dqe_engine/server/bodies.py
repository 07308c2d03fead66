"""Bodies of requests: their content type is held, and of multipart only what is expected is taken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from .problems import Problem

_MOST_FIELD = 1 << 20
"""Bytes of a part that is no file; files are bounded by the whole body."""


async def read_body(request: Request, media_type: str) -> bytes:
    """The body. Raises Problem 415 where it is said to be of another type."""
    _require(request, media_type)
    return await request.body()


@asynccontextmanager
async def read_parts(request: Request, *, texts: Sequence[str], files: Sequence[str]) -> AsyncIterator[FormData]:
    """Parts of a multipart body, each at most once. Raises Problem: 400 for what cannot be read, 415, 422 for other parts."""
    _require(request, "multipart/form-data")
    try:
        form = await request.form(max_files=len(files), max_fields=len(texts), max_part_size=_MOST_FIELD)
    except (HTTPException, FormParserError) as error:  # Starlette passes on the parser's own
        why = error.detail if isinstance(error, HTTPException) else error
        says = f"the body cannot be read as multipart/form-data ({why}); send it as /openapi.json describes"
        raise Problem(400, "invalid_multipart", says) from error
    try:
        names = [name for name, _ in form.multi_items()]
        for name, value in form.multi_items():
            if names.count(name) > 1 or name not in (files if isinstance(value, UploadFile) else texts):
                kind = "file" if isinstance(value, UploadFile) else "field"
                taken = f"the files {', '.join(files)} and the fields {', '.join(texts)}, each at most once"
                raise Problem(422, "unexpected_part", f"got a {kind} {name!r}, expected {taken}; leave out what is not among them")
        yield form
    finally:
        await form.close()


def _require(request: Request, media_type: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != media_type:
        says = f"the content type is {given or 'missing'}, expected {media_type}; set the header Content-Type"
        raise Problem(415, "unsupported_media_type", says)
