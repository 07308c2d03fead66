"""A server of the real application on a free port of this machine, and what tests of its page share."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from playwright.sync_api import Locator, Page

from dqe_engine.server.app import create_app
from dqe_engine.server.settings import ServerSettings

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
PICKS = "#grid > .tile .pick"
AT_REST = "#results[aria-busy=false]"


class UnderPrefix:
    """What a gateway does that serves the application under a path: it takes the path off."""

    def __init__(self, app: Any, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{self._prefix}/"), scope["path"]
            cut = len(self._prefix)
            scope = {**scope, "path": scope["path"][cut:], "raw_path": scope["raw_path"][cut:]}
        await self._app(scope, receive, send)


class Recorded:
    """Keeps the body of each request that is sent to `path`: browsers do not tell what was in a form with files."""

    def __init__(self, app: Any, path: str) -> None:
        self._app, self._path = app, path
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []
        whole = False

        async def recording() -> Any:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request" and not whole:
                parts.append(message.get("body", b""))
                if whole := not message.get("more_body"):
                    self.bodies.append(b"".join(parts))
            return message

        await self._app(scope, recording if scope.get("path") == self._path else receive, send)


@contextmanager
def running(settings: ServerSettings, *, prefix: str = "") -> Iterator[str]:
    """The address of the page while the server runs, in a thread of this process."""
    app: Any = create_app(settings)
    with serving(UnderPrefix(app, prefix) if prefix else app) as root:
        yield f"{root}{prefix}/"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address, without a slash, of any ASGI application while it runs."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def shown(page: Page) -> list[str]:
    """The ids in the grid, in their order."""
    found: list[str] = page.locator("#grid > .tile").evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")
    return found


def tile(page: Page, id: str) -> Locator:
    return page.locator(f'#grid > .tile[data-id="{id}"]')
