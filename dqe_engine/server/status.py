"""Health, metrics, what can be asked here, the key of a page, and the page itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse

from dqe_engine.index.searched import ABILITIES
from dqe_engine.query import MOST_RESULTS

from .bodies import read_body
from .keys import expired_cookie, session_cookie
from .messages import (
    MOST_EXPLAINED,
    MOST_FILTER_KEYS,
    MOST_FILTER_VALUES,
    MOST_IDS,
    MOST_TEXT,
    AttributeValues,
    HealthResponse,
    ImageLimits,
    Indexing,
    Limits,
    Model,
    ReadyResponse,
    SessionRequest,
    StatusResponse,
    VocabularyResponse,
    read_json,
)
from .metrics import MEDIA_TYPE
from .openapi import body, responds
from .problems import Problem, no_answer, without_paths
from .progress import read_progress
from .service import Service

PAGE = Path(__file__).with_name("page")


def router(service: Service) -> APIRouter:
    """Routes of one service."""
    routes = APIRouter()

    @routes.get("/healthz", tags=["operation"], summary="The process runs", responses=responds(HealthResponse))
    async def health() -> Response:
        return _json(HealthResponse("ok"))

    @routes.get("/readyz", tags=["operation"], summary="It answers searches", responses=responds(ReadyResponse, 503))
    async def ready() -> Response:
        if not service.ready():
            raise Problem(503, service.phase, f"this server is {service.phase}; ask again in a second", headers={"Retry-After": "1"})
        if not service.health.answers:
            raise no_answer(service.health.lost)
        return _json(ReadyResponse("ready", service.index.items, service.index.revision, service.following, service.health.lost))

    @routes.get("/metrics", tags=["operation"], summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        service.measure()
        return Response(await service.in_thread(service.metrics.render), headers={"Content-Type": MEDIA_TYPE})

    @routes.get("/v1/vocabulary", tags=["search"], summary="What can be asked here", responses=responds(VocabularyResponse, 401, 429, 503))
    async def vocabulary() -> Response:
        manifest, policy, settings = service.engine.bundle.manifest, service.engine.image_policy, service.settings
        return _json(
            VocabularyResponse(
                model=Model(manifest.name, manifest.model_hash, manifest.composition),
                attributes=tuple([AttributeValues(one.name, one.values) for one in manifest.vocabulary.attributes]),
                image=ImageLimits(policy.usable_formats, min(policy.max_bytes, settings.max_body_bytes), policy.max_pixels),
                limits=Limits(
                    MOST_RESULTS, MOST_EXPLAINED, MOST_TEXT, MOST_IDS, MOST_FILTER_KEYS, MOST_FILTER_VALUES, settings.max_body_bytes
                ),
                index=service.index,
                writes="write" not in service.lacks and any(key.may_write for key in settings.keys),
                keys=bool(settings.keys),
                zones=manifest.zones is not None,
                offers=tuple([ability for ability in ABILITIES if ability not in service.lacks]),
            )
        )

    @routes.get(
        "/v1/status", tags=["operation"], summary="What goes on in the background", responses=responds(StatusResponse, 401, 429, 503)
    )
    async def status() -> Response:
        file, found = service.settings.progress_file, None
        if file is not None and (now := await service.in_thread(read_progress, file)) is not None:
            found = Indexing(now.state, now.done, now.total, without_paths(now.message), now.skipped)
        return _json(StatusResponse(found, service.index.items, service.index.revision))

    @routes.post(
        "/v1/session",
        status_code=204,
        tags=["operation"],
        summary="Keep a key in a cookie, for reading",
        openapi_extra=body(json=SessionRequest),
        response_class=Response,
        responses=responds(None, 400, 401, 408, 413, 415, 422, 429, status=204),
    )
    async def open_session(request: Request) -> Response:
        key = read_json(await read_body(request, "application/json"), SessionRequest).key
        if service.keyring.match(key) is None:
            raise Problem(401, "unknown_key", "this key is unknown; ask whoever runs this server for one")
        return Response(status_code=204, headers={"Set-Cookie": session_cookie(key, secure=request.url.scheme == "https")})

    @routes.delete("/v1/session", status_code=204, tags=["operation"], summary="Forget the cookie", response_class=Response,
                   responses=responds(None, status=204))  # fmt: skip
    async def close_session(request: Request) -> Response:
        return Response(status_code=204, headers={"Set-Cookie": expired_cookie(secure=request.url.scheme == "https")})

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    return routes


def _json(answer: Any) -> Response:
    return Response(msgspec.json.encode(answer), headers={"Cache-Control": "no-store"}, media_type="application/json")
