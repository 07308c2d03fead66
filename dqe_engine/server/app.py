"""`create_app`: the service behind FastAPI, and the guards before it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dqe_engine import __version__
from dqe_engine.errors import DQEError, UnknownItemError

from . import items, search, status
from .guards import Guards
from .metrics import Metrics
from .offers import offered
from .openapi import schemas
from .operations import BusyError, ItemExistsError
from .overload import Refusals
from .photos import NoPhotoError
from .policies import template_of
from .problems import Problem, problem_of, response_bytes, response_headers, retry_after
from .service import Service
from .settings import ServerSettings
from .starting import take_over

GC_THRESHOLDS = (20_000, 10, 10)
"""Objects made and not freed before Python looks for garbage, instead of 700: under load, that took a tenth of the event loop's time."""


NICENESS = 10
"""Of the threads that search and decode, beside the event loop: see decision 250."""


def create_app(settings: ServerSettings, *, owns_process: bool = False) -> FastAPI:
    """The application of one process. The engine is loaded when its lifespan begins, in the process that serves.

    owns_process: nothing but this application runs here, so Python's garbage collector and the threads' priorities are tuned for it.
    """
    metrics = Metrics(settings)
    service = Service(settings, metrics, niceness=NICENESS if owns_process else 0)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        try:
            await service.open()
        except DQEError as error:
            app.state.failure = str(error)
            raise
        if owns_process:
            _collect_less()
        await asyncio.to_thread(take_over, settings.state)
        try:
            yield {"refuses_search": Refusals(settings, metrics, service)}  # of every connection, see `protocol_httptools`
        finally:
            await service.close()

    app = FastAPI(
        title="DQE-CIR search",
        version=__version__,
        description="Composed image retrieval: search images by a reference image and a text that says what should differ.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    for part in (search, items, status):  # the busiest first
        app.include_router(part.router(service))
    app.mount("/page", _PageFiles(directory=status.PAGE, check_dir=False))
    for kind in (DQEError, HTTPException, RequestValidationError, OSError):
        app.add_exception_handler(kind, _told)
    _describe(app, service)
    app.add_middleware(ItemPaths)
    app.add_middleware(Guards, settings=settings, metrics=metrics, state=service)
    app.add_middleware(FailedStart, state=app.state)
    return app


def _collect_less() -> None:
    """What was loaded stays until the end, and is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class _PageFiles(StaticFiles):
    """Asked for again at each visit, and sent again where they changed."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        answer = super().file_response(*arguments, **options)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


class FailedStart:
    """Has the server say in one line why it cannot start, where that is not our bug; Starlette would give the traceback."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed" and hasattr(self._state, "failure"):
                message = {**message, "message": self._state.failure}
            await send(message)

        await self._app(scope, receive, told if scope["type"] == "lifespan" else send)


class ItemPaths:
    """Leaves paths of items percent-encoded, so that a slash within an id is told from one after it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/items/") and scope.get("raw_path"):
            scope = {**scope, "path": scope["raw_path"].decode("ascii", "replace").partition("?")[0]}
        await self._app(scope, receive, send)


async def _told(request: Request, error: Exception) -> Response:
    """The answer to an error that has a status of its own. Any other is our bug, and the guards' to tell and to log."""
    problem = _of_ours(error) or problem_of(error)
    if problem.code == "method":  # Starlette names the methods of one route of this path, which has several
        taken = request.app.openapi()["paths"].get(template_of(request.url.path), {})
        read = set[str]() if request.app.state.service.not_offered("GET", request.url.path) else {"GET"}
        problem.headers["Allow"] = ", ".join(sorted({method.upper() for method in taken} or read))
    if problem.status == 500:
        raise error
    if problem.status > 500:
        logging.getLogger("dqe_engine.server").error("%s: %s", problem.code, error)
    body = response_bytes(problem, request.state.request_id)
    answer = Response(body, problem.status)
    answer.raw_headers = response_headers(problem, body)
    return answer


def _of_ours(error: BaseException) -> Problem | None:
    """Of what writing and pictures raise."""
    if isinstance(error, BusyError):
        return Problem(503, "busy", "the index is being written by a bulk job; ask again later", retry_after(error.retry_after))
    for kind, answered, code in (
        (ItemExistsError, 409, "item_exists"),
        (UnknownItemError, 404, "unknown_item"),
        (NoPhotoError, 404, "no_image"),
    ):
        if isinstance(error, kind):
            return Problem(answered, code, error)
    return None


def _describe(app: FastAPI, service: Service) -> None:
    """OpenAPI with the schemas of `messages` in place of FastAPI's own of errors, and the operations that the index offers."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = made()
            for path in described["paths"].values():
                for operation in path.values():
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            components = described.setdefault("components", {})
            components["schemas"] = schemas()
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema: dict[str, Any] = app.openapi_schema or {}
        return {**schema, "paths": offered(schema["paths"], service.lacks)} if service.lacks else schema

    app.openapi = openapi  # type: ignore[method-assign]
