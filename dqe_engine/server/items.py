"""`/v1/items` and `/v1/facets`: what can be found, its pictures, and the writes."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from starlette.datastructures import UploadFile

from dqe_engine.errors import InputError
from dqe_engine.index.filters import described
from dqe_engine.index.snapshot import Item

from .bodies import read_body, read_parts
from .messages import (
    MOST_ID,
    FacetsResponse,
    ItemResponse,
    ItemsResponse,
    MetadataChange,
    NewItem,
    RemovedResponse,
    WrittenResponse,
    check_filter,
    read_json,
)
from .openapi import body, responds
from .photos import SIZES
from .problems import Problem
from .service import Service

Size = Annotated[int, Query(description="Pixels on the longer side.", json_schema_extra={"enum": list(SIZES)})]
_KEPT = {"Cache-Control": "private, max-age=60, must-revalidate"}
ItemId = Annotated[str, Path(description="Percent-encoded: `gallery%2F000001.jpg`.", min_length=1, max_length=12 * MOST_ID)]
FilterText = Annotated[
    str | None, Query(alias="filter", description='A filter as JSON: `{"colour": "red"}` (docs/queries.md).', max_length=8_000)
]


def router(service: Service) -> APIRouter:
    """Routes of one service. Ids in paths arrive percent-encoded: see `ItemPaths`."""
    routes = APIRouter(prefix="/v1", tags=["items"])

    @routes.get("/items", summary="List items, the oldest first", responses=responds(ItemsResponse, 401, 404, 422, 429, 503, 504))
    async def list_items(
        limit: Annotated[int, Query(ge=1, le=1_000)] = 50,
        after: Annotated[str | None, Query(description="`next` of the page before.", max_length=64)] = None,
        filter: FilterText = None,
    ) -> Response:
        snapshot = service.engine.searched.snapshot()
        row = None if after is None else _row(after, snapshot.generation)
        page = await service.of_index(partial(snapshot.page, _filter(filter), after=row, limit=limit))
        next = None if page.next is None else f"{snapshot.generation}-{page.next}"
        return _json(ItemsResponse(tuple([_item(item) for item in page.items]), next, page.total))

    @routes.get("/facets", summary="Metadata keys, their values and counts", responses=responds(FacetsResponse, 401, 422, 429, 503))
    async def facets(filter: FilterText = None) -> Response:
        found = await service.of_index(service.engine.searched.snapshot().facets, _filter(filter))
        return _json(FacetsResponse(found.total, found.facets))

    @routes.get(
        "/items/{id:path}/image",
        summary="An item's picture, scaled down",
        response_class=Response,
        responses=responds(None, 304, 401, 404, 422, 429, 503, 504)
        | {200: {"description": "The picture.", "content": {kind: {} for kind in ("image/jpeg", "image/png", "image/webp")}}},
    )
    async def image(request: Request, id: ItemId, size: Size = 320) -> Response:
        item = await _existing(service, id)
        if (known := request.headers.get("if-none-match")) is not None:
            etag = await service.in_thread(service.photos.etag, item.id, item.content, size)
            if _matches(known, etag):
                return Response(status_code=304, headers={"ETag": etag, **_KEPT})
        found = await service.picture(item.id, item.content, size)
        return Response(found.data, media_type=found.media_type, headers={"ETag": found.etag, **_KEPT})

    @routes.get("/items/{id:path}", summary="One item", responses=responds(ItemResponse, 401, 404, 422, 429, 503, 504))
    async def get(id: ItemId) -> Response:
        return _json(_item(await _existing(service, id)))

    @routes.post(
        "/items",
        status_code=201,
        summary="Add an item, or replace it",
        openapi_extra=body(parts={"image": None, "item": NewItem}, required=["image", "item"]),
        responses=responds(WrittenResponse, 400, 401, 403, 408, 409, 413, 415, 422, 429, 503, 504, 507, status=201),
    )
    async def add(request: Request) -> Response:
        item, data = await _uploaded(service, request)
        service.check_image(data)
        written = await service.write(service.writes.add, item.id, data, item.metadata, replace=item.replace)
        return _json(WrittenResponse(written.id, written.revision, written.content), status=201)

    @routes.patch(
        "/items/{id:path}",
        summary="Give an item other metadata",
        openapi_extra=body(json=MetadataChange),
        responses=responds(WrittenResponse, 400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504, 507),
    )
    async def change(request: Request, id: ItemId) -> Response:
        changed = _written(id)
        asked = read_json(await read_body(request, "application/json"), MetadataChange)
        written = await service.write(service.writes.update, changed, asked.metadata)
        return _json(WrittenResponse(written.id, written.revision, written.content))

    @routes.delete(
        "/items/{id:path}", summary="Remove an item", responses=responds(RemovedResponse, 401, 403, 404, 422, 429, 503, 504, 507)
    )
    async def remove(id: ItemId) -> Response:
        written = await service.write(service.writes.remove, _written(id))
        return _json(RemovedResponse(written.id, written.revision))

    return routes


async def _uploaded(service: Service, request: Request) -> tuple[NewItem, bytes]:
    async with read_parts(request, texts=("item",), files=("image",)) as parts:
        upload, told = parts.get("image"), parts.get("item")
        if not isinstance(upload, UploadFile) or told is None:
            raise Problem(422, "missing_part", "a part is missing; send both 'image' (a file) and 'item' (JSON with its id)")
        with service.upload():  # from then on `Writes` bounds what waits
            return read_json(str(told), NewItem), await upload.read()


def _row(after: str, generation: str | None) -> int:
    """Of a page's `next`. Raises Problem where rows have other numbers now."""
    made_in, dash, row = after.rpartition("-")
    if not dash or not row.isascii() or not row.isdigit():
        raise InputError(f"after: expected `next` of the page before, got {after!r}; begin again without after")
    if made_in != generation:
        raise Problem(404, "page_gone", "the index was compacted or replaced since that page; begin again without after")
    return int(row)


def _id(encoded: str) -> str:
    try:
        return unquote(encoded, errors="strict")
    except UnicodeDecodeError as error:
        raise Problem(404, "unknown_item", "the id in the path is not UTF-8, so no item has it; percent-encode the id as UTF-8") from error


def _written(encoded: str) -> str:
    """The id of an item that is to be changed. Raises Problem for the address of its picture, which ends in a slash of its own."""
    if encoded.endswith("/image"):
        raise Problem(405, "method", "a picture can only be read; to change it, replace its item; in ids, / is %2F", {"Allow": "GET"})
    return _id(encoded)


async def _existing(service: Service, encoded: str) -> Item:
    """As this process sees it now. For reading: writes ask `Writes`, which sees what others have saved."""
    id, index = _id(encoded), service.engine.searched
    find = index.snapshot().find
    (item,) = find([id]) if index.at_hand else await service.of_index(find, [id])
    if item is None:
        raise Problem(404, "unknown_item", f"{described(id)} is not in the index")
    return item


def _filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        filter = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f'filter: expected a JSON object such as {{"colour": "red"}}, got {text[:80]!r}: {error}') from error
    check_filter(filter)
    return filter


def _matches(sent: str, etag: str) -> bool:
    """Of `If-None-Match` (RFC 9110, 13.1.2), which compares weakly."""
    return sent.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in sent.split(",")]


def _item(item: Item) -> ItemResponse:
    return ItemResponse(item.id, item.metadata, item.content)


def _json(answer: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status, {"Cache-Control": "no-store"}, "application/json")
