"""`POST /v1/search`."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from dqe_engine.errors import InputError
from dqe_engine.results import SearchResult

from .bodies import read_body, read_parts
from .messages import SearchRequest, read_json
from .openapi import body, responds
from .problems import Problem
from .service import Service

_EXAMPLES = {
    "an item, changed": {"value": {"reference_id": "gallery/000001.jpg", "text": "is red and has stripes", "k": 10}},
    "similar items": {"value": {"reference_id": "gallery/000001.jpg"}},
    "weights and a filter": {
        "value": {"reference_id": "gallery/000001.jpg", "text": "is red", "weights": {"colour": 0.5}, "filter": {"price": {"<": 20}}}
    },
}


def router(service: Service) -> APIRouter:
    """Routes of one service."""
    routes = APIRouter(prefix="/v1", tags=["search"])

    @routes.post(
        "/search",
        summary="Search by an image, a text, or both",
        openapi_extra=body(json=SearchRequest, examples=_EXAMPLES, parts={"image": None, "query": SearchRequest}, required=["image"]),
        responses=responds(SearchResult, 400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504),
    )
    async def search(request: Request) -> Response:
        with ExitStack() as held:
            query, image = await _asked(service, request, held)
            result = await service.search(query.query(image), deadline_s=service.deadline(request.headers), gone=until_gone(request))
        answer = msgspec.json.encode(result)
        stages = ", ".join(f"{stage};dur={spent:.2f}" for stage, spent in result.timings_ms.items())
        return Response(answer, media_type="application/json", headers={"Server-Timing": stages, "Cache-Control": "no-store"})

    return routes


async def _asked(service: Service, request: Request, held: ExitStack) -> tuple[SearchRequest, bytes | None]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return read_json(await read_body(request, "application/json"), SearchRequest), None
    async with read_parts(request, texts=("query",), files=("image",)) as parts:
        upload = parts.get("image")
        if not isinstance(upload, UploadFile):
            raise Problem(422, "no_image", "the part 'image' is missing; send the file in it, or the query as application/json")
        asked = read_json(str(parts.get("query") or "{}"), SearchRequest)
        if asked.reference_id is not None:
            raise InputError("got both the part 'image' and reference_id, expected one reference; leave one out")
        held.enter_context(service.upload())  # until the answer
        data = await upload.read()
        service.check_image(data)
        return asked, data


async def until_gone(request: Request) -> None:
    """Returns when the client has gone. For requests whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)
